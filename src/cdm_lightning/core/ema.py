"""Move the weights of one network towards those of another.

The EMA of the student is updated in this way. CDM (arXiv:2605.06376) also moves the fake score a little towards the student.
"""

from threading import Thread

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def lerp_parameters_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Set target <- (1 - weight) target + weight source, in place, for each parameter of the source, by name.

    Buffers, and parameters that only the target has, stay unchanged. The two networks may be on different devices. If they are
    sharded, both must be sharded in the same way, and each rank moves its own shards. Raises ValueError if the target lacks a
    parameter of the source.
    """
    targets, sources = _pairs(target, source)
    if all(target.device == source.device for target, source in zip(targets, sources)):
        torch._foreach_lerp_(targets, sources, weight)
        return
    for to_move, towards in zip(targets, sources):  # one at a time: copies of all would take the memory of a network
        to_move.lerp_(towards.to(to_move.device), weight)


def _pairs(target: nn.Module, source: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    to, of = dict(target.named_parameters()), dict(source.named_parameters())
    if lacking := of.keys() - to.keys():
        raise ValueError(
            f"the target lacks parameters of the source, such as {sorted(lacking)[:3]}; give equal networks"
        )
    return [local(to[name]) for name in of], [local(value) for value in of.values()]


class HostFollower:
    """Runs `lerp_parameters_` in the background, for a target in host memory and a source on the GPU.

    - `follow` starts an update, with the same result as `lerp_parameters_`. A separate CUDA stream copies the source
      into pinned host memory, which takes as much memory as the source. A thread updates each parameter of the target
      when the copy of this parameter is complete.
    - Call `release` before the source is changed. Later work of the GPU then waits for the copies, but the host does
      not wait.
    - Call `settle` before the target is read. It waits until the target is updated.
    """

    def __init__(self) -> None:
        self._arrivals: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def guard(self, target: nn.Module) -> None:
        """Make every forward pass and every `state_dict()` of `target` call `settle` first.

        This also holds if a larger module that contains `target` runs it or collects its `state_dict()`.
        """
        target.register_forward_pre_hook(lambda *_: self.settle(), prepend=True)
        target.register_state_dict_pre_hook(lambda *_: self.settle())

    def follow(self, target: nn.Module, source: nn.Module, weight: float) -> None:
        """Wait for the previous update, and start `lerp_parameters_(target, source, weight)` in the background."""
        self.settle()
        targets, sources = _pairs(target, source)
        arrived = self._copy([value.detach() for value in sources])
        self._thread = Thread(target=self._move, args=(targets, arrived, weight), name="EMA on the host")
        self._thread.start()

    def release(self) -> None:
        """Make later work on the current CUDA stream wait until the source is copied.

        That later work may then change the source.
        """
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def settle(self) -> None:
        """Wait until the target is updated. If the background thread has failed, raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _copy(self, sources: list[Tensor]) -> list["torch.cuda.Event | None"]:
        """Copy the sources to `_arrivals`; return for each the event of its arrival. On the CPU, which the tests use, at once."""
        on_gpu = any(value.is_cuda for value in sources)
        if [(value.shape, value.dtype) for value in self._arrivals] != [(v.shape, v.dtype) for v in sources]:
            self._arrivals = [torch.empty(v.shape, dtype=v.dtype, device="cpu", pin_memory=on_gpu) for v in sources]
        if not on_gpu:
            for arrival, value in zip(self._arrivals, sources):
                arrival.copy_(value)
            return [None] * len(sources)
        arrived: list[torch.cuda.Event | None] = []
        side = self._side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for arrival, value in zip(self._arrivals, sources):
                arrival.copy_(value, non_blocking=True)
                event = torch.cuda.Event()
                event.record(side)
                arrived.append(event)
        self._copied = arrived[-1]
        return arrived

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def _move(self, targets: list[Tensor], arrived: list["torch.cuda.Event | None"], weight: float) -> None:
        try:
            with torch.no_grad():
                for target, value, event in zip(targets, self._arrivals, arrived):
                    if event is not None:
                        event.synchronize()
                    target.lerp_(value.to(target.dtype), weight)
        except BaseException as error:  # `settle` raises it in the main thread
            self._error = error


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a `DTensor`, as a view. A plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warmed_up_decay(step: int, decay: float) -> float:
    """Return the EMA decay after `step` earlier updates: min(decay, (1 + step) / (10 + step)).

    The decay is low at the start, so that the EMA soon forgets its initial weights. The authors of CDM use the same formula.
    """
    return min(decay, (1 + step) / (10 + step))
