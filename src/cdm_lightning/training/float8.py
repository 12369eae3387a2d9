"""Products of matrices in 8-bit floats (fp8), for network calls without a gradient, such as rollouts.

Each row of the inputs and each row of a weight is scaled by its largest number and rounded to float8 (e4m3), as in the
recipe "rowwise" of torchao. torchao also computes the products. The stored weights do not change: every call rounds
them anew.
"""

import importlib.util
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.base import BoundField
from cdm_lightning.core.flow import VelocityField
from cdm_lightning.errors import UserError

KINDS = ("rowwise", "emulated")
MULTIPLE = 16  # of both widths of a layer, which the kernels of fp8 need
CAPABILITY = (8, 9)  # of the oldest GPUs with fp8: Ada; Hopper has 9.0

Product = Callable[[Tensor, Tensor], Tensor]  # (x (..., I), weight (O, I)) -> (..., O)


def check_float8(kind: str | None) -> None:
    """Raise UserError unless `kind` is None, or `kind` is one of `KINDS` and torchao is installed.

    `kind` is the value of the option compute.fp8.
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise UserError(f"compute.fp8={kind} must be one of {', '.join(KINDS)}, or null")
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"compute.fp8={kind} needs torchao: install the extra lowbit (pip install 'cdm-lightning[lowbit]'), or set null"
        )


def check_device(kind: str | None, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Raise UserError unless fp8 of this `kind` works on `device` for a network that computes in `compute_dtype`.

    "rowwise" needs bfloat16 and a GPU with fp8. "emulated" and None need nothing.
    """
    if kind != "rowwise":
        return
    if compute_dtype != torch.bfloat16:
        raise UserError("compute.fp8=rowwise needs module.compute_dtype=bfloat16; set it, or compute.fp8=null")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"
        raise UserError(
            f"compute.fp8=rowwise: {name} cannot compute in fp8, which needs a GPU of compute capability 8.9 or more; "
            "set compute.fp8=null"
        )


class _Switch:
    """Whether the layers compute in fp8 now. All calls of networks are made by one thread; the backward pass never uses it."""

    on = False


@contextmanager
def float8_products(on: bool) -> Generator[None]:
    """Inside the `with` block, switch fp8 on or off, as `on` says, for all layers that `use_float8` has changed.

    While fp8 is on, these layers compute in fp8 if gradients are disabled. In all other cases they compute as usual.
    """
    before, _Switch.on = _Switch.on, on
    try:
        yield
    finally:
        _Switch.on = before


class Float8Linear(nn.Linear):
    """A linear layer that computes in fp8 inside `with float8_products(True)`, unless gradients are enabled.

    `use_float8` turns an `nn.Linear` into such a layer. Inputs with fewer than three dimensions are always computed as
    usual: they hold one vector for each sample, from which a block computes the shift, scale and gate for all tokens of
    the sample. Rounding this vector would affect all these tokens and save little work.
    """

    float8_product: Product

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output (..., O) for `input` (..., I)."""
        if not _Switch.on or torch.is_grad_enabled() or input.ndim < 3:
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        made = self.float8_product(input, self.weight.to(input.dtype))
        return made if self.bias is None else made + self.bias.to(made.dtype)


def use_float8(network: nn.Module, block_types: tuple[type[nn.Module], ...], kind: str) -> int:
    """Let the linear layers in the blocks of `network` compute in fp8 inside `with float8_products(True)`.

    Return the number of changed layers. `block_types` are the classes of the blocks, and `kind` is one of `KINDS`. LoRA
    adapters, and layers with a width that is no multiple of 16, are not changed. The names and weights of the changed
    layers stay the same.
    """
    product, changed = _product_of(kind), 0
    for block in network.modules():
        if not isinstance(block, block_types):
            continue
        for name, layer in block.named_modules():
            if type(layer) is nn.Linear and _fits(name, layer):
                layer.__class__ = Float8Linear
                vars(layer)["float8_product"] = product  # a plain attribute
                changed += 1
    return changed


def _fits(name: str, layer: nn.Linear) -> bool:
    is_adapter = any(part.startswith("lora_") for part in name.split("."))
    return not is_adapter and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0


def _product_of(kind: str) -> Product:
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear as Template

    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=kind == "emulated")
    with torch.device("meta"):
        settings = Template(MULTIPLE, MULTIPLE, bias=False, config=config).linear_mm_config
    return partial(_product, config=config, settings=settings)


def _product(x: Tensor, weight: Tensor, config: Any, settings: Any) -> Tensor:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    with torch.autocast(x.device.type, enabled=False):  # it would cast what is in fp8
        made = matmul_with_hp_or_float8_args.apply(x.reshape(-1, x.shape[-1]), weight.t(), settings, config)
    return made.view(*x.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Float8Field(BoundField):
    """A velocity field that computes its network in fp8 if it is called with gradients disabled.

    If `is_precise` is true, the field never computes in fp8.
    """

    is_precise: bool = False

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity (B, C, H, W) in float32 for x (B, C, H, W) and sigma (B,)."""
        with float8_products(not self.is_precise and not torch.is_grad_enabled()):
            return super().__call__(x, sigma)

    def precise(self) -> VelocityField:
        """Return a copy of this field that never computes in fp8."""
        return replace(self, is_precise=True)
