"""The choice of the kernel by which torch computes attention: its own choice, or one that an option prefers.

All families reach attention through `torch.nn.functional.scaled_dot_product_attention`, also those whose processors do not
listen to the backends of diffusers (SD3, SANA). So the kernel is chosen there, for all of them.
"""

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager

from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdm_lightning.errors import UserError

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
VERSIONS = {  # of FlashAttention, which take the place of torch's own flash kernel: torch's name, and the module that it imports
    "flash3": ("FA3", "flash_attn_interface"),
    "flash4": ("FA4", "flash_attn.cute"),
}
OTHERS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)  # for calls that the chosen one cannot make


def check_attention(name: str | None, option: str) -> None:
    """Raise UserError, which names `option`, unless `name` is a kernel that this machine's software has, or None."""
    if name is None or name in KERNELS:
        return
    if name not in VERSIONS:
        raise UserError(
            f"{option}={name} must be one of {', '.join((*KERNELS, *VERSIONS))}, or null for torch's choice"
        )
    implementation, module = VERSIONS[name]
    if not hasattr(attention, "activate_flash_attention_impl"):
        raise UserError(
            f"{option}={name} needs a newer torch, whose flash attention can be replaced; set flash or cudnn"
        )
    if not _is_installed(module):
        raise UserError(
            f"{option}={name}: the package with the module {module} ({implementation}) is not installed; install it, or set flash"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


@contextmanager
def attention_by(name: str | None) -> Generator[None]:
    """Inside the block, compute attention by the kernel `name`; None leaves the choice to torch.

    Calls that this kernel cannot make, such as those with a mask or in float32 for "flash", are made by another one. "math"
    makes all calls, by the definition, and takes memory for all pairs of tokens. The backward pass must be inside the block too.
    """
    if name is None:
        yield
        return
    _activate(VERSIONS[name][0] if name in VERSIONS else None)
    chosen = KERNELS[name if name in KERNELS else "flash"]
    kernels = [chosen] if chosen == SDPBackend.MATH else list(dict.fromkeys((chosen, *OTHERS)))
    with sdpa_kernel(kernels, set_priority=True):
        yield


def _activate(implementation: str | None) -> None:
    """Let torch's flash kernel be this implementation; None is torch's own. It stays so until another one is asked for."""
    if implementation != _active[0]:
        if implementation is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(implementation)
        _active[0] = implementation


_active: list[str | None] = [None]
