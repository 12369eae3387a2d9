"""A complete toy backbone in two dimensions: the data are eight Gaussians (modes) on a circle, and the teacher is exact.

A latent (2, 1, 1) is a point (x, y). A prompt names modes by compass direction, as in "north" or "east southeast"; a prompt
without a direction means all eight modes. The student starts from an MLP that is fitted to the teacher's velocity, which
takes seconds. An image is a dark square with one bright dot at the point, so an image can be converted back into a point.
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
    """The exact velocity field of the flow between noise and a mixture of the eight Gaussians. It has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(len(MODES)) * (2 * math.pi / len(MODES))
        self.register_buffer("centres", RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
        """Return the velocity E[noise - x0 | x] (B, 2) for x (B, 2), sigma (B,) and mixture weights (B, 8).

        If x0 comes from a mode with centre m and standard deviation w, then x at sigma s is normal with mean (1 - s) m and
        variance (1 - s)^2 w^2 + s^2, and the mean of noise - x0 given x is linear in x. The result is the average
        of these means over the modes, weighted by the probability of each mode given x.
        """
        s = sigma[:, None]
        variance = (1 - s) ** 2 * WIDTH**2 + s**2  # (B, 1)
        offset = x[:, None] - (1 - s)[..., None] * self.centres  # (B, 8, 2)
        share = (weights.log() - offset.square().sum(dim=-1) / (2 * variance)).softmax(dim=-1)  # (B, 8)
        given_mode = ((s - (1 - s) * WIDTH**2) / variance)[..., None] * offset - self.centres
        return (share[..., None] * given_mode).sum(dim=1)

    def sample(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Draw clean points (B, 2) from mixtures with the weights (B, 8)."""
        mode = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        return self.centres[mode] + WIDTH * torch.randn(len(weights), 2, generator=generator)


class Block(nn.Module):
    """A residual layer of `VelocityMLP`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """Return `h` (B, hidden) plus SiLU(linear(h)), in the same shape."""
        return h + F.silu(self.linear(h))


class VelocityMLP(nn.Module):
    """The student's network: an MLP of `depth` residual layers of width `hidden` that predicts the velocity."""

    def __init__(self, hidden: int, depth: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.checkpoint: CheckpointFunction = partial(checkpoint, use_reentrant=False)
        self.enter = nn.Linear(2 + 1 + 2 * FREQUENCIES + len(MODES), hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(depth))
        self.leave = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
        """Return the velocity (B, 2) for x (B, 2), sigma (B,) and mixture weights (B, 8)."""
        angles = math.pi * sigma[:, None] * 2.0 ** torch.arange(FREQUENCIES, device=x.device)
        h = F.silu(self.enter(torch.cat([x, sigma[:, None], angles.sin(), angles.cos(), len(MODES) * weights], dim=1)))
        for block in self.blocks:
            recompute = self.gradient_checkpointing and torch.is_grad_enabled()
            h = self.checkpoint(block, h) if recompute else block(h)
        return self.leave(h)


class Toy2DBackbone(Backbone):
    """A backbone whose data are eight Gaussians on a circle. The teacher is exact, and the student is an MLP.

    The MLP has `depth` residual layers of width `hidden`. Before training, it is fitted to the teacher in `fit_steps` optimizer
    steps.
    """

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
        """The shape (2, 1, 1) of a latent. Its two channels are x and y."""
        return (2, 1, 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """The height and width (H, W) of an image, in pixels."""
        return (IMAGE_SIDE, IMAGE_SIDE)

    @property
    def fingerprint(self) -> str:
        """The text "toy2d-" and a hash of the size of the MLP. A run refuses a checkpoint with another fingerprint."""
        config = json.dumps(self._network_config(), sort_keys=True)
        return f"toy2d-{hashlib.blake2b(config.encode(), digest_size=8).hexdigest()}"

    @property
    def feature_width(self) -> int:
        """D, the width of the hidden states (B, 1, D) after a block. It is `hidden`."""
        return self.hidden

    @property
    def time_embedding_width(self) -> int:
        """D, the width of the output (B, D) of the MLP's first layer, to which embeddings of additional inputs are added."""
        return self.hidden

    def features_after(self, block_output: Tensor) -> Tensor:
        """Return a block's output (B, hidden) as features (B, 1, hidden). A point is one token."""
        return block_output[:, None]

    def build_network(self) -> nn.Module:
        """Return a new copy of the MLP that is fitted to the teacher. The fit takes seconds and runs once in each process."""
        return copy.deepcopy(_fitted_network(self.hidden, self.depth, self.fit_steps))

    def build_teacher(self) -> nn.Module:
        """Return the exact velocity field, a module without parameters."""
        return MixtureVelocity()

    def build_base(self) -> nn.Module:
        """Return the fitted MLP as the base of LoRA adapters, because the teacher has no weights to adapt."""
        return self.build_network()

    def setup(self, device: torch.device) -> None:
        """Set the device on which `encode_prompts` returns conditioning from now on. Nothing has to be loaded."""
        self.device = torch.device(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return {"weights": (B, 8)}, the mixture weights.

        All modes that a prompt names have the same weight, and the others have weight 0. A prompt that names no mode gives all
        eight modes the same weight.
        """
        named = torch.tensor([[mode in _words(prompt) for mode in MODES] for prompt in prompts], dtype=torch.float32)
        named[named.sum(dim=1) == 0] = 1.0
        return {"weights": (named / named.sum(dim=1, keepdim=True)).to(self.device)}

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return {"weights": (B, 8)} in float32, uninitialized, for B = `batch`."""
        return {"weights": torch.empty(batch, len(MODES))}

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, 2, 1, 1) in float32 for x (B, 2, 1, 1) and sigma (B,)."""
        return network(x.flatten(1), sigma, cond["weights"]).float()[..., None, None]

    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Return the sigmas unchanged, because this family has no timestep shift."""
        return sigmas

    def exact_samples(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Draw one point for each of B prompts from the prompt's mixture of modes: latents (B, 2, 1, 1) on the CPU.

        Equal prompts and seeds give equal points.
        """
        weights = self.encode_prompts(prompts)["weights"].cpu()
        return MixtureVelocity().sample(weights, torch.Generator().manual_seed(seed))[..., None, None]

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Draw points (B, 2, 1, 1) as bright dots in images (B, 3, 32, 32) in [0, 1].

        Points outside the image are moved to its border.
        """
        place = x0.float().flatten(1).clamp(-EXTENT, EXTENT)
        along = [(_pixel_centres(x0.device) - place[:, i, None]).square() for i in (0, 1)]  # (B, 32) each
        distance = along[1].flip(1)[:, :, None] + along[0][:, None, :]  # row 0 is the top, y grows upwards
        dot = torch.exp(-distance / (2 * (DOT * 2 * EXTENT / IMAGE_SIDE) ** 2))
        return dot[:, None].repeat(1, 3, 1, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the points (B, 2, 1, 1) that images (B, 3, 32, 32) show: the mean pixel position, weighted by brightness."""
        light = images.float().mean(dim=1)
        light = light / light.sum(dim=(1, 2), keepdim=True)
        centres = _pixel_centres(images.device)
        x, y = light.sum(dim=1) @ centres, light.sum(dim=2) @ centres.flip(0)
        return torch.stack([x, y], dim=1)[..., None, None]

    def enable_gradient_checkpointing(self, network: nn.Module, function: CheckpointFunction | None = None) -> None:
        """Switch on gradient checkpointing: `function(block, *arguments)`, or torch's `checkpoint`, runs each block."""
        velocity = cast(VelocityMLP, network)
        velocity.gradient_checkpointing = True
        if function is not None:
            velocity.checkpoint = function

    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write the student's files into `folder`.

        The files are network.safetensors, config.json ("hidden", "depth", "nfe") and README.md with the text `model_card`.
        """
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
    """A feature extractor for metrics. The features of an image are the coordinates (x, y) of its bright dot."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the coordinates (x, y) of the dots in images (B, 3, 32, 32) in [0, 1], as (B, 2)."""
        return Toy2DBackbone().encode_images(images).flatten(1)


def exact_points(prompts: Sequence[str], seed: Seed = 0) -> Tensor:
    """Draw one point for each of B prompts from the prompt's mixture of modes: (B, 2).

    Equal prompts and seeds give equal points. Metrics compare the student's samples with these points.
    """
    return Toy2DBackbone().exact_samples(prompts, seed).flatten(1)


def _words(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.lower())


def _pixel_centres(device: torch.device) -> Tensor:
    """Return the coordinates (32,) of the pixels' centres along one direction."""
    return ((torch.arange(IMAGE_SIDE, device=device) + 0.5) / IMAGE_SIDE * 2 - 1) * EXTENT


@cache
def _fitted_network(hidden: int, depth: int, steps: int) -> VelocityMLP:
    """Return an MLP that is trained to predict the exact velocity. The same arguments give the same weights."""
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
    """Draw noised points (B, 2), sigmas (B,) and mixture weights (B, 8).

    In one half of the batch, all eight modes have the same weight. In the other half, one to eight random modes have the same
    weight, and the others have weight 0.
    """
    count = torch.randint(1, len(MODES) + 1, (size, 1), generator=generator)
    count[: size // 2] = len(MODES)
    named = (torch.rand(size, len(MODES), generator=generator).argsort(dim=1) < count).float()
    weights = named / named.sum(dim=1, keepdim=True)
    sigma = torch.rand(size, generator=generator)
    noise = torch.randn(size, 2, generator=generator)
    x0 = teacher.sample(weights, generator)
    return (1 - sigma[:, None]) * x0 + sigma[:, None] * noise, sigma, weights
