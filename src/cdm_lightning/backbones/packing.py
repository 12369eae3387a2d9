"""Functions for the backbones of LongCat-Image, FLUX.1 and Qwen-Image, which pack 2 x 2 latent positions into a token.

Shapes: latent (B, C, h, w); packed (B, h/2 * w/2, 4 C).
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.weights_dtype import weights_dtype
from cdm_lightning.core.transfer import send


def pack(x: Tensor) -> Tensor:
    """Pack each square of 2 x 2 positions into a token: (B, C, h, w) -> (B, h/2 * w/2, 4 C).

    The tokens come row by row, from the top left. The values are only permuted.
    """
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens into a latent of `height` x `width`: (B, h/2 * w/2, 4 C) -> (B, C, h, w).

    This is the inverse of `pack`.
    """
    b, _, channels = tokens.shape
    grid = tokens.view(b, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, height, width)


def grid_ids(height: int, width: int, first: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the position of each token of a latent of `height` x `width`: (h/2 * w/2, 3) in float32.

    A position is `first` + (0, row, column). Pipelines may compute positions in bfloat16, in which whole numbers are
    exact only up to 256; in float32 all positions are exact. On a GPU, later calls with the same arguments return the
    same tensor, which saves the time of making it again.
    """
    if device.type == "cuda":  # on other devices, making the tensor again costs nothing
        return _kept_ids(height, width, first, device)
    return _made_ids(height, width, first, device)


@lru_cache(maxsize=64)
def _kept_ids(height: int, width: int, first: tuple[int, int, int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the first call may come from validation, and later ones train
        return _made_ids(height, width, first, device)


def _made_ids(height: int, width: int, first: tuple[int, int, int], device: torch.device) -> Tensor:
    rows, columns = torch.meshgrid(
        torch.arange(height // 2, device=device), torch.arange(width // 2, device=device), indexing="ij"
    )
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return (ids + send(torch.tensor(first), device)).float()


def dtype_of_call(network: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype in which `network` computes.

    It is the dtype of autocast if autocast is on for the device of `x`, otherwise the dtype of the weights.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights_dtype(network)


def rounded_timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the network's timestep for sigma (B,), rounded as in the pipeline: (1000 sigma cast to `dtype`) / 1000.

    The networks of LongCat-Image, FLUX.1 and Qwen-Image multiply the timestep by 1000 in the dtype of their
    computation. Above 512, bfloat16 rounds to multiples of 4. If sigma were cast before it is multiplied, the result
    would differ (908 instead of 904 for 0.9045), and the student would be trained on other noise levels than the
    pipeline uses.
    """
    return (sigma.float() * 1000).to(dtype) / 1000


def renormalised(cond: Tensor, guided: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Return the velocities `guided`, with each token (2 x 2 positions) rescaled to the norm that it has in `cond`.

    `cond` are the conditional velocities. They, `guided` and the result are (B, C, h, w). `low` and `high`, if given,
    bound the factor by which a token is scaled.
    """
    height, width = cond.shape[2:]
    cond, guided = pack(cond), pack(guided)
    factor = cond.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)
    if low is not None or high is not None:
        factor = factor.clamp(min=low, max=high)
    return unpack(guided * factor, height, width)
