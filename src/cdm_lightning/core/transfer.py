"""Copy tensors between the host and a GPU. `send` and `Fetched` start a copy without waiting until it has ended."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Return `values` on `device`. If they are copied from the CPU to a GPU, the host does not wait for the copy.

    The copy goes through pinned memory. A plain copy would make the host wait until the GPU has done all earlier work.
    """
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Fetched:
    """A copy of a small tensor from a GPU to the host. The copy begins when this object is made.

    Reading the attribute `values` waits until the copy has arrived, but not for later work of the GPU. A tensor that is
    on the CPU already is not copied.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def values(self) -> Tensor:
        """The tensor on the CPU. The host waits until the copy has arrived."""
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()
        return self._values


def to_host(values: Tensor) -> Tensor:
    """Return a copy of the GPU tensor `values` in pinned host memory.

    The host waits until the copy is complete. Because the copy is pinned, `send` can later copy it to a GPU without
    making the host wait. A tensor on the CPU is returned unchanged.
    """
    if values.device.type == "cpu":
        return values
    return torch.empty_like(values, device="cpu", pin_memory=values.is_cuda).copy_(values)


class Resting:
    """Keeps the weights and buffers of frozen modules in host memory, except inside a `with` block of `on_device`.

    When this object is made, the modules must be on the device on which they compute. They are copied to pinned host
    memory when the first `on_device` block ends. Each later block copies them to the device when it begins, and copies
    nothing back when it ends, because the weights have not changed.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._copies: list[Tensor] = []
        self._device = next((value.device for module in modules for value in module.parameters()), None)

    @contextmanager
    def on_device(self) -> Generator[None]:
        """Return a context manager. Inside its `with` block, the modules are on their device."""
        if self._copies and self._device is not None:
            self._replace(lambda value: value.to(self._device, non_blocking=True))
        try:
            yield
        finally:
            if not self._copies:
                self._replace(self._copied)
            copies = iter(self._copies)
            self._replace(lambda value: next(copies))

    def _copied(self, value: Tensor) -> Tensor:
        self._copies.append(to_host(value))
        return value

    def _replace(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each weight and buffer of the modules by the result of `function`, always in the same order."""
        for module in self._modules:
            module._apply(function)
