"""Stage 1 of `cdm_lightning.pretrain`: train the autoencoder (VAE) of the tiny pipeline on renderings of the shapes set.

The loss is the absolute error plus four times the squared error of the images, plus a small KL divergence.
"""

from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import FloatTensor, Tensor, nn

from cdm_lightning.data.shapes import draw_scenes, render
from cdm_lightning.pretraining.loop import Recipe, optimise


def posterior_of(vae: AutoencoderKL, images: Tensor) -> DiagonalGaussianDistribution:
    """Return the VAE's distribution of the latents (B, C, h, w) for images (B, 3, H, W) in [-1, 1]."""
    return cast(AutoencoderKLOutput, vae.encode(images)).latent_dist


def train_vae(
    vae: AutoencoderKL, recipe: Recipe, folder: Path, pool: int = 8192, kl_weight: float = 1e-4
) -> AutoencoderKL:
    """Train the VAE in place on `pool` renderings and return it frozen. `kl_weight` is the weight of the KL divergence.

    Its scaling and shift factors are set so that latents have mean 0 and standard deviation 1. `folder` keeps the state, so that
    an interrupted training can resume.
    """
    images = render(draw_scenes(pool, recipe.seed, "train", pairs=0.25), recipe.seed) * 2 - 1
    network = cast(nn.Module, vae)  # diffusers declares `to` without its arguments
    network.to(memory_format=torch.channels_last).train().requires_grad_(True)

    def loss(iteration: int, rng: torch.Generator) -> Tensor:
        x = images[torch.randint(pool, (recipe.batch_size,), generator=rng)].to(memory_format=torch.channels_last)
        posterior = posterior_of(vae, x)
        noise = torch.randn(posterior.mean.shape, generator=rng)
        error = cast(DecoderOutput, vae.decode(cast(FloatTensor, posterior.mean + posterior.std * noise))).sample - x
        return error.abs().mean() + 4 * error.square().mean() + kl_weight * posterior.kl().mean() / x[0, 0].numel()

    optimise("vae", vae, loss, recipe, folder=folder)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([posterior_of(vae, chunk).mean for chunk in images[:2048].split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae
