"""What a piece of code holds in memory at each moment, counted from the tensors that it really makes.

Works on real tensors and on fake ones (`torch._subclasses.FakeTensorMode`) alike: a storage counts from the operation
that made it until it is freed, views count once. Kernels' scratch space and the allocator's gaps are not seen.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

PROBE = 2 * 1009  # a batch size that divides the sizes of no weight: what it, or its half, divides grows with the batch


@dataclass(frozen=True)
class Timeline:
    """Bytes live after each change: at batch B moment t holds fixed[t] + B sample[t], of which gradient[t] are gradients.

    Gradients are part of `fixed`. Every list has one entry for each moment.
    """

    fixed: tuple[float, ...]
    sample: tuple[float, ...]
    gradient: tuple[float, ...]

    def peak(self, batch: int, gradient_share: float = 1.0, fixed_share: float = 1.0, repeated: bool = False) -> float:
        """The most bytes at any moment, where so much of the gradients and of what else is fixed lies on this device.

        `repeated`: this happens more than once before gradients are used, so that all of them are there from the first time.
        """
        if not self.fixed:
            return 0.0
        most = max(self.gradient) if repeated else 0.0
        moments = zip(self.fixed, self.sample, self.gradient)
        return max(gradient_share * max(g, most) + fixed_share * (f - g) + batch * s for f, s, g in moments)

    @property
    def largest_sample(self) -> float:
        """The most bytes that one more sample of the batch takes at any moment."""
        return max(self.sample, default=0)


class LiveBytes(TorchDispatchMode):
    """Inside the block, records the bytes of all tensors made in it; what `known` modules hold is left out.

    `probe` is the batch size that the code runs at, an even number: a tensor whose bytes are divided by it, or by its half
    (a part of the batch), is taken to grow with the batch; None
    counts everything as fixed. Gradients of `trained` parameters are told apart once they are accumulated. `flops` are those of
    the block, by the formulas of `torch.utils.flop_counter`; its `FlopCounterMode` itself hangs hooks on modules, which keep
    recomputed activations alive and would spoil the count of bytes.
    """

    def __init__(
        self, known: Iterable[Tensor] = (), trained: Iterable[nn.Parameter] = (), probe: int | None = None
    ) -> None:
        super().__init__()
        self.probe = probe
        self.flops = 0
        self._kind: dict[int, str] = {tensor.untyped_storage()._cdata: "known" for tensor in known}
        self._live: dict[str, float] = {"fixed": 0, "sample": 0, "gradient": 0}
        self._moments: list[tuple[float, float, float]] = [(0, 0, 0)]
        self._trained = list(trained)
        self._hooks: list[Any] = []

    def __enter__(self) -> "LiveBytes":
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in self._trained]
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        for hook in self._hooks:
            hook.remove()

    @property
    def timeline(self) -> Timeline:
        """What was recorded until now."""
        return Timeline(*zip(*self._moments))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._kind or not size:
            return
        grows = self.probe is not None and size % (self.probe // 2) == 0
        self._kind[key] = "sample" if grows else "fixed"
        self._add(key, size / cast(int, self.probe) if grows else size)
        weakref.finalize(storage, self._freed, key, size)

    def _add(self, key: int, amount: float) -> None:
        kind = self._kind[key]
        self._live[kind] += amount
        if kind == "gradient":
            self._live["fixed"] += amount
        if amount > 0:  # a peak follows a growth
            self._note()

    def _freed(self, key: int, size: int) -> None:
        grows = self._kind[key] == "sample"
        self._add(key, -(size / cast(int, self.probe) if grows else size))
        del self._kind[key]

    def _accumulated(self, parameter: Tensor) -> None:
        storage = cast(Tensor, parameter.grad).untyped_storage()
        if self._kind.get(storage._cdata) == "fixed":
            self._kind[storage._cdata] = "gradient"
            self._live["gradient"] += storage.nbytes()
            self._note()

    def _note(self) -> None:
        self._moments.append((self._live["fixed"], self._live["sample"], self._live["gradient"]))


def storages(module: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


class GPUAutocast(torch.overrides.TorchFunctionMode):
    """Lets autocast on the CPU keep the float32 operations that it keeps on a GPU.

    On a GPU, normalisations and reductions run and return float32 (torch's table "Ops that autocast to float32"); on the CPU
    they take what comes. What they leave for the backward pass differs by a factor of two.
    """

    FLOAT32 = frozenset(
        {
            nn.functional.layer_norm,
            nn.functional.group_norm,
            nn.functional.softmax,
            nn.functional.mse_loss,
            torch.pow,
            Tensor.pow,
            torch.rsqrt,
            Tensor.rsqrt,
            torch.exp,
            Tensor.exp,
            torch.sum,
            Tensor.sum,
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
            kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))
