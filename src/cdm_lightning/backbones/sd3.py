"""Stable Diffusion 3 and 3.5: diffusers' own classes behind the `Backbone` interface.

Shapes: B batch, (C, h, w) latent, N text tokens (CLIP then T5), D their width, P width of the pooled text.
What the stock pipeline does is asked of the stock pipeline: it encodes prompts, its scheduler shifts sigmas, its image
processor maps pixels. Training therefore sees what `pipe(prompt)` will see.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from cdm_lightning.backbones.baked_schedule import UNBAKED, require_static_shift
from cdm_lightning.backbones.base import Backbone, Conditioning
from cdm_lightning.backbones.compact_text import use_compact_padding
from cdm_lightning.backbones.pipeline_folder import hash_part, loading, locate_pipeline
from cdm_lightning.backbones.sd3_folder import write_pipeline
from cdm_lightning.backbones.sd3_text import PromptEncoder
from cdm_lightning.errors import UserError

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
PARTS = ("transformer", "scheduler", "vae", *TEXT_PARTS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SD3Backbone(Backbone):
    """A `StableDiffusion3Pipeline`, from a local folder or a hub id; nothing is read before it is needed.

    `height`, `width` are pixels (default: the pipeline's own). `compact_text=k` folds T5 padding after the first k T5
    tokens (see `compact_text.py`); None is the stock path. `teacher_dtype` is the dtype of the frozen teacher,
    `text_dtype` that of the text encoders; the trained network and the VAE are float32.
    """

    block_types = (JointTransformerBlock,)

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 256,
        compact_text: int | None = None,
        teacher_dtype: str = "float32",
        text_dtype: str = "float32",
    ) -> None:
        if not 1 <= max_sequence_length <= 512:
            raise UserError(f"max_sequence_length={max_sequence_length}: SD3 takes 1 to 512 T5 tokens")
        self.pretrained = str(pretrained)
        self.revision = revision
        self.height = height
        self.width = width
        self.max_sequence_length = max_sequence_length
        self.compact_text = compact_text
        self.teacher_dtype = dtype_of("teacher_dtype", teacher_dtype)
        self.text_dtype = dtype_of("text_dtype", text_dtype)

    # ---- what the folder says, before any weight is read

    @cached_property
    def folder(self) -> Path:
        """The pipeline's folder on this machine, downloaded if `pretrained` is a hub id; UserError if it is unfit."""
        return locate_pipeline(self.pretrained, self.revision, StableDiffusion3Pipeline, PARTS)

    @cached_property
    def network_config(self) -> dict:
        """Arguments of the transformer's constructor."""
        with loading(self.folder / "transformer"):
            config = SD3Transformer2DModel.load_config(self.folder, subfolder="transformer")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @cached_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler that the pipeline was trained with; an exported folder keeps it beside the baked one."""
        subfolder = UNBAKED if (self.folder / UNBAKED).is_dir() else "scheduler"
        with loading(self.folder / subfolder):
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder=subfolder)
        require_static_shift(scheduler, self.pretrained)
        return scheduler

    @cached_property
    def vae_factor(self) -> int:
        """Pixels per latent along one side."""
        with loading(self.folder / "vae"):
            config = AutoencoderKL.load_config(self.folder, subfolder="vae")
        return 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels; UserError if the transformer cannot cut them into patches."""
        native = self.network_config["sample_size"] * self.vae_factor
        unit = self.network_config["patch_size"] * self.vae_factor
        largest = self.network_config["pos_embed_max_size"] * unit
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (side % unit or not 0 < side <= largest):
                raise UserError(
                    f"{name}={side} does not fit {self.pretrained}: use a multiple of {unit} up to {largest}"
                )
        return self.height or native, self.width or native

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        height, width = self.image_size
        return self.network_config["in_channels"], height // self.vae_factor, width // self.vae_factor

    @property
    def fingerprint(self) -> str:
        """Family and a hash of the transformer's configuration: networks with equal fingerprints exchange weights."""
        config = json.dumps(self.network_config, sort_keys=True)
        return f"sd3-{hashlib.blake2b(config.encode(), digest_size=8).hexdigest()}"

    # ---- networks

    def build_network(self) -> nn.Module:
        """The pretrained transformer, float32 and trainable; the same at every call."""
        return self._load_network(torch.float32).requires_grad_(True).train()

    def build_teacher(self) -> nn.Module:
        """The pretrained transformer, frozen, in `teacher_dtype`."""
        return self._load_network(self.teacher_dtype).requires_grad_(False).eval()

    def _load_network(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        where = self.folder / "transformer"
        with loading(where):
            network, report = SD3Transformer2DModel.from_pretrained(
                self.folder, subfolder="transformer", dtype=dtype, output_loading_info=True
            )
        if report["missing_keys"]:  # diffusers would fill them with random numbers
            raise UserError(f"{where} lacks the weights {report['missing_keys'][0]}; copy the folder again")
        if self.compact_text is not None:
            use_compact_padding(network, self._codec.tokenizer_max_length + self.max_sequence_length)
        return network

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        """Recompute each block in the backward pass."""
        network.enable_gradient_checkpointing()

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), sigma (B,) -> velocity (B, C, h, w) float32; the timestep stays float32, never rounded."""
        dtype = network.dtype
        output = network(
            hidden_states=x.to(dtype),
            timestep=sigma.float() * self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output.float()

    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Unshifted sigmas of any shape -> what the scheduler makes of them, float32, same shape and device."""
        self.scheduler.set_timesteps(sigmas=sigmas.detach().to("cpu", torch.float32).flatten().numpy())
        return self.scheduler.sigmas[:-1].reshape(sigmas.shape).to(sigmas.device)

    # ---- frozen parts

    @cached_property
    def _codec(self) -> StableDiffusion3Pipeline:
        """VAE, image processor and the tokenizer that says how many tokens CLIP gives; no text encoder."""
        return self._load_parts(**dict.fromkeys(part for part in TEXT_PARTS if part != "tokenizer"))

    @cached_property
    def _text(self) -> PromptEncoder:
        return self._new_prompt_encoder()

    @cached_property
    def _text_parts(self) -> StableDiffusion3Pipeline:
        """Text encoders and tokenizers."""
        return self._load_parts(vae=None)

    def _load_parts(self, **without: None) -> StableDiffusion3Pipeline:
        """The pipeline with neither transformer nor the parts `without`, frozen and in eval mode (T5 has dropout)."""
        dtypes = {"vae": torch.float32, "default": self.text_dtype}
        with loading(self.folder):
            pipeline = StableDiffusion3Pipeline.from_pretrained(self.folder, transformer=None, dtype=dtypes, **without)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        return pipeline

    def _new_prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self._text_parts, self.max_sequence_length, self.compact_text, name=self.pretrained)

    def setup(self, device: torch.device) -> None:
        """Load VAE and, without a text cache, text encoders onto `device`; UserError for `compact_text` that cannot be."""
        self._codec.to(device)
        if self.text_cache is not None:
            self.text_cache.to(device)
            return
        self._text_parts.to(device)
        self._text = self._new_prompt_encoder()  # the old one's empty prompt lies on the old device

    @property
    def text_fingerprint(self) -> dict[str, str]:
        """Hashes of the text encoders and tokenizers, and the settings of text encoding."""
        settings = {
            "max_sequence_length": str(self.max_sequence_length),
            "compact_text": str(self.compact_text),
            "text_dtype": str(self.text_dtype).removeprefix("torch."),
        }
        return {"family": "sd3", **{part: hash_part(self.folder / part) for part in TEXT_PARTS}, **settings}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Texts -> {"prompt_embeds": (B, N, D), "pooled": (B, P)} float32; "" is the unconditional prompt."""
        return self._text.encode(prompts)

    # ---- images

    @torch.no_grad()
    def decode_latents(self, x0: Tensor) -> Tensor:
        """x0 (B, C, h, w) -> images (B, 3, H, W) in [0, 1], by the arithmetic of the stock pipeline."""
        vae = self._codec.vae
        latents = (x0.float() / vae.config.scaling_factor) + vae.config.shift_factor
        return self._codec.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pt")

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> x0 (B, C, h, w): the mean of the VAE's posterior, scaled and shifted."""
        vae = self._codec.vae
        latents = vae.encode(images.float() * 2 - 1).latent_dist.mode()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def save_pipeline(self, network: nn.Module, folder: Path, nfe: int, model_card: str) -> None:
        """Write a `StableDiffusion3Pipeline` whose plain call with `nfe` steps is this network on its own sigmas."""
        sizes = {} if self.max_sequence_length == 256 else {"max_sequence_length": self.max_sequence_length}
        if (self.height, self.width) != (None, None):
            sizes["height"], sizes["width"] = self.image_size
        write_pipeline(self.folder, network, self.scheduler, Path(folder), nfe, model_card, sizes)


def dtype_of(argument: str, name: str) -> torch.dtype:
    """The dtype of that name; UserError for another than `DTYPES`."""
    if name not in DTYPES:
        raise UserError(f"{argument} must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
