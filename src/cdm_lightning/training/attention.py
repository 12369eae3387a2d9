"""The choice of the kernel that computes attention: torch's default, or the kernel that an option names.

All model families call `torch.nn.functional.scaled_dot_product_attention`, so the kernel is chosen for this function.
The attention backends of diffusers are not used, because some families (SD3, SANA) ignore them.
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
)  # for calls that the chosen kernel does not support


def check_attention(name: str | None, option: str) -> None:
    """Raise UserError unless `name` is None or an installed attention kernel.

    `option` is the name of the setting in the error message, for example "--attention".
    """
    if name is None or name in KERNELS:
        return
    if name == "flex":
        raise UserError(
            f"{option}=flex is not supported: flex attention is faster only if a mask hides many tokens, and here masks hide "
            "only padding of the text (docs/speed.md); set flash, cudnn or null"
        )
    if name not in VERSIONS:
        raise UserError(
            f"{option}={name} must be one of {', '.join((*KERNELS, *VERSIONS))}, or null for torch's choice"
        )
    implementation, module = VERSIONS[name]
    if not hasattr(attention, "activate_flash_attention_impl"):
        raise UserError(f"{option}={name} needs a newer version of torch; upgrade torch, or set flash or cudnn")
    if not _is_installed(module):
        raise UserError(
            f"{option}={name} needs the package FlashAttention {implementation[2:]} (module {module}), which is not "
            "installed; install it, or set flash"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


@contextmanager
def attention_by(name: str | None) -> Generator[None]:
    """Compute attention by the kernel `name` inside the `with` block; None leaves the choice to torch.

    Attention whose inputs this kernel does not support is computed by another kernel: "flash", for example, supports
    neither masks nor float32. "math" supports all inputs, but stores the whole attention matrix, with one number for
    each pair of tokens. The `with` block must contain the backward pass too, because gradient checkpointing computes
    attention again there.
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
    """Use `implementation` as torch's flash attention (None: torch's own), until this function is called with another one."""
    if implementation != _active[0]:
        if implementation is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(implementation)
        _active[0] = implementation


_active: list[str | None] = [None]
