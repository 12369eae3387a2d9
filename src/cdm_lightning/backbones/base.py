"""The interface that every model family implements, and a network bound to a batch's text as a velocity field.

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
    """Return the conditioning of the samples `rows` of a batch: a slice (a view, no copy), or a tensor of indices."""
    if isinstance(rows, slice):
        return {name: value[rows] for name, value in cond.items()}
    return {name: value.index_select(0, send(rows, value.device)) for name, value in cond.items()}


def repeat_rows(cond: Conditioning, times: int) -> Conditioning:
    """Return the conditioning of one prompt expanded to a batch of `times` samples; this copies nothing."""
    return {name: value.expand(times, *value.shape[1:]) for name, value in cond.items()}


def concat(conds: Sequence[Conditioning]) -> Conditioning:
    """Concatenate the conditioning of several batches along the batch; KeyError if one of them lacks a key of the first."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


class TextCache(Protocol):
    """Conditioning of prompts that was encoded earlier and stored on disk; `data.text_cache.StoredText` implements this."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts; UserError for a prompt that the cache does not hold."""

    def to(self, device: torch.device) -> None:
        """Return conditioning on this device from now on."""


class TextMemory(Protocol):
    """Conditioning of prompts that is kept in memory once it is encoded; `data.text_memory.RememberedText` implements this."""

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
        """The family's name and a hash of the network's configuration; a checkpoint with another fingerprint is refused."""

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Return a new trainable copy of the pretrained network in float32, the same at every call and in every process."""

    def build_teacher(self) -> nn.Module:
        """Return the network to distil from; by default this is the pretrained network."""
        return self.build_network()

    def build_base(self) -> nn.Module:
        """Return the pretrained network to which LoRA adapters are added, in the dtype in which it stays frozen."""
        return self.build_teacher()

    def build_empty(self, teacher: bool) -> nn.Module | None:
        """Return the network of `build_teacher` (if `teacher`) or `build_network` with its weights on the meta device.

        It can then be sharded first, and each process reads only its shards by `read_rows`. Return None if the weights are
        not simply those of a file, which depends on the family and its settings: every process then builds the whole network.
        """
        return None

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Read rows first..end-1 (of dimension 0) of the pretrained weight `name` from its file, onto the CPU, in its dtype."""
        raise KeyError(name)

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Load the frozen parts (text encoders, image codec) and move them to the device; a later call moves them again.

        With a `text_cache` no text encoder is loaded, and the cache returns its conditioning on the device.
        """

    @property
    def text_fingerprint(self) -> dict[str, str]:
        """What the result of `encode_prompts` depends on, as {name: text}: hashes of text encoders and tokenizers, and settings.

        A text cache with another fingerprint is refused. UserError for a family without text encoders, which needs no cache.
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
        """Free the text encoders, if there are any; afterwards only prompts of the text cache or memory can be encoded."""
        return

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts, tensors (B, ...) by name; the prompt "" gives the unconditional conditioning."""

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return uninitialized tensors with the keys, shapes and dtypes of `encode_prompts` for `batch` prompts.

        The planner uses them to predict memory without loading text encoders: only configuration files are read. The tensors
        are on torch's default device. UserError for a family whose shapes are not known before the prompts are.
        """
        raise UserError(
            self.unplannable
            or f"{type(self).__name__} cannot be planned: it does not define the shapes of its conditioning"
        )

    def alike(self, conds: Sequence[Conditioning]) -> Sequence[Conditioning] | None:
        """Return the conditioning of several batches brought to equal shapes (for example by padding), or None if impossible.

        It is then concatenated for one network call. The default pads nothing. A family whose shapes depend on the prompts
        must override this: processes that hold shards of one network must make the same calls whatever their prompts are.
        """
        shapes = [{name: value.shape[1:] for name, value in cond.items()} for cond in conds]
        return conds if all(shape == shapes[0] for shape in shapes) else None

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's prediction of the velocity (noise - x0), (B, C, H, W) in float32, for noisy latents `x`."""

    @abstractmethod
    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Apply the family's timestep shift, which moves noise levels towards 1, to sigmas of any shape; 0 and 1 stay the same.

        Each sigma is shifted independently of the others.
        """

    def shift_steps(self, sigmas: Tensor) -> Tensor:
        """Return the shifted sigmas of whole rollouts (sampling runs of K steps), as the family's scheduler gives them.

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
        """Return warnings to print before training, if this teacher suits an objective with this `guidance_scale` badly."""
        return []

    @abstractmethod
    def decode_latents(self, x0: Tensor) -> Tensor:
        """Decode clean latents (B, C, H, W) into images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] into clean latents (B, C, H, W)."""

    @abstractmethod
    def enable_gradient_checkpointing(self, network: nn.Module, function: CheckpointFunction | None = None) -> None:
        """Make the network's blocks recompute activations in the backward pass: by `function(block, *arguments)`, else by torch."""

    @abstractmethod
    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write `network` as a pipeline in the family's own format, made for samples of `nfe` steps, with its model card."""

    def save_lora(self, tensors: Mapping[str, Tensor], folder: Path, nfe: int, model_card: str) -> None:
        """Write a LoRA file, the schedule of `nfe` steps and the model card into `folder`.

        `tensors` are those of `AdapterWeights.portable`: "LAYER.lora_A.weight", ..., to be applied with scale 1. UserError if
        the family has no LoRA files.
        """
        raise UserError(f"{type(self).__name__} has no LoRA files; export with --form pipeline")


@dataclass(frozen=True, eq=False)
class BoundField(VelocityField):
    """A network bound to the conditioning `cond` of a batch: a function of x and sigma that returns the velocity.

    It computes in `compute_dtype`, by autocast unless that is float32. `inputs` holds, by name, the values (B,) of inputs
    that this network has in addition to x, sigma and text (`own_inputs.py`).
    """

    backbone: Backbone
    network: nn.Module
    cond: Conditioning
    compute_dtype: torch.dtype = torch.float32
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity (B, C, H, W) in float32 for x (B, C, H, W) and sigma (B,), which stay in float32 under autocast."""
        with (
            torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32),
            giving(self.network, self.inputs),
        ):
            return self.backbone.velocity(self.network, x, sigma, self.cond).float()

    def given(self, **inputs: Tensor) -> VelocityField:
        """Return this field with these values (B,), by name, for the network's inputs beside x, sigma and text."""
        return replace(self, inputs=inputs)

    def with_features(self, x: Tensor, sigma: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the velocity, and the hidden states (B, N, D) of the image tokens after each of `blocks`, in float32.

        Blocks are numbered as `Backbone.blocks_of` lists them; negative numbers count from the end. Gradients flow through
        both results. UserError for a block that does not exist or that the network does not run.
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
        """Return the field of the samples `rows` of the batch: a slice, or a tensor of indices."""
        inputs = {name: values[rows] for name, values in self.inputs.items()}
        return replace(self, cond=select_rows(self.cond, rows), inputs=inputs)

    def join(self, others: Sequence[VelocityField]) -> VelocityField | None:
        """Return one field for the batches of this and the `others`, concatenated, so that one network call serves all.

        None if they differ in network, `compute_dtype` or names of inputs, or if their conditioning has shapes that cannot be
        made equal (`Backbone.alike`).
        """
        fields = [self, *(other for other in others if isinstance(other, BoundField) and self._is_like(other))]
        inputs = join_values([field.inputs for field in fields])
        if inputs is None or len(fields) <= len(others):
            return None
        conds = self.backbone.alike([field.cond for field in fields])
        return None if conds is None else replace(self, cond=concat(conds), inputs=inputs)

    def _is_like(self, other: "BoundField") -> bool:
        return self.network is other.network and self.compute_dtype == other.compute_dtype
