"""Counts where the host would wait for a GPU, on a CPU that stands for both.

What belongs to the device is known by its storage: what `send` copies, what is made on its device, what is marked, and all
that is computed from these. Two things make a host wait: reading a number of such a tensor, and using a tensor of the host
beside one, which on a GPU is an error unless it is copied, by a copy that is not `send`.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
}
HERE = torch.device("cpu", 0)
DEVICE_OF = Tensor.device.__get__
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class HostWaits(TorchDispatchMode):
    """`found` counts the waits inside the block by (what, place); `mark` gives tensors to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self._on_device: dict[int, Any] = {}

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Let these tensors belong to the device from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._on_device:
                self._on_device[key] = weakref.finalize(storage, self._on_device.pop, key, None)

    def holds(self, value: Any) -> bool:
        """Whether a tensor belongs to the device."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._on_device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = [leaf for leaf in leaves if self.holds(leaf)]
        if held:
            others = [leaf for leaf in leaves if leaf.dim() and not self.holds(leaf)]
            if func in READS:
                self.found[(READS[func], place())] += 1
            elif func is aten.index.Tensor and any(leaf.dtype in (torch.bool, torch.uint8) for leaf in leaves[1:]):
                self.found[("index by mask", place())] += 1
            if others:
                self.found[("index from the host" if func in INDEXING else "copy", place())] += 1
        out = func(*args, **(kwargs or {}))
        if held:
            self.mark(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


class _Devices(TorchFunctionMode):
    """Says that marked tensors are on "cpu:0", which equals no "cpu", and marks what is made there or moved there."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == DEVICE_OF:  # a new object at each access
            return HERE if self.waits.holds(args[0]) else torch.device("cpu")
        if func is Tensor.tolist and self.waits.holds(args[0]):
            self.waits.found[("tolist", place())] += 1
        out = func(*args, **kwargs)
        if HERE in (kwargs.get("device"), *args[1:2]) and isinstance(out, Tensor) and not self.waits.holds(out):
            if func is Tensor.to:
                self.waits.found[("copy", place())] += 1
            self.waits.mark([out])
        return out


def place() -> str:
    """The innermost line of the package that leads here."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "cdm_lightning" in path.parts or path.name.startswith("test_"):
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def host_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostWaits]:
    """Count inside the block; `send` gives copies that belong to the device, and what is `Fetched` belongs to the host."""
    from cdm_lightning.backbones import base, packing
    from cdm_lightning.core import rng, rollout
    from cdm_lightning.data import text_ahead, text_cache
    from cdm_lightning.training import updates

    waits = HostWaits()

    def send(values: Tensor, device: Any) -> Tensor:
        copy = values.clone()
        waits.mark([copy])
        return copy

    class Fetched:
        def __init__(self, values: Tensor) -> None:
            self.values = torch.tensor(values.detach().numpy().copy())

    for module in (base, packing, rng, rollout, text_ahead, text_cache):
        monkeypatch.setattr(module, "send", send)
    monkeypatch.setattr(updates, "Fetched", Fetched)
    with ExitStack() as stack:
        stack.enter_context(waits)
        stack.enter_context(_Devices(waits))
        yield waits
