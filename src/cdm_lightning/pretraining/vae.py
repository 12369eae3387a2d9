"""Stage 1 of `cdm_lightning.pretrain`: train the tiny pipeline's autoencoder (VAE) on renderings of the shapes set.

The loss is the mean absolute error of the images, plus four times their mean squared error, plus the KL divergence with
a small weight.
"""

from collections.abc import Callable
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
    """Train the VAE in place on `pool` renderings, standardise its latents, and return it frozen.

    `kl_weight` is the weight of the KL divergence in the loss. After the training, the VAE's scaling and shift factors
    are set so that its latents have mean 0 and standard deviation 1. The state of the training is saved in `folder`,
    from which an interrupted training resumes.
    """
    images = render(draw_scenes(pool, recipe.seed, "train", pairs=0.25), recipe.seed) * 2 - 1

    def batch(rng: torch.Generator) -> Tensor:
        return images[torch.randint(pool, (recipe.batch_size,), generator=rng)]

    fit_vae(vae, recipe, folder, batch, kl_weight)
    standardise_latents(vae, images[:2048])
    return vae


def fit_vae(
    vae: AutoencoderKL,
    recipe: Recipe,
    folder: Path,
    batch: Callable[[torch.Generator], Tensor],
    kl_weight: float,
    edge_weight: float = 0.0,
    save_every: int = 1000,
) -> None:
    """Train the VAE in place on the images (B, 3, H, W) in [-1, 1] that `batch(generator)` returns, and freeze it.

    In the loss, `kl_weight` is the weight of the KL divergence, and `edge_weight` is the weight of the absolute error
    in the differences between neighbouring pixels. The state of the training is saved in `folder` after every
    `save_every` iterations, and an interrupted training resumes from it.
    """
    network = cast(nn.Module, vae)  # diffusers declares `to` without its arguments
    network.to(memory_format=torch.channels_last).train().requires_grad_(True)

    def loss(iteration: int, rng: torch.Generator) -> Tensor:
        x = batch(rng).to(memory_format=torch.channels_last)
        posterior = posterior_of(vae, x)
        noise = torch.randn(posterior.mean.shape, generator=rng)
        error = cast(DecoderOutput, vae.decode(cast(FloatTensor, posterior.mean + posterior.std * noise))).sample - x
        value = error.abs().mean() + 4 * error.square().mean() + kl_weight * posterior.kl().mean() / x[0, 0].numel()
        if edge_weight:
            value = value + edge_weight * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        return value

    optimise("vae", vae, loss, recipe, folder=folder, save_every=save_every)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the VAE's shift and scale so that the latents of `images` have mean 0 and standard deviation 1.

    The images have the shape (N, 3, H, W) and values in [-1, 1].
    """
    latents = torch.cat([posterior_of(vae, chunk).mean for chunk in images.split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
