"""The base class of all backbones for diffusers pipelines. Shapes: B batch, (C, h, w) latent, (H, W) pixels.

Prompts, sigmas and pixels are converted by the pipeline's own text encoders, scheduler and codec, as in `pipe(prompt)`.
"""

import gc
import sys
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import Tensor, nn

from cdm_lightning.backbones.base import CheckpointFunction, Conditioning
from cdm_lightning.backbones.frozen_parts import decode_sparingly, keep_last_state_only, modules_of
from cdm_lightning.backbones.loaded_weights import load_model, model_class, require_names
from cdm_lightning.backbones.lora_file import fused_network
from cdm_lightning.backbones.pipeline_folder import hash_part, loading, read_index
from cdm_lightning.backbones.pipeline_settings import DTYPES, PipelineSettings, shared_property
from cdm_lightning.backbones.plain_scheduler import from_config
from cdm_lightning.backbones.student_folder import OwnLoRA, StudentCall, rehearse_pipeline, write_lora, write_pipeline
from cdm_lightning.backbones.transformer_files import TransformerFiles
from cdm_lightning.backbones.whole_folder import pairs_of, parts_of, require_contents, require_known_tokens
from cdm_lightning.core.schedules import inference_sigmas
from cdm_lightning.errors import UserError

TRIED = 8  # latents along one side of the image that is decoded to try the codec


class PipelineBackbone(PipelineSettings):
    """The backbone of a diffusers pipeline. `PipelineSettings` describes the arguments. Files are read when needed."""

    has_language_head: ClassVar[bool] = False  # whether the text encoder is a whole language model
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}  # call arguments for one network call per step
    notes: ClassVar[tuple[str, ...]] = ("`guidance_scale` is 0 or 1: one network call a step.",)  # for the model card

    # ---- networks

    def build_network(self) -> nn.Module:
        """Return the pretrained transformer, trainable and in float32. Every call returns a new copy with equal weights."""
        return self._finished(self._load_network(torch.float32)).requires_grad_(True).train()

    def build_teacher(self) -> nn.Module:
        """Return the pretrained transformer, frozen, in `teacher_dtype`."""
        return self._finished(self._load_network(DTYPES[self.teacher_dtype])).requires_grad_(False).eval()

    def _finished(self, network: nn.Module) -> nn.Module:
        """Change how the loaded transformer computes, if the family needs this, and return it."""
        return network

    def build_empty(self, teacher: bool) -> nn.Module | None:
        """Return the teacher, or a trainable transformer if `teacher` is False, with its weights on the meta device.

        The buffers have their values. Returns None after `leave_weights_out`, and if the stored weights would have to
        be changed (`teacher_lora` is set, or the class keeps some weights in float32). Raises `UserError` if the files
        lack a weight or have a weight that the transformer lacks.
        """
        if not self.has_weights or self.teacher_lora is not None or self.transformer_class._keep_in_fp32_modules:
            return None
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            network = self._skeleton()
        network = network.to(DTYPES[self.teacher_dtype] if teacher else torch.float32)
        own, stored = dict(network.named_parameters()).keys(), set(self._files.names)
        unexpected = stored - own - dict(network.named_buffers()).keys()
        require_names(network, own - stored, unexpected, self.folder / "transformer")
        for name, buffer in network.named_buffers():
            if name in self._files.names:
                buffer.copy_(self._files.tensor(name))
        return self._finished(network).requires_grad_(not teacher).train(not teacher)

    @shared_property
    def _files(self) -> TransformerFiles:
        return TransformerFiles(str(self.folder))

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Read rows first..end-1 of the weight `name` from its safetensors file, onto the CPU in the file's dtype."""
        return self._files.rows(name, first, end)

    def _load_network(self, dtype: torch.dtype) -> nn.Module:
        if not self.has_weights:
            with torch.device("meta"):
                return self._skeleton().to(dtype)
        if self.teacher_lora is None:
            return self._load_pretrained(dtype)
        sizes = (self.teacher_lora, self.teacher_lora_scale, dtype)
        return fused_network(self.pipeline_class, self._load_pretrained, self._skeleton, *sizes)

    def _skeleton(self) -> nn.Module:
        network: Any = self.transformer_class  # its type does not declare `from_config`
        return network.from_config(dict(self.network_config))

    def _load_pretrained(self, dtype: torch.dtype) -> nn.Module:
        require_contents(self.folder, {"transformer": self.transformer_class.__name__})
        return load_model(self.transformer_class, self.folder / "transformer", dtype)

    def enable_gradient_checkpointing(self, network: nn.Module, function: CheckpointFunction | None = None) -> None:
        """Switch on gradient checkpointing: `function(block, *arguments)`, or torch's `checkpoint`, runs each block."""
        cast(ModelMixin, network).enable_gradient_checkpointing(function)

    # ---- sigmas

    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Apply the scheduler's timestep shift to sigmas of any shape. The result is float32, with the same shape and device."""
        given = sigmas.detach().to("cpu", torch.float32).flatten().numpy()
        with np.errstate(divide="ignore"):  # the dynamic shift divides by sigma; the result at 0 is still right
            self._shift.set_timesteps(sigmas=given, mu=self._mu)
        return self._shift.sigmas[:-1].reshape(sigmas.shape).to(sigmas.device)

    def shift_steps(self, sigmas: Tensor) -> Tensor:
        """Shift the decreasing sigmas (..., K) of rollouts of K steps, as the pipeline's scheduler does.

        If the scheduler has a `shift_terminal`, the sigmas of each rollout are also rescaled so that the last one is
        `shift_terminal`. A rollout whose only sigma is 1 stays unchanged, because rescaling it would divide 0 by 0.
        """
        shifted, terminal = self.shift_sigmas(sigmas), self.scheduler.config.shift_terminal
        if not terminal or not shifted.numel():
            return shifted
        scale = (1 - shifted[..., -1:]) / (1 - terminal)
        return torch.where(scale > 0, 1 - (1 - shifted) / scale, shifted)

    @shared_property
    def _shift(self) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler without `shift_terminal`. It shifts each sigma on its own, whatever the others are."""
        return from_config(self.scheduler.config, shift_terminal=None)

    @property
    def _mu(self) -> float | None:
        """The strength of a dynamic shift for this image size, from the pipeline's own function. None for a static shift."""
        config, (_, height, width) = self.scheduler.config, self.latent_shape
        if not config.use_dynamic_shifting:
            return None
        tokens = (height // self.patch) * (width // self.patch)
        bounds = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return sys.modules[self.pipeline_class.__module__].calculate_shift(tokens, *bounds)

    # ---- frozen parts

    @shared_property
    def _codec(self) -> DiffusionPipeline:
        """The image codec and image processor, without the text encoders."""
        return self._load_parts(self.text_parts)

    @shared_property
    def _text_parts(self) -> DiffusionPipeline:
        """The text encoders and tokenizers, without the image codec."""
        parts = self._load_parts(["vae"])
        if self.has_language_head:
            keep_last_state_only(parts.text_encoder)
        return parts

    def _load_parts(self, without: Iterable[str]) -> DiffusionPipeline:
        """Load all parts except the transformer and those in `without`. The models are frozen and in eval mode."""
        left_out = dict.fromkeys(["transformer", *without])
        index = read_index(self.folder, self.pretrained)
        parts = {name: kind for name, kind in parts_of(index).items() if name not in left_out}
        require_contents(self.folder, parts)
        models = {part: self._load_model(part, kind) for part in parts if (kind := model_class(*index[part]))}
        try:
            pipeline = self._from_files(self.folder, left_out | models)
        except UserError:
            for part in parts.keys() - models.keys():  # the error does not say which part it is about
                self._from_files(self.folder / part, left_out | dict.fromkeys(parts.keys() - {part}))
            raise
        for part in modules_of(pipeline):
            part.eval().requires_grad_(False)
        for tokenizer, encoder in pairs_of([part for part in self.parts if part not in left_out]):
            with loading(self.folder / tokenizer):
                require_known_tokens(getattr(pipeline, tokenizer), getattr(pipeline, encoder), self.folder / tokenizer)
        return pipeline

    def _load_model(self, part: str, kind: type[Any]) -> nn.Module:
        return load_model(kind, self.folder / part, torch.float32 if part == "vae" else DTYPES[self.text_dtype])

    def _from_files(self, blamed: Path, given: Mapping[str, nn.Module | None]) -> DiffusionPipeline:
        """Load the pipeline with the parts in `given`; None leaves a part out. Error messages name the path `blamed`."""
        with loading(blamed):
            return self.pipeline_class.from_pretrained(self.folder, **given)

    def setup(self, device: torch.device) -> None:
        """Load the image codec and the text encoders, and move them to `device`. With a text cache, no text encoder is loaded.

        As a test, the codec decodes a small latent and the text encoders encode "". Raises `UserError` if this fails.
        """
        self._codec.to(device)
        decode_sparingly(self._codec.vae, self.decode_tile)
        with loading(self.folder / "vae"):
            self.decode_latents(torch.zeros(1, self.latent_channels, TRIED, TRIED, device=device))
        if self.text_cache is not None:
            self.text_cache.to(device)
            return
        self._text_parts.to(device)
        self.shared.pop("_unconditional", None)  # it is still on the old device
        if self.text_memory is not None:
            self.text_memory.forget()
        with loading(self.folder / "text_encoder"):
            _ = self._unconditional

    def text_encoders(self) -> list[nn.Module]:
        """Return the text encoders, and load them first if necessary. `setup` moves them to its `device`."""
        return modules_of(self._text_parts)

    def drop_text_encoders(self) -> None:
        """Free the text encoders and their GPU memory. A later `setup` loads them again."""
        self.shared.pop("_text_parts", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The names of the pipeline's text encoders, tokenizers and text processors, such as "text_encoder_2"."""
        return tuple(part for part in self.parts if part not in ("transformer", "scheduler", "vae"))

    @property
    def text_fingerprint(self) -> dict[str, str]:
        """A dictionary of "family", "max_sequence_length", "text_dtype", and a hash for each name in `text_parts`."""
        settings = {"max_sequence_length": str(self.max_sequence_length), "text_dtype": self.text_dtype}
        hashes = {part: hash_part(self.folder / part) for part in self.text_parts}
        return {"family": self.title.lower(), **hashes, **settings}

    @shared_property
    def _unconditional(self) -> Conditioning:
        """The text conditioning of the empty prompt (B = 1). It is encoded only once."""
        return self._encode([""])

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text conditioning of B prompts, in float32. The prompt "" is the unconditional prompt."""
        if any(prompts):
            return self._encode(list(prompts))
        return {name: value.repeat_interleave(len(prompts), dim=0) for name, value in self._unconditional.items()}

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Encode B prompts by the pipeline's own `encode_prompt`."""

    # ---- images: the arithmetic of `AutoencoderKL`, which most families have

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Decode clean latents x0 (B, C, h, w) into images (B, 3, H, W) in [0, 1], as the stock pipeline does."""
        vae = self._codec.vae
        latents = (x0.float() / vae.config.scaling_factor) + vae.config.shift_factor
        return self._codec.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pt")

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] into latents (B, C, h, w): the scaled mode of the VAE's posterior."""
        vae = self._codec.vae
        latents = vae.encode(images.float() * 2 - 1).latent_dist.mode()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    # ---- export

    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write into `folder` a pipeline whose transformer is `network`, and its model card.

        The card is `model_card` and a section "Usage". In `nfe` steps, the pipeline uses the sigmas of training.
        """
        write_pipeline(self.folder, network, Path(folder), model_card, self._student_call(nfe))

    def rehearse_export(self, folder: Path, nfe: int, model_card: str) -> None:
        """Write the files of `save_pipeline` except weights and copied parts, and check that the parts can be read."""
        rehearse_pipeline(self.folder, Path(folder), model_card, self._student_call(nfe))

    def save_lora(self, tensors: Mapping[str, Tensor], folder: Path, nfe: int, model_card: str) -> None:
        """Write into `folder` a LoRA file, a scheduler for `nfe` steps, and `model_card` plus a section "Usage"."""
        own = None if self.teacher_lora is None else OwnLoRA(Path(self.teacher_lora).name, self.teacher_lora_scale)
        write_lora(self.pipeline_class, tensors, Path(folder), model_card, self._student_call(nfe), own)

    def _student_call(self, nfe: int) -> StudentCall:
        return StudentCall(
            pipeline=self.pipeline_class.__name__,
            scheduler=self.scheduler,
            exported=self.exported_scheduler(nfe),
            sigmas=inference_sigmas(nfe, self.shift_steps),
            arguments={"num_inference_steps": nfe, **self.unguided, **self.call_sizes()},
            notes=(*self.notes, *self._guidance_notes()),
        )

    def _guidance_notes(self) -> list[str]:
        """Return a warning for each argument in `unguided` whose default in the pipeline switches guidance on."""
        defaults = {name: self.call_default(name) for name in self.unguided}
        return [
            f"Pass `{name}={value}` in every call: the pipeline's default, {defaults[name]}, is guidance for the original "
            "network. It doubles the network calls and ruins the images of a student."
            for name, value in self.unguided.items()
            if isinstance(value, float) and defaults[name] not in (None, value)
        ]

    def exported_scheduler(self, nfe: int) -> FlowMatchEulerDiscreteScheduler | FlowMapEulerDiscreteScheduler:
        """Return the scheduler with which an exported pipeline uses the sigmas of training when it takes `nfe` steps.

        By default it is the original scheduler. A family must override this method if its pipeline does not pass the
        unshifted sigmas 1, 1 - 1/nfe, ..., 1/nfe to its scheduler.
        """
        return self.scheduler
