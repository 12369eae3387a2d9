"""Record how many bytes a piece of code holds in memory at each moment, in the tensors that the code makes.

The tensors can be real or fake; fake tensors have shapes but no contents (see `torch._subclasses.FakeTensorMode`). A
tensor's storage counts from the operation that makes it until it is freed, and views of it add nothing. Scratch space
of kernels and unused gaps between tensors are not counted.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

PROBE = (
    2 * 1009
)  # a batch size that divides no weight's size; a tensor grows with the batch if it, or its half, divides its size


ATTENTION = ("flash_attention_for_cpu", "fused_attention_overrideable")  # the kinds that torch 2.11 has no formulas for


def count_attention() -> None:
    """Add formulas to torch's flop counter for kinds of attention that it does not know and would count as 0."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    for kind in ATTENTION:
        for ending, formula in (("", forward), ("_backward", backward)):
            operator = getattr(aten, f"_scaled_dot_product_{kind}{ending}", None)
            if operator is not None and operator not in flop_registry:
                register_flop_formula(operator)(formula)


count_attention()


@dataclass(frozen=True)
class Timeline:
    """The bytes that some code holds at each moment t: fixed[t] + B * sample[t] for a batch of B samples.

    gradient[t] is the part of fixed[t] that gradients take. `fixed`, `sample` and `gradient` have an entry for each
    moment at which the bytes grow.
    """

    fixed: tuple[float, ...]
    sample: tuple[float, ...]
    gradient: tuple[float, ...]

    def peak(self, batch: int, gradient_share: float = 1.0, fixed_share: float = 1.0, repeated: bool = False) -> float:
        """Return the largest number of bytes at any moment, for `batch` samples; 0 if nothing was recorded.

        A device may hold only the share `gradient_share` of the gradients and the share `fixed_share` of the other
        fixed bytes. If `repeated` is True, the batch is computed in several parts (gradient accumulation), and from the
        second part on, all gradients exist from the start of the part.
        """
        if not self.fixed:
            return 0.0
        most = max(self.gradient) if repeated else 0.0
        moments = zip(self.fixed, self.sample, self.gradient)
        return max(gradient_share * max(g, most) + fixed_share * (f - g) + batch * s for f, s, g in moments)

    @property
    def largest_sample(self) -> float:
        """The largest number of bytes that one more sample takes at any moment."""
        return max(self.sample, default=0)


class LiveBytes(TorchDispatchMode):
    """A context manager that records the bytes of all tensors that are made inside its `with` block.

    `timeline` is the record. Tensors in `known` are not counted. `probe` is the batch size of the code in the block, an
    even number. A tensor whose number of bytes is a multiple of half of `probe` is assumed to grow with the batch, and
    all other tensors are assumed to have a fixed size. If `probe` is None, all tensors are assumed to have a fixed
    size. The accumulated gradients of the parameters in `trained` count as gradients.

    `flops` is the number of floating-point operations for the whole batch, by the formulas of
    `torch.utils.flop_counter`. torch's own `FlopCounterMode` is not used, because its hooks would keep recomputed
    activations in memory and so change the bytes.
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
        """The bytes that have been recorded so far."""
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
        if amount > 0:  # only growth can make a new peak
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
    """Yield a module's parameters and buffers, to be passed as `known` to `LiveBytes`, which then does not count them."""
    yield from module.parameters()
    yield from module.buffers()


class GPUAutocast(torch.overrides.TorchFunctionMode):
    """A mode (context manager) in which autocast on the CPU uses float32 for the same operations as on a GPU.

    On a GPU, normalizations and reductions compute in float32 and return float32 (see torch's table "Ops that autocast
    to float32"). On the CPU they use the dtype of their inputs. Without this mode, the tensors that these operations
    save for the backward pass would be counted with half the size that they have on a GPU.
    """

    FLOAT32 = frozenset(
        {
            nn.functional.layer_norm,
            nn.functional.rms_norm,
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
