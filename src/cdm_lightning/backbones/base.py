"""What a model family has to know, and the fields that its networks become once text and precision are bound.

Shapes: latents (B, C, H, W); sigma (B,) in [0, 1], 1 = noise, float32 always; images (B, 3, H, W) in [0, 1].
A new family is one file with a `Backbone`: everything outside speaks these shapes and sigma only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.anatomy import Anatomy, gather_for_backward, outputs_of, pick_blocks
from cdm_lightning.backbones.own_inputs import giving, join_values
from cdm_lightning.core.flow import Rows, VelocityField, plain_guidance
from cdm_lightning.errors import UserError

CheckpointFunction = Callable[..., Any]  # (block, *arguments) -> its result, recomputed in the backward pass
Conditioning = dict[str, Tensor]  # what a network is told besides x and sigma: batch first, keys its backbone's own


def select_rows(cond: Conditioning, rows: Rows) -> Conditioning:
    """The conditioning of some samples; without a copy if they are consecutive."""
    if isinstance(rows, slice):
        return {name: value[rows] for name, value in cond.items()}
    return {name: value.index_select(0, rows.to(value.device)) for name, value in cond.items()}


def repeat_rows(cond: Conditioning, times: int) -> Conditioning:
    """The conditioning of one prompt as that of so many samples; takes no memory."""
    return {name: value.expand(times, *value.shape[1:]) for name, value in cond.items()}


def concat(conds: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of the batches one after the other; KeyError if their keys differ."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


class TextCache(Protocol):
    """Conditioning that was encoded before; `data.text_cache.StoredText` is one."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts; UserError for a prompt that is not there."""

    def to(self, device: torch.device) -> None:
        """Give conditioning on this device from here on."""


class TextMemory(Protocol):
    """What has been encoded, kept; `data.text_memory.RememberedText` is one."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts."""

    def forget(self) -> None:
        """Encode anew at the next call."""


class Backbone(Anatomy, ABC):
    """A family of pretrained flow models: its networks, text encoding, noise shift, latents and pipeline format."""

    text_cache: TextCache | None = None  # see `use_text_cache`
    text_memory: TextMemory | None = None  # see `use_text_memory`
    lora_targets: Mapping[str, tuple[str, ...]] = {}  # presets of LoRA targets: ends of the names of linear layers
    teacher_is_base: bool = True  # the teacher is the network of `build_base`: adapters off, it serves as one
    unplannable: str | None = None  # why the planner cannot plan the family, a sentence; said before any file is read

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) of an image, in pixels."""

    def at(self, height: int | None = None, width: int | None = None) -> "Backbone":
        """The same family and loaded parts for images of another size in pixels; UserError if that cannot be.

        A side that is None stays as it is.
        """
        own = self.image_size
        size = (own[0] if height is None else height, own[1] if width is None else width)
        if size == own:
            return self
        raise UserError(
            f"{type(self).__name__} makes images of {own[0]} x {own[1]} pixels only, not {size[0]} x {size[1]}"
        )

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Family and a hash of the network's configuration: checkpoints of another fingerprint do not fit."""

    @abstractmethod
    def build_network(self) -> nn.Module:
        """A new trainable copy of the pretrained network in float32, the same at every call and in every process."""

    def build_teacher(self) -> nn.Module:
        """The network to distil from; the pretrained one unless the family has a better."""
        return self.build_network()

    def build_base(self) -> nn.Module:
        """The network that adapters are put on, pretrained, in the dtype in which it shall stay frozen."""
        return self.build_teacher()

    def build_empty(self, teacher: bool) -> nn.Module | None:
        """What `build_network` or `build_teacher` gives, its weights on the meta device, to be filled by `read_rows`.

        None for a family, or settings, whose weights are not simply those of a file: then every process builds it whole.
        """
        return None

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows first..end-1 of the pretrained weight of that name, read now, on the CPU, in the dtype of the file."""
        raise KeyError(name)

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Load the frozen parts (text encoders, image codec) and move them to the device; may be called again.

        With a `text_cache`, that is moved and no text encoder is loaded.
        """

    @property
    def text_fingerprint(self) -> dict[str, str]:
        """All that `encode_prompts` depends on: hashes of text encoders and tokenizers by name, and settings, as texts.

        Raises `UserError` for a family that has no text encoder whose work could be cached.
        """
        raise UserError(f"{type(self).__name__} has no text encoder to cache; leave text_cache.folder=null")

    def use_text_cache(self, cache: TextCache) -> None:
        """Take all conditioning from `cache` from here on; to be called before `setup`."""
        self.text_cache = cache
        self.encode_prompts = cache.encode  # an attribute of the object hides the method of its class

    def use_text_memory(self, memory: TextMemory) -> None:
        """Ask `memory`, made with this backbone's `encode_prompts`, for all conditioning from here on."""
        self.text_memory, self.encode_prompts = memory, memory.encode

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts; "" is the unconditional one."""

    def blank_conditioning(self, batch: int) -> Conditioning:
        """What `encode_prompts` gives for `batch` prompts, in keys, shapes and dtypes, without contents, on torch's default device.

        Only configuration files are read. UserError for a family that cannot tell.
        """
        raise UserError(
            self.unplannable
            or f"{type(self).__name__} cannot be planned: it does not tell the shapes of its conditioning"
        )

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The network's velocity, noise - x0, (B, C, H, W) in float32."""

    @abstractmethod
    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Sigmas of any shape, moved towards noise as the family does, each for itself; keeps 0 and 1."""

    def shift_steps(self, sigmas: Tensor) -> Tensor:
        """Falling unshifted sigmas (..., K) of whole rollouts without their final 0, as the family's sampler runs them.

        `shift_sigmas`, but for a family whose scheduler also stretches a rollout to a fixed last sigma.
        """
        return self.shift_sigmas(sigmas)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """The velocity (B, C, H, W) that the family's pipeline makes of a conditional and an unconditional one.

        Scale 1 is no guidance, whatever the pipeline calls it. For evaluation only: the objective has its own.
        """
        return plain_guidance(cond, uncond, scale)

    @abstractmethod
    def decode_latents(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of clean latents (B, C, H, W)."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents (B, C, H, W) of images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def enable_gradient_checkpointing(self, network: nn.Module, function: CheckpointFunction | None = None) -> None:
        """Let the network's blocks recompute activations in the backward pass, by torch or by a `function` given."""

    @abstractmethod
    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write a folder that samples with `nfe` calls of `network` by default, in the family's own format."""

    def save_lora(self, tensors: Mapping[str, Tensor], folder: Path, nfe: int, model_card: str) -> None:
        """Write a LoRA file (`tensors` by layer, scale 1) with the schedule of `nfe` steps; UserError if there is no such."""
        raise UserError(f"{type(self).__name__} has no LoRA files; export with --form pipeline")


@dataclass(frozen=True, eq=False)
class BoundField(VelocityField):
    """A network with the conditioning of its batch, computing in `compute_dtype` (autocast where not float32).

    `inputs` are the values (B,) of inputs of its own, where the network has some.
    """

    backbone: Backbone
    network: nn.Module
    cond: Conditioning
    compute_dtype: torch.dtype = torch.float32
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity (B, C, H, W), float32; x and sigma reach the network in float32 whatever it computes in."""
        with (
            torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32),
            giving(self.network, self.inputs),
        ):
            return self.backbone.velocity(self.network, x, sigma, self.cond).float()

    def given(self, **inputs: Tensor) -> VelocityField:
        """The field with a value (B,) for each of the network's own inputs."""
        return replace(self, inputs=inputs)

    def with_features(self, x: Tensor, sigma: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The velocity as of a plain call, and the features (B, N, D), float32, after the blocks with these numbers.

        Blocks are counted as `Backbone.blocks_of` lists them, negative numbers from the end. Features carry gradients where
        the call does. UserError for a number that there is not, and for a block that the call does not run.
        """
        picked = pick_blocks(self.backbone.blocks_of(self.network), blocks)
        with outputs_of(picked) as outputs:
            velocity = self(x, sigma)
        idle = [number for number, block in zip(blocks, picked) if block not in outputs]
        if idle:
            raise UserError(f"there are no features after block {idle[0]}: the network did not run it")
        features = [self.backbone.features_after(outputs[block]).float() for block in picked]
        for each in features:
            gather_for_backward(self.network, each)
        return velocity, features

    def select(self, rows: Rows) -> VelocityField:
        """The field of some samples."""
        inputs = {name: values[rows] for name, values in self.inputs.items()}
        return replace(self, cond=select_rows(self.cond, rows), inputs=inputs)

    def join(self, others: Sequence[VelocityField]) -> VelocityField | None:
        """One field for all batches, if they call the same network alike, with conditioning of the same shapes."""
        fields = [self, *(other for other in others if isinstance(other, BoundField) and self._is_like(other))]
        inputs = join_values([field.inputs for field in fields])
        if inputs is None or len(fields) <= len(others):
            return None
        return replace(self, cond=concat([field.cond for field in fields]), inputs=inputs)

    def _is_like(self, other: "BoundField") -> bool:
        shapes, other_shapes = ({k: v.shape[1:] for k, v in field.cond.items()} for field in (self, other))
        same_call = self.network is other.network and self.compute_dtype == other.compute_dtype
        return same_call and shapes == other_shapes
