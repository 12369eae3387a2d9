"""The interface that every model family implements (`Backbone`), and a network's velocity as a function (`BoundField`).

Shapes: latents (B, C, h, w); sigma (B,) float32 in [0, 1], where 1 is noise; images (B, 3, H, W) in [0, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.anatomy import Anatomy, gather_for_backward, outputs_of, pick_blocks
from cdm_lightning.backbones.own_inputs import giving, join_values
from cdm_lightning.backbones.text_sources import Conditioning, TextCache, TextMemory
from cdm_lightning.core.flow import Rows, VelocityField, plain_guidance
from cdm_lightning.core.transfer import send
from cdm_lightning.errors import UserError

CheckpointFunction = Callable[..., Any]  # (block, *arguments) -> its result, recomputed in the backward pass


def select_rows(cond: Conditioning, rows: Rows) -> Conditioning:
    """Return the conditioning of some samples, given the conditioning `cond` of the whole batch.

    `rows` is a tensor of the samples' indices, or a slice. With a slice, the tensors are views and not copies.
    """
    if isinstance(rows, slice):
        return {name: value[rows] for name, value in cond.items()}
    return {name: value.index_select(0, send(rows, value.device)) for name, value in cond.items()}


def repeat_rows(cond: Conditioning, times: int) -> Conditioning:
    """Return the conditioning of one prompt, expanded to a batch of `times` samples without a copy."""
    return {name: value.expand(times, *value.shape[1:]) for name, value in cond.items()}


def concat(conds: Sequence[Conditioning]) -> Conditioning:
    """Concatenate the conditioning of several batches. Raises KeyError if a batch lacks a key of the first batch."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


class Backbone(Anatomy, ABC):
    """A family of pretrained flow models: its networks, text encoders, timestep shift, image codec and pipeline format."""

    text_cache: TextCache | None = None  # see `use_text_cache`
    text_memory: TextMemory | None = None  # see `use_text_memory`
    lora_targets: Mapping[str, tuple[str, ...]] = {}  # presets of LoRA targets: name suffixes of linear layers
    decode_tile: int | None = None  # images with a longer side, in pixels, are decoded in tiles; read by `setup`
    teacher_is_base: bool = True  # whether the network of `build_base` without its adapters is the teacher
    unplannable: str | None = None  # a sentence that says why the planner cannot plan this family

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of a latent."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """The height and width (H, W) of an image, in pixels."""

    def at(self, height: int | None = None, width: int | None = None) -> "Backbone":
        """Return this backbone for another image size in pixels. Parts that are already loaded are not loaded again.

        A side that is None stays the same. Raises `UserError` if the family cannot make images of this size.
        """
        own = self.image_size
        size = (own[0] if height is None else height, own[1] if width is None else width)
        if size == own:
            return self
        raise UserError(
            f"{type(self).__name__} cannot make images of {size[0]} x {size[1]} pixels; use its only size, {own[0]} x {own[1]}"
        )

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Family name and hash of the network's configuration. A run refuses a checkpoint with another fingerprint."""

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Return a trainable float32 copy of the pretrained network. All copies, in all processes, have equal weights."""

    def build_teacher(self) -> nn.Module:
        """Return the network to distil from. By default it is the pretrained network."""
        return self.build_network()

    def build_base(self) -> nn.Module:
        """Return the frozen pretrained network to which LoRA adapters are added."""
        return self.build_teacher()

    def build_empty(self, teacher: bool) -> nn.Module | None:
        """Return the teacher, or a trainable network if `teacher` is False, on the meta device without weights.

        After the network has been sharded, each process reads only its own rows of the weights, by `read_rows`. Returns
        None if the weights cannot be read like this. Each process then builds the whole network instead.
        """
        return None

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Read rows first..end-1 (dimension 0) of the pretrained weight `name` from its file, onto the CPU in the file's dtype."""
        raise KeyError(name)

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Load the frozen parts (text encoders and image codec) and move them to `device`. Later calls only move them.

        After `use_text_cache`, no text encoder is loaded, and the text cache returns its conditioning on `device`.
        """

    @property
    def text_fingerprint(self) -> dict[str, str]:
        """A dictionary with the settings that affect text conditioning and a hash of each text encoder and tokenizer.

        A run refuses a text cache with another fingerprint. Raises `UserError` for a family without text encoders.
        """
        raise UserError(
            f"{type(self).__name__} has no text encoder, so it needs no text cache; set text_cache.folder=null"
        )

    def use_text_cache(self, cache: TextCache) -> None:
        """Take all text conditioning from `cache` from now on. Call this before `setup`."""
        self.text_cache = cache
        self.encode_prompts = cache.encode  # the instance attribute hides the method of the class

    def use_text_memory(self, memory: TextMemory) -> None:
        """Take all text conditioning from `memory` from now on.

        `memory` must compute the conditioning of a prompt by this backbone's `encode_prompts`.
        """
        self.text_memory, self.encode_prompts = memory, memory.encode

    def text_encoders(self) -> list[nn.Module]:
        """Return the text encoders. They are on the device that was passed to `setup`."""
        return []

    def drop_text_encoders(self) -> None:
        """Free the text encoders. Until the next `setup`, only prompts in the text cache or memory can be encoded."""
        return

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text conditioning of B prompts: tensors (B, ...) by name. The prompt "" is the unconditional prompt."""

    def blank_conditioning(self, batch: int) -> Conditioning:
        """Return uninitialized tensors with the names, shapes and dtypes of the conditioning of `batch` prompts.

        The planner uses the tensors to predict memory. Only configuration files are read, and the tensors are on
        torch's default device. Raises `UserError` if the shapes depend on the prompts.
        """
        raise UserError(
            self.unplannable
            or f"the planner cannot plan {type(self).__name__}, because its conditioning depends on the prompts; choose another"
        )

    def alike(self, conds: Sequence[Conditioning]) -> Sequence[Conditioning] | None:
        """Bring the conditioning of several batches to equal shapes, for example by padding. Return None if this is impossible.

        Conditioning of equal shapes can be concatenated for a single network call. By default nothing is padded. A
        family whose shapes depend on the prompts must override this method, because all processes that share a sharded
        network must make the same number of network calls, whatever their prompts are.
        """
        shapes = [{name: value.shape[1:] for name, value in cond.items()} for cond in conds]
        return conds if all(shape == shapes[0] for shape in shapes) else None

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (noise - x0) that `network` predicts for noisy latents `x`: (B, C, h, w), float32."""

    @abstractmethod
    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Apply the family's timestep shift to sigmas of any shape. The shift moves sigmas towards 1; 0 and 1 stay the same.

        Each sigma is shifted on its own, whatever the others are.
        """

    def shift_steps(self, sigmas: Tensor) -> Tensor:
        """Return the shifted sigmas of rollouts (sampling runs of K steps), as the family's scheduler computes them.

        `sigmas` (..., K) are unshifted and decreasing, without the final 0. By default, `shift_sigmas` shifts them. A
        family whose scheduler also rescales each rollout to a fixed last sigma overrides this method.
        """
        return self.shift_sigmas(sigmas)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Combine a conditional and an unconditional velocity (B, C, h, w) by guidance, as the family's pipeline does.

        Scale 1 always means no guidance. Only evaluation uses this method; objectives compute guidance themselves.
        """
        return plain_guidance(cond, uncond, scale)

    def cautions(self, guidance_scale: float) -> list[str]:
        """Return warnings to print before training if the teacher does not suit an objective with `guidance_scale`."""
        return []

    @abstractmethod
    def decode_latents(self, x0: Tensor) -> Tensor:
        """Decode clean latents (B, C, h, w) into images (B, 3, H, W) in [0, 1]. Gradients flow back to `x0`."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] into clean latents (B, C, h, w)."""

    @abstractmethod
    def enable_gradient_checkpointing(self, network: nn.Module, function: CheckpointFunction | None = None) -> None:
        """Switch on gradient checkpointing in `network`.

        From now on, `function(block, *arguments)` runs each block. By default, `function` is torch's `checkpoint`.
        """

    @abstractmethod
    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write into `folder` a pipeline whose network is `network`, and the text `model_card`.

        The pipeline is for sampling in `nfe` steps.
        """

    def rehearse_export(self, folder: Path, nfe: int, model_card: str) -> None:
        """Write the files of `save_pipeline` except weights, to find errors before training. By default, write nothing."""
        return

    def save_lora(self, tensors: Mapping[str, Tensor], folder: Path, nfe: int, model_card: str) -> None:
        """Write into `folder` a LoRA file, a scheduler for sampling in `nfe` steps, and the text `model_card`.

        `tensors` are the LoRA's tensors by name, as `AdapterWeights.portable` returns them. They already include the
        LoRA's scale, so the file must be loaded with scale 1. Raises `UserError` if the family has no LoRA files.
        """
        raise UserError(f"{type(self).__name__} cannot be exported as a LoRA file; export with --form pipeline")


@dataclass(frozen=True, eq=False)
class BoundField(VelocityField):
    """A network together with the text conditioning `cond` of a batch: a function of x and sigma that returns the velocity.

    The network computes in `compute_dtype`, by autocast unless `compute_dtype` is float32. `inputs` maps the names
    of the network's additional inputs (see `own_inputs.py`) to their values (B,).
    """

    backbone: Backbone
    network: nn.Module
    cond: Conditioning
    compute_dtype: torch.dtype = torch.float32
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity (B, C, h, w) in float32 for x (B, C, h, w) and sigma (B,). Sigma stays in float32."""
        with (
            torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32),
            giving(self.network, self.inputs),
        ):
            return self.backbone.velocity(self.network, x, sigma, self.cond).float()

    def given(self, **inputs: Tensor) -> VelocityField:
        """Return a copy of this field in which the network's additional inputs have fixed values.

        `inputs` maps the name of each additional input to its values (B,).
        """
        return replace(self, inputs=inputs)

    def with_features(self, x: Tensor, sigma: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the velocity, and the hidden states (B, N, D) of the image tokens after each of `blocks`, in float32.

        Blocks are numbered as in `Backbone.blocks_of`; negative numbers count from the end. Gradients flow through both
        results. Raises `UserError` for a block that does not exist or that the network does not run.
        """
        picked = pick_blocks(self.backbone.blocks_of(self.network), blocks)
        with outputs_of(picked) as outputs:
            velocity = self(x, sigma)
        idle = [number for number, block in zip(blocks, picked) if block not in outputs]
        if idle:
            raise UserError(
                f"the network does not run block {idle[0]}; set objective.feature_blocks to blocks that it runs"
            )
        features = [self.backbone.features_after(outputs[block]).float() for block in picked]
        for each in features:
            gather_for_backward(self.network, each)
        return velocity, features

    def select(self, rows: Rows) -> VelocityField:
        """Return this field for some samples of the batch. `rows` is a slice, or a tensor of the samples' indices."""
        inputs = {name: values[rows] for name, values in self.inputs.items()}
        return replace(self, cond=select_rows(self.cond, rows), inputs=inputs)

    def join(self, others: Sequence[VelocityField]) -> VelocityField | None:
        """Return one field for the concatenated batches of this field and `others`, so that one network call serves them all.

        Returns None if the fields differ in network, `compute_dtype` or names of inputs, or if their conditioning cannot be
        brought to equal shapes (see `Backbone.alike`).
        """
        mine = self.network, self.compute_dtype
        fields = [self, *(o for o in others if isinstance(o, BoundField) and (o.network, o.compute_dtype) == mine)]
        inputs = join_values([field.inputs for field in fields])
        if inputs is None or len(fields) <= len(others):
            return None
        conds = self.backbone.alike([field.cond for field in fields])
        return None if conds is None else replace(self, cond=concat(conds), inputs=inputs)
