"""Stage 1: the autoencoder of the tiny pipeline, trained on renderings with an L1 + L2 loss and a small KL."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from cdm_lightning.data.shapes import draw_scenes, render
from cdm_lightning.pretraining.loop import Recipe, optimise


def train_vae(
    vae: AutoencoderKL, recipe: Recipe, folder: Path, pool: int = 8192, kl_weight: float = 1e-4
) -> AutoencoderKL:
    """Train in place on `pool` renderings, then set scaling and shift so that latents have mean 0 and deviation 1."""
    images = render(draw_scenes(pool, recipe.seed, "train", pairs=0.25), recipe.seed) * 2 - 1
    vae.to(memory_format=torch.channels_last).train().requires_grad_(True)

    def loss(iteration: int, rng: torch.Generator) -> Tensor:
        x = images[torch.randint(pool, (recipe.batch_size,), generator=rng)].to(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        return error.abs().mean() + 4 * error.square().mean() + kl_weight * posterior.kl().mean() / x[0, 0].numel()

    optimise("vae", vae, loss, recipe, folder=folder)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images[:2048].split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae
