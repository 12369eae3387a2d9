"""The interface that every model family implements, and the velocity field of a network with its text and precision.

Shapes: latents (B, C, H, W); sigma (B,) in [0, 1], 1 = noise, always float32; images (B, 3, H, W) in [0, 1].
A new family is one file with a subclass of `Backbone`. The rest of the code uses only these shapes and sigma.
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
from cdm_lightning.core.transfer import send
from cdm_lightning.errors import UserError

CheckpointFunction = Callable[..., Any]  # (block, *arguments) -> its result, recomputed in the backward pass
Conditioning = dict[str, Tensor]  # a network's inputs except x and sigma, batch first; the backbone names them


def select_rows(cond: Conditioning, rows: Rows) -> Conditioning:
    """Return the conditioning of some samples; a slice of samples is not copied."""
    if isinstance(rows, slice):
        return {name: value[rows] for name, value in cond.items()}
    return {name: value.index_select(0, send(rows, value.device)) for name, value in cond.items()}


def repeat_rows(cond: Conditioning, times: int) -> Conditioning:
    """Return the conditioning of one prompt expanded to a batch of `times` samples; this copies nothing."""
    return {name: value.expand(times, *value.shape[1:]) for name, value in cond.items()}


def concat(conds: Sequence[Conditioning]) -> Conditioning:
    """Concatenate the conditioning of several batches; KeyError if one of them lacks a key of the first."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


class TextCache(Protocol):
    """Conditioning that was encoded earlier and stored; `data.text_cache.StoredText` implements it."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts; UserError for a prompt that the cache does not hold."""

    def to(self, device: torch.device) -> None:
        """Return conditioning on this device from now on."""


class TextMemory(Protocol):
    """Conditioning that is kept after it was encoded once; `data.text_memory.RememberedText` implements it."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts."""

    def forget(self) -> None:
        """Drop everything that is kept; the next call encodes again."""


class Backbone(Anatomy, ABC):
    """A family of pretrained flow models: its networks, text encoding, noise shift, latents and pipeline format."""

    text_cache: TextCache | None = None  # see `use_text_cache`
    text_memory: TextMemory | None = None  # see `use_text_memory`
    lora_targets: Mapping[str, tuple[str, ...]] = {}  # presets of LoRA targets: name suffixes of linear layers
    decode_tile: int | None = None  # images with a longer side, in pixels, are decoded in tiles; read by `setup`
    teacher_is_base: bool = True  # whether the network of `build_base` without its adapters is the teacher
    unplannable: str | None = None  # a sentence: why the planner cannot plan the family; shown before any file is read

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) of an image, in pixels."""

    def at(self, height: int | None = None, width: int | None = None) -> "Backbone":
        """Return the same family, with its loaded parts, for images of another size in pixels.

        A side that is None keeps its current value. UserError if the family cannot make images of that size.
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
        """The family and a hash of the network's configuration; a checkpoint with another fingerprint does not fit."""

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Return a new trainable copy of the pretrained network in float32, the same at every call and in every process."""

    def build_teacher(self) -> nn.Module:
        """Return the network to distil from; by default this is the pretrained network."""
        return self.build_network()

    def build_base(self) -> nn.Module:
        """Return the pretrained network that adapters are added to, in the dtype in which it stays frozen."""
        return self.build_teacher()

    def build_empty(self, teacher: bool) -> nn.Module | None:
        """Return the network of `build_network` or `build_teacher` with its weights on the meta device.

        `read_rows` fills the weights. Return None if the weights are not simply those of a file, which depends on the
        family and its settings; every process then builds the whole network.
        """
        return None

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Read rows first..end-1 of the pretrained weight `name` from its file now, onto the CPU, in the file's dtype."""
        raise KeyError(name)

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Load the frozen parts (text encoders, image codec) and move them to the device; may be called again.

        With a `text_cache`, the cache is moved instead, and no text encoder is loaded.
        """

    @property
    def text_fingerprint(self) -> dict[str, str]:
        """Everything that `encode_prompts` depends on, as strings: hashes of text encoders and tokenizers, and settings.

        Raises `UserError` for a family that has no text encoder whose output could be cached.
        """
        raise UserError(
            f"{type(self).__name__} has no text encoder to cache, so a text cache is of no use; set text_cache.folder=null"
        )

    def use_text_cache(self, cache: TextCache) -> None:
        """Take all conditioning from `cache` from now on; call this before `setup`."""
        self.text_cache = cache
        self.encode_prompts = cache.encode  # the instance attribute hides the method of the class

    def use_text_memory(self, memory: TextMemory) -> None:
        """Take all conditioning from `memory` from now on; it must have been made with this backbone's `encode_prompts`."""
        self.text_memory, self.encode_prompts = memory, memory.encode

    def drop_text_encoders(self) -> None:
        """Free the text encoders, after which only prompts that are stored can be encoded; by default there are none."""
        return

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts; the prompt "" gives the unconditional one."""

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return conditioning for `batch` prompts with the keys, shapes and dtypes of `encode_prompts`, but without contents.

        It is on torch's default device. Only configuration files are read. UserError for a family that cannot do so.
        """
        raise UserError(
            self.unplannable
            or f"{type(self).__name__} cannot be planned: it does not define the shapes of its conditioning"
        )

    def alike(self, conds: Sequence[Conditioning]) -> Sequence[Conditioning] | None:
        """Return the conditioning of several batches in equal shapes, so that one network call can take all; None if impossible.

        A family whose shapes depend on the prompts must be able to do so: processes that hold shards of one network must
        make the same calls whatever their own prompts are.
        """
        shapes = [{name: value.shape[1:] for name, value in cond.items()} for cond in conds]
        return conds if all(shape == shapes[0] for shape in shapes) else None

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's velocity, noise - x0, as (B, C, H, W) in float32."""

    @abstractmethod
    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Shift sigmas of any shape towards noise as the family does, each one independently; 0 and 1 stay the same."""

    def shift_steps(self, sigmas: Tensor) -> Tensor:
        """Shift the sigmas of whole rollouts as the family's sampler does.

        `sigmas` (..., K) are unshifted, decreasing and without the final 0. The default is `shift_sigmas`; a family
        overrides it if its scheduler also stretches each rollout so that its last sigma has a fixed value.
        """
        return self.shift_sigmas(sigmas)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Combine a conditional and an unconditional velocity (B, C, H, W) as the family's pipeline does.

        Scale 1 means no guidance, whatever value the pipeline uses for that. This is for evaluation only: the objective
        has its own guidance.
        """
        return plain_guidance(cond, uncond, scale)

    def cautions(self, guidance_scale: float) -> list[str]:
        """Return warnings about this teacher, for an objective with this `guidance_scale`; printed once before training."""
        return []

    @abstractmethod
    def decode_latents(self, x0: Tensor) -> Tensor:
        """Decode clean latents (B, C, H, W) into images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] into clean latents (B, C, H, W)."""

    @abstractmethod
    def enable_gradient_checkpointing(self, network: nn.Module, function: CheckpointFunction | None = None) -> None:
        """Make the network's blocks recompute activations in the backward pass, by `function` if given, else by torch."""

    @abstractmethod
    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write a folder, in the family's own format, that samples with `nfe` calls of `network` by default."""

    def save_lora(self, tensors: Mapping[str, Tensor], folder: Path, nfe: int, model_card: str) -> None:
        """Write a LoRA file (`tensors` by layer, scale 1) and the schedule of `nfe` steps.

        UserError if the family has no LoRA files.
        """
        raise UserError(f"{type(self).__name__} has no LoRA files; export with --form pipeline")


@dataclass(frozen=True, eq=False)
class BoundField(VelocityField):
    """A network bound to the conditioning of its batch, computing in `compute_dtype` (by autocast unless float32).

    `inputs` are the values (B,) for the network's own inputs, if it has any (see `own_inputs`).
    """

    backbone: Backbone
    network: nn.Module
    cond: Conditioning
    compute_dtype: torch.dtype = torch.float32
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity (B, C, H, W) in float32; x and sigma are given to the network in float32 in any case."""
        with (
            torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32),
            giving(self.network, self.inputs),
        ):
            return self.backbone.velocity(self.network, x, sigma, self.cond).float()

    def given(self, **inputs: Tensor) -> VelocityField:
        """Return this field with a value (B,) for each of the network's own inputs."""
        return replace(self, inputs=inputs)

    def with_features(self, x: Tensor, sigma: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the velocity of a plain call, and the features (B, N, D) in float32 after the given blocks.

        Blocks are numbered as `Backbone.blocks_of` lists them; negative numbers count from the end. Features carry
        gradients if the call does. UserError for a block that does not exist or that the call does not run.
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
        """Return the field of some samples of the batch."""
        inputs = {name: values[rows] for name, values in self.inputs.items()}
        return replace(self, cond=select_rows(self.cond, rows), inputs=inputs)

    def join(self, others: Sequence[VelocityField]) -> VelocityField | None:
        """Return one field for all batches; None unless all call one network, with conditioning that can be made alike."""
        fields = [self, *(other for other in others if isinstance(other, BoundField) and self._is_like(other))]
        inputs = join_values([field.inputs for field in fields])
        if inputs is None or len(fields) <= len(others):
            return None
        conds = self.backbone.alike([field.cond for field in fields])
        return None if conds is None else replace(self, cond=concat(conds), inputs=inputs)

    def _is_like(self, other: "BoundField") -> bool:
        return self.network is other.network and self.compute_dtype == other.compute_dtype
