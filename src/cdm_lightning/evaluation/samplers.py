"""Generating images from prompts, for viewing and for metrics. The noise depends only on (seed, prompt index).

A *sampler* is a way to make images: a network, a number of steps and a guidance scale. All samplers take deterministic
Euler steps. The network is called at the sigmas 1, 1 - 1/nfe, ..., 1/nfe, to which the model family's timestep shift
has been applied, and the last step ends at sigma 0 (see `core.schedules.inference_sigmas`). Shapes: images (N, 3, H, W)
in [0, 1].
"""

import itertools
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cdm_lightning.backbones.base import Backbone, BoundField, Conditioning, repeat_rows
from cdm_lightning.core.flow import GuidedField, VelocityField
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.core.rollout import sample
from cdm_lightning.core.schedules import constant_shift, inference_sigmas
from cdm_lightning.data.batches import PromptBatch
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Guidance, Name, Pixels, Positive, Steps


@dataclass(frozen=True)
class SamplerSpec:
    """A way to make images: the network, the number of steps `nfe`, the guidance scale and the size in pixels.

    A guidance scale of 1 means no guidance. If `height` or `width` is None, the backbone's default is used. `shift` is
    the factor of the timestep shift (see `core.schedules.constant_shift`). A factor of 1 gives uniform sigmas, and None
    means the model family's own shift, with which students are trained. Raises `UserError` if `network` is neither
    "student" nor "teacher", or if `nfe` is below 1.
    """

    name: Name
    network: Literal["student", "teacher"] = "student"
    nfe: Steps = 4
    guidance_scale: Guidance = 1.0
    height: Pixels | None = None
    width: Pixels | None = None
    shift: Positive | None = None

    def __str__(self) -> str:
        return repr(self).replace(
            ", shift=None", ""
        )  # as before there was a `shift`: settings of older runs stay equal

    def __post_init__(self) -> None:
        if self.network not in ("student", "teacher"):
            raise UserError(f"sampler {self.name!r}: network={self.network!r} must be student or teacher")
        if self.nfe < 1:
            raise UserError(f"sampler {self.name!r}: the number of steps nfe={self.nfe} must be at least 1")

    def check(self, backbone: Backbone) -> None:
        """Raise `UserError` if the model family cannot make images of this sampler's size."""
        try:
            backbone.at(self.height, self.width)
        except UserError as error:
            raise UserError(f"sampler {self.name!r}: {error}") from error

    @property
    def is_made_here(self) -> bool:
        """Whether the images are made by a network of this evaluation, and not read from files."""
        return True

    @property
    def network_calls(self) -> int:
        """The number of network calls for one image. It is one per step, or two with guidance."""
        return self.nfe * (1 if self.guidance_scale == 1 else 2)


STEPS = (
    SamplerSpec("teacher 50 steps", "teacher", 50),
    SamplerSpec("teacher 50 steps, guidance 1.5", "teacher", 50, 1.5),
    SamplerSpec("teacher 50 steps, guidance 2", "teacher", 50, 2.0),
    SamplerSpec("teacher 4 steps", "teacher", 4),
    SamplerSpec("teacher 4 steps, guidance 1.5", "teacher", 4, 1.5),
    SamplerSpec("teacher 4 steps, guidance 2", "teacher", 4, 2.0),
    SamplerSpec("student 1 step", "student", 1),
    SamplerSpec("student 2 steps", "student", 2),
    SamplerSpec("student 4 steps", "student", 4),
    SamplerSpec("student 8 steps", "student", 8),
)


def check_samplers(samplers: Sequence[SamplerSpec], backbone: Backbone) -> None:
    """Raise `UserError` if two samplers have the same name, or if the model family cannot make images of a sampler's size."""
    names = [spec.name for spec in samplers]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"validation.samplers: two samplers have the name {doubled[0]!r}; rename one")
    for spec in samplers:
        spec.check(backbone)


def sizes_of(samplers: Sequence[SamplerSpec], backbone: Backbone) -> list[tuple[int, int]]:
    """Return the different sizes (height, width) in pixels of the images that the samplers make."""
    return list(dict.fromkeys(backbone.at(spec.height, spec.width).image_size for spec in samplers))


def generate_all(
    samplers: Sequence[SamplerSpec],
    backbone: Backbone,
    networks: Mapping[str, nn.Module],
    batch: PromptBatch,
    seed: int,
    compute_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Generate images of the B prompts of `batch` by each sampler.

    Returns the images (B, 3, H, W) in [0, 1] by the sampler's name. `networks` holds the networks "student" and
    "teacher", which compute in `compute_dtype`. The noise depends only on `seed` and the prompts' indices.
    """
    numbers, size = batch.indices.tolist(), len(batch.prompts)
    return {
        spec.name: generate(backbone, networks[spec.network], spec, batch.prompts, numbers, seed, size, compute_dtype)
        for spec in samplers
    }


def generate(
    backbone: Backbone,
    network: nn.Module,
    spec: SamplerSpec,
    prompts: Sequence[str],
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Generate images (N, 3, H, W) in [0, 1], on the CPU, one for each of N prompts.

    `spec` has the number of steps, the guidance and the size. `indices` (N) are the prompts' indices. The noise depends only on
    `indices` and `seed`. Therefore the batch size and the number of processes change an image by float rounding at most.
    `backbone.setup` must have been called. Raises `UserError` for a size that the model family cannot make.
    """
    backbone, batches = backbone.at(spec.height, spec.width), []
    with _evaluating(network):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            field = _bind(backbone, network, spec, prompts[part], compute_dtype)
            batches.append(_sample_images(backbone, field, spec, indices[part], seed, device_of(network)))
    return torch.cat(batches)


class EncodedAhead:
    """A text memory (see `Backbone.use_text_memory`) with the conditioning of all batches that `generate` will use.

    `by_batch` maps the prompts of each batch, as a tuple, to their conditioning.
    """

    def __init__(self, by_batch: Mapping[tuple[str, ...], Conditioning]) -> None:
        self._by_batch = dict(by_batch)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of a batch of B prompts. Raises KeyError for a batch that was not encoded ahead."""
        return self._by_batch[tuple(prompts)]

    def forget(self) -> None:
        """Do nothing. The conditioning must be kept, because the text encoders have been freed."""
        return


@torch.no_grad()
def encode_ahead(backbone: Backbone, prompts: Sequence[str], batch_size: int) -> None:
    """Encode N prompts in the batches that `generate` uses, and free the text encoders to make room for the network.

    Afterwards `backbone.encode_prompts` accepts only these batches and [""], the empty prompt for guidance, and returns
    their stored conditioning.
    """
    batches = [tuple(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    encoded = {batch: backbone.encode_prompts(list(batch)) for batch in [*batches, ("",)]}
    backbone.use_text_memory(EncodedAhead(encoded))
    backbone.drop_text_encoders()


@torch.no_grad()
def _bind(
    backbone: Backbone, network: nn.Module, spec: SamplerSpec, prompts: Sequence[str], compute_dtype: torch.dtype
) -> VelocityField:
    field = BoundField(backbone, network, backbone.encode_prompts(prompts), compute_dtype)
    if spec.guidance_scale == 1:
        return field
    no_text = repeat_rows(backbone.encode_prompts([""]), len(prompts))
    unguided = BoundField(backbone, network, no_text, compute_dtype)
    return GuidedField(field, unguided, spec.guidance_scale, backbone.guide)


@torch.no_grad()
def _sample_images(
    backbone: Backbone,
    field: VelocityField,
    spec: SamplerSpec,
    indices: Sequence[int],
    seed: int,
    device: torch.device,
) -> Tensor:
    noise = evaluation_noise(seed, indices, backbone.latent_shape, device)
    shift = backbone.shift_steps if spec.shift is None else constant_shift(spec.shift)
    sigmas = inference_sigmas(spec.nfe, shift).to(device)
    return backbone.decode_latents(sample(field, noise, sigmas)).float().cpu()


def device_of(network: nn.Module) -> torch.device:
    """Return the device on which the network computes.

    This is the device of its first parameter or buffer, or the CPU if it has none. The shards of a network may be in
    host memory (option `strategy.on_cpu`). Such a network computes on the device of its mesh.
    """
    first = next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0))
    return torch.device(first.device_mesh.device_type) if isinstance(first, DTensor) else first.device


@contextmanager
def _evaluating(network: nn.Module) -> Generator[None]:
    """Put the network into eval mode inside the block, and back into its former mode afterwards."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
