"""Stage 2 of `cdm_lightning.pretrain`: train the tiny SD3 pipeline's transformer and text encoders by flow matching.

Latents have the shape (B, C, h, w). The CLIP encoders read L tokens of a caption: 12 in the tiny pipeline, 16 in the
storybook pipeline. T5 reads `keep + 1` tokens, of which at least the last is padding. SD3 pads to 256 T5 tokens; here,
the last token stands for all the padding from its place on. This gives the same velocities, because this T5 has no
positions (see `backbones.compact_text`).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import T5EncoderModel

from cdm_lightning.backbones.compact_text import use_compact_padding
from cdm_lightning.core.flow import interpolate
from cdm_lightning.data.shapes import draw_scenes, render
from cdm_lightning.kinds import Count, Finite, Positive, Share, Tokens
from cdm_lightning.pretraining.loop import Recipe, optimise

T5_TOKENS = 256  # the length to which the stock pipeline pads
CHUNK = 1024


@dataclass(frozen=True)
class Captioned:
    """N latents (N, C, h, w), and the token ids of their captions: CLIP ids (N + 1, L) and T5 ids (N + 1, keep + 1).

    A caption has L CLIP tokens, and at most `keep` T5 tokens before its padding. The last row of both tensors of ids is
    the empty caption, which caption dropout puts in place of a caption.
    """

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


class TextConditioned(nn.Module):
    """All trained networks of `pipeline` in one module, so that they can be trained as one network.

    The networks are the transformer, the two CLIP encoders and T5.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.clip = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
        self.t5 = pipeline.text_encoder_3
        use_compact_padding(self.transformer, pipeline.tokenizer_max_length + T5_TOKENS)

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Return the velocity (B, C, h, w) at the latents `x` (B, C, h, w) and the noise levels `sigma` (B,).

        `clip_ids` (B, L) are L CLIP tokens of each caption, and `t5_ids` (B, keep + 1) are its T5 tokens, the last one
        padding.
        """
        embeds, pooled = self.encode(clip_ids, t5_ids)
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text embeddings (B, L + keep + 1, D) and the pooled embeddings (B, P) of B captions.

        `clip_ids` (B, L) are L CLIP tokens of each caption, and `t5_ids` (B, keep + 1) are its T5 tokens, the last one
        padding. The embeddings are those of SD3's `encode_prompt`, but with gradients, and the last T5 token stands for
        all the padding from its place on.
        """
        outputs = [clip(clip_ids, output_hidden_states=True) for clip in self.clip]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        t5 = encode_compact(self.t5, t5_ids, T5_TOKENS)
        hidden = nn.functional.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
        return torch.cat([hidden, t5], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


def encode_compact(t5: T5EncoderModel, ids: Tensor, full_length: int) -> Tensor:
    """Return the embeddings (B, N, D) that a T5 without positions gives for the token ids (B, N).

    The last token of each row must be padding. T5's attention counts it as `full_length - N + 1` tokens, so the result
    is that of a text that is padded to `full_length` tokens.
    """
    count = ids.shape[1]
    mask = torch.zeros(len(ids), 1, 1, count)
    mask[..., -1] = math.log(full_length - count + 1)
    return t5(ids, attention_mask=mask.expand(-1, -1, count, -1))[0]


def tokenise(pipeline: StableDiffusion3Pipeline, captions: list[str], keep: int) -> tuple[Tensor, Tensor]:
    """Return the CLIP ids (N, L) and the T5 ids (N, keep + 1) of N captions.

    L is the length to which the CLIP tokenizers pad. The last T5 id of each caption is padding. Raises ValueError if a
    caption has more than `keep` T5 tokens.
    """
    longest = max(len(ids) for ids in pipeline.tokenizer_3(captions).input_ids)
    if longest > keep:
        raise ValueError(f"a caption has {longest} T5 tokens, more than keep={keep}; raise keep")
    clip = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    t5 = pipeline.tokenizer_3(captions, padding="max_length", max_length=keep + 1, return_tensors="pt").input_ids
    return clip, t5


@torch.no_grad()
def captioned_latents(pipeline: StableDiffusion3Pipeline, count: int, seed: int, keep: int, pairs: float) -> Captioned:
    """Choose `count` training captions at random, render each once, and return the latents and the captions' token ids.

    The token ids of the empty caption follow those of the captions. A rendering shows two shapes with probability
    `pairs`, and otherwise one. A caption may have at most `keep` T5 tokens. All random draws depend on `seed` only.
    """
    scenes = draw_scenes(count, seed, "train", pairs=pairs)
    vae, latents = pipeline.vae, []
    for begin in range(0, count, CHUNK):
        images = render(scenes[begin : begin + CHUNK], seed + 1 + begin).to(memory_format=torch.channels_last)
        mean = vae.encode(images * 2 - 1).latent_dist.mean
        latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).contiguous())
    return Captioned(torch.cat(latents), *tokenise(pipeline, [*(scene.caption for scene in scenes), ""], keep))


def train_teacher(
    pipeline: StableDiffusion3Pipeline,
    recipe: Recipe,
    folder: Path,
    *,
    count: Count = 98304,
    keep: Tokens = 11,
    pairs: Share = 0.0,
    caption_dropout: Share = 0.1,
    sigma_mean: Finite = 0.4,
    sigma_std: Positive = 1.2,
    compile_network: bool = True,
) -> StableDiffusion3Pipeline:
    """Train the pipeline's transformer and text encoders in place by flow matching, and return the frozen pipeline.

    The data are `count` training captions, each with one rendering, which shows two shapes with probability `pairs` and
    otherwise one. A caption may have at most `keep` T5 tokens. In each batch, a caption is replaced by the empty
    caption with probability `caption_dropout`. Sigma is the sigmoid of a normal random number with mean `sigma_mean`
    and standard deviation `sigma_std` (SD3, arXiv:2403.03206). With `compile_network`, torch.compile compiles the
    transformer. The state of the training is saved in `folder`, from which an interrupted training resumes.
    """

    def data() -> Captioned:
        return captioned_latents(pipeline, count, recipe.seed, keep, pairs)

    noise = NoiseLevels(caption_dropout, sigma_mean, sigma_std)
    return fit_teacher(pipeline, recipe, folder, data, noise, compile_network)


@dataclass(frozen=True)
class NoiseLevels:
    """The random draws in the teacher's training: which captions are dropped, and which sigmas are used.

    A caption is replaced by the empty caption with probability `caption_dropout`. Sigma is the sigmoid of a normal
    random number with mean `mean` and standard deviation `std`.
    """

    caption_dropout: float = 0.1
    mean: float = 0.4
    std: float = 1.2


def fit_teacher(
    pipeline: StableDiffusion3Pipeline,
    recipe: Recipe,
    folder: Path,
    data: Callable[[], Captioned],
    levels: NoiseLevels,
    compile_network: bool,
    save_every: int = 1000,
) -> StableDiffusion3Pipeline:
    """Train `pipeline` in place on the latents and captions that `data()` returns, and return the frozen pipeline.

    The transformer and the text encoders are trained. `levels` says how captions are dropped and sigmas are drawn. With
    `compile_network`, torch.compile compiles the transformer. The state of the training is saved in `folder` after
    every `save_every` iterations, and an interrupted training resumes from it. If an earlier call has finished the
    training, `data` is not called.
    """
    model = TextConditioned(pipeline).train().requires_grad_(True)
    if compile_network:
        model.transformer.compile()
    relative_positions = pipeline.text_encoder_3.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    relative_positions.requires_grad_(False)  # it stays zero; see backbones.compact_text
    captioned = functools.cache(data)  # takes minutes

    def loss(iteration: int, rng: torch.Generator) -> Tensor:
        size, shown = recipe.batch_size, captioned()
        count = len(shown.latents)
        rows = torch.randint(count, (size,), generator=rng)
        x0, noise = shown.latents[rows].float(), torch.randn(size, *shown.latents.shape[1:], generator=rng)
        sigma = torch.sigmoid(levels.mean + levels.std * torch.randn(size, generator=rng))
        captions = torch.where(torch.rand(size, generator=rng) < levels.caption_dropout, count, rows)
        velocity = model(interpolate(x0, noise, sigma), sigma, shown.clip_ids[captions], shown.t5_ids[captions])
        return (velocity - (noise - x0)).square().mean()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimise("teacher", model, loss, recipe, folder=folder, train=trained, save_every=save_every)
    model.eval().requires_grad_(False)
    return pipeline
