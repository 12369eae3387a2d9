"""Eight Gaussians on a circle in the plane: a complete backbone whose teacher is known in closed form.

A latent (2, 1, 1) is a point (x, y). A prompt names modes by compass direction ("north", "east southeast ..."); a prompt
without a direction means all eight. The student starts from an MLP that is fitted to the teacher's velocity in seconds.
An image is a dark square with one bright dot at the point, so images can be converted back into points.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdm_lightning.backbones.base import Backbone, CheckpointFunction, Conditioning
from cdm_lightning.files import replacing
from cdm_lightning.kinds import CountOrNone, LayerCount, Seed, Width

MODES = ("east", "northeast", "north", "northwest", "west", "southwest", "south", "southeast")
RADIUS = 1.5  # of the circle of modes
WIDTH = 0.15  # standard deviation of each mode
IMAGE_SIDE = 32  # pixels
EXTENT = 2.5  # images show [-EXTENT, EXTENT] in both directions
DOT = 1.0  # standard deviation of the dot, in pixels
FREQUENCIES = 4  # number of sines and of cosines of sigma among the MLP's inputs


class MixtureVelocity(nn.Module):
    """The exact velocity of the flow from noise to the modes with the given weights."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(len(MODES)) * (2 * math.pi / len(MODES))
        self.register_buffer("centres", RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
        """x (B, 2), sigma (B,), weights (B, 8) -> E[noise - x0 | x] (B, 2).

        Given a mode with centre m, x is normal around (1 - s) m with variance (1 - s)^2 w^2 + s^2, and noise - x0 is
        linear in x.
        """
        s = sigma[:, None]
        variance = (1 - s) ** 2 * WIDTH**2 + s**2  # (B, 1)
        offset = x[:, None] - (1 - s)[..., None] * self.centres  # (B, 8, 2)
        share = (weights.log() - offset.square().sum(dim=-1) / (2 * variance)).softmax(dim=-1)  # (B, 8)
        given_mode = ((s - (1 - s) * WIDTH**2) / variance)[..., None] * offset - self.centres
        return (share[..., None] * given_mode).sum(dim=1)

    def sample(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Draw clean points (B, 2) from the modes with weights (B, 8)."""
        mode = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        return self.centres[mode] + WIDTH * torch.randn(len(weights), 2, generator=generator)


class Block(nn.Module):
    """A residual layer of the MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """(B, hidden) -> (B, hidden)."""
        return h + F.silu(self.linear(h))


class VelocityMLP(nn.Module):
    """The student: a velocity network without knowledge of the mixture."""

    def __init__(self, hidden: int, depth: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.checkpoint: CheckpointFunction = partial(checkpoint, use_reentrant=False)
        self.enter = nn.Linear(2 + 1 + 2 * FREQUENCIES + len(MODES), hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(depth))
        self.leave = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
        """x (B, 2), sigma (B,), weights (B, 8) -> velocity (B, 2)."""
        angles = math.pi * sigma[:, None] * 2.0 ** torch.arange(FREQUENCIES, device=x.device)
        h = F.silu(self.enter(torch.cat([x, sigma[:, None], angles.sin(), angles.cos(), len(MODES) * weights], dim=1)))
        for block in self.blocks:
            recompute = self.gradient_checkpointing and torch.is_grad_enabled()
            h = self.checkpoint(block, h) if recompute else block(h)
        return self.leave(h)


class Toy2DBackbone(Backbone):
    """The mixture as a backbone; `hidden` and `depth` are the size of the MLP, `fit_steps` the steps of its fit."""

    block_types = (Block,)
    time_embedding = "enter"  # the layer that takes point, time and text together; time has no layer of its own
    lora_targets = {"blocks": ("linear",)}  # noqa: RUF012
    teacher_is_base = False

    def __init__(self, hidden: Width = 64, depth: LayerCount = 3, fit_steps: CountOrNone = 1000) -> None:
        self.hidden = hidden
        self.depth = depth
        self.fit_steps = fit_steps
        self.device = torch.device("cpu")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(2, 1, 1): x and y as channels."""
        return (2, 1, 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (IMAGE_SIDE, IMAGE_SIDE)

    @property
    def fingerprint(self) -> str:
        """The family and a hash of the size of the MLP."""
        config = json.dumps(self._network_config(), sort_keys=True)
        return f"toy2d-{hashlib.blake2b(config.encode(), digest_size=8).hexdigest()}"

    @property
    def feature_width(self) -> int:
        """D of the features after a block; a point is one token."""
        return self.hidden

    @property
    def time_embedding_width(self) -> int:
        """D of the output of `enter`."""
        return self.hidden

    def features_after(self, block_output: Tensor) -> Tensor:
        """(B, hidden) -> (B, 1, hidden): a point is one token."""
        return block_output[:, None]

    def build_network(self) -> nn.Module:
        """Return a new copy of the fitted MLP."""
        return copy.deepcopy(_fitted_network(self.hidden, self.depth, self.fit_steps))

    def build_teacher(self) -> nn.Module:
        """Return the mixture's velocity in closed form."""
        return MixtureVelocity()

    def build_base(self) -> nn.Module:
        """Return the fitted MLP, because the teacher has no weights to adapt."""
        return self.build_network()

    def setup(self, device: torch.device) -> None:
        """Encode prompts onto `device` from now on; there is nothing to load."""
        self.device = torch.device(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return {"weights": (B, 8)}: equal for the modes that a prompt names, or for all if it names none."""
        named = torch.tensor([[mode in _words(prompt) for mode in MODES] for prompt in prompts], dtype=torch.float32)
        named[named.sum(dim=1) == 0] = 1.0
        return {"weights": (named / named.sum(dim=1, keepdim=True)).to(self.device)}

    def blank_conditioning(self, batch: int) -> Conditioning:
        """{"weights": (B, 8)} float32, without contents."""
        return {"weights": torch.empty(batch, len(MODES))}

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """x (B, 2, 1, 1), sigma (B,) -> velocity (B, 2, 1, 1) in float32."""
        return network(x.flatten(1), sigma, cond["weights"]).float()[..., None, None]

    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Return the sigmas unchanged: the family has no shift."""
        return sigmas

    def exact_samples(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Draw points (B, 2, 1, 1) from the data distribution of each prompt."""
        weights = self.encode_prompts(prompts)["weights"].cpu()
        return MixtureVelocity().sample(weights, torch.Generator().manual_seed(seed))[..., None, None]

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Points (B, 2, 1, 1) -> images (B, 3, 32, 32) of a dot; points outside the image are moved to its border."""
        place = x0.float().flatten(1).clamp(-EXTENT, EXTENT)
        along = [(_pixel_centres(x0.device) - place[:, i, None]).square() for i in (0, 1)]  # (B, 32) each
        distance = along[1].flip(1)[:, :, None] + along[0][:, None, :]  # row 0 is the top, y grows upwards
        dot = torch.exp(-distance / (2 * (DOT * 2 * EXTENT / IMAGE_SIDE) ** 2))
        return dot[:, None].repeat(1, 3, 1, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) -> points (B, 2, 1, 1), the brightness-weighted mean positions."""
        light = images.float().mean(dim=1)
        light = light / light.sum(dim=(1, 2), keepdim=True)
        centres = _pixel_centres(images.device)
        x, y = light.sum(dim=1) @ centres, light.sum(dim=2) @ centres.flip(0)
        return torch.stack([x, y], dim=1)[..., None, None]

    def enable_gradient_checkpointing(self, network: nn.Module, function: CheckpointFunction | None = None) -> None:
        """Recompute each block in the backward pass, by `function` if given, else by torch."""
        velocity = cast(VelocityMLP, network)
        velocity.gradient_checkpointing = True
        if function is not None:
            velocity.checkpoint = function

    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write network.safetensors, config.json (arguments of `VelocityMLP`, nfe) and README.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "network.safetensors") as weights:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, weights
            )
        config = {**self._network_config(), "nfe": nfe}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card.rstrip() + "\n", encoding="utf-8")

    def _network_config(self) -> dict[str, int]:
        return {"hidden": self.hidden, "depth": self.depth}


class PointsOfPictures(nn.Module):
    """A feature extractor for metrics: images (B, 3, 32, 32) of a dot -> the points (B, 2) that they show."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [0, 1] -> (B, 2)."""
        return Toy2DBackbone().encode_images(images).flatten(1)


def exact_points(prompts: Sequence[str], seed: Seed = 0) -> Tensor:
    """Draw points (B, 2) from the data distribution of each prompt; they depend on the seed."""
    return Toy2DBackbone().exact_samples(prompts, seed).flatten(1)


def _words(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.lower())


def _pixel_centres(device: torch.device) -> Tensor:
    """Return the coordinates (32,) of the pixels' centres along one direction."""
    return ((torch.arange(IMAGE_SIDE, device=device) + 0.5) / IMAGE_SIDE * 2 - 1) * EXTENT


@cache
def _fitted_network(hidden: int, depth: int, steps: int) -> VelocityMLP:
    """Return the MLP after regression on the closed-form velocity; it is the same for the same arguments."""
    generator, teacher = torch.Generator().manual_seed(0), MixtureVelocity()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = VelocityMLP(hidden, depth)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            x, sigma, weights = _fit_batch(teacher, generator)
            loss = F.mse_loss(network(x, sigma, weights), teacher(x, sigma, weights))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def _fit_batch(teacher: MixtureVelocity, generator: torch.Generator, size: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noised points (B, 2), sigmas (B,) and weights (B, 8).

    The weights are those of all modes in one half of the batch, and of one to eight random modes in the other.
    """
    count = torch.randint(1, len(MODES) + 1, (size, 1), generator=generator)
    count[: size // 2] = len(MODES)
    named = (torch.rand(size, len(MODES), generator=generator).argsort(dim=1) < count).float()
    weights = named / named.sum(dim=1, keepdim=True)
    sigma = torch.rand(size, generator=generator)
    noise = torch.randn(size, 2, generator=generator)
    x0 = teacher.sample(weights, generator)
    return (1 - sigma[:, None]) * x0 + sigma[:, None] * noise, sigma, weights
