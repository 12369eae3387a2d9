"""What LongCat-Image, FLUX.1 and Qwen-Image have in common: 2 x 2 latents in a token, and how they take the noise level.

Shapes: latent (B, C, h, w); packed (B, h/2 * w/2, 4 C).
"""

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.diffusers_pipeline import weights_dtype


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C), rows of tokens from the top left; a permutation."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h/2 * w/2, 4 C) -> (B, C, h, w) for a latent of that height and width: the inverse of `pack`."""
    b, _, channels = tokens.shape
    grid = tokens.view(b, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, height, width)


def grid_ids(height: int, width: int, first: tuple[int, int, int], device: torch.device) -> Tensor:
    """Positions (h/2 * w/2, 3) of the tokens of a latent of that height and width, counted from `first`; float32.

    Float32 is exact far beyond any position; bfloat16, in which pipelines may hold them, would not be above 256.
    """
    rows, columns = torch.meshgrid(
        torch.arange(height // 2, device=device), torch.arange(width // 2, device=device), indexing="ij"
    )
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return (ids + torch.tensor(first, device=device)).float()


def dtype_of_call(network: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which the network computes here: that of autocast, where it is on, else that of the weights."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights_dtype(network)


def rounded_timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Sigma (B,) by the pipeline's own detour: 1000 sigma is cast, then divided by 1000 again.

    These networks multiply by 1000 in the dtype that they compute in. In bfloat16 that rounds to multiples of 4 above 512,
    and dividing before the cast would round otherwise (sigma 0.9045 to 908, not to 904): a student trained so would see
    other noise levels than its pipeline shows it. In float32 nothing is lost.
    """
    return (sigma.float() * 1000).to(dtype) / 1000


def renormalised(cond: Tensor, guided: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Guided velocities (B, C, h, w) whose tokens get back the length of the conditional ones.

    The factor of each token is kept between `low` and `high`, where given.
    """
    height, width = cond.shape[2:]
    cond, guided = pack(cond), pack(guided)
    factor = cond.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)
    if low is not None or high is not None:
        factor = factor.clamp(min=low, max=high)
    return unpack(guided * factor, height, width)
