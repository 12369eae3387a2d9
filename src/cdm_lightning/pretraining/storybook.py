"""The storybook pipeline: a real `StableDiffusion3Pipeline` for scenes of 64 x 64 pixels.

Its networks have the same diffusers and transformers classes as those of SD3-Medium, but are small.

The VAE has factor 8 and 16 latent channels like SD3's, so latents have 16 channels of 8 x 8. The transformer reads them
as 16 patches of 2 x 2. A patch has 64 numbers. The transformer must be much wider than 64, because a velocity contains
the noise itself: all 64 numbers of noise must pass from the transformer's input to its output. The tokenizers of the
three text encoders are made from the same words, those of the captions of scenes.
"""

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdm_lightning.core.rng import stream
from cdm_lightning.data.scenes.drawing import IMAGE_SIZE, draw_scenes
from cdm_lightning.data.scenes.grammar import Scene, Split, all_words, draw_captions
from cdm_lightning.files import replacing
from cdm_lightning.kinds import Count, Finite, Positive, Seed, Share, Tokens, Weight
from cdm_lightning.pretraining.loop import Recipe
from cdm_lightning.pretraining.teacher import Captioned, NoiseLevels, fit_teacher, tokenise
from cdm_lightning.pretraining.tiny_sd3 import (
    SHIFT,
    build_clip,
    build_clip_tokenizer,
    build_t5,
    build_t5_tokenizer,
    frozen,
)
from cdm_lightning.pretraining.vae import fit_vae, posterior_of, standardise_latents

CLIP_TOKENS = 16  # the longest caption has 14 words; with a start and an end token
CLIP_WIDTH, T5_WIDTH = 64, 128  # the hidden states of both CLIP encoders side by side are as wide as T5's
LATENT_CHANNELS, LATENT_SIZE = 16, 8
SAVE_EVERY = 200  # iterations; an interrupted training repeats fewer
CHUNK = 256


def build_storybook(seed: Seed = 0, heads: Count = 5, layers: Count = 6) -> StableDiffusion3Pipeline:
    """Build the storybook pipeline with random weights that depend on `seed` only. It is frozen and in eval mode.

    The transformer has `layers` layers and `heads` attention heads of width 32.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = build_clip_tokenizer(all_words(), CLIP_TOKENS), build_t5_tokenizer(all_words())
        pipeline = StableDiffusion3Pipeline(
            transformer=build_transformer(heads, layers),
            vae=build_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            text_encoder=build_clip(clip, CLIP_WIDTH, layers=3, heads=4),
            tokenizer=clip,
            text_encoder_2=build_clip(clip, CLIP_WIDTH, layers=3, heads=4),
            tokenizer_2=clip,
            text_encoder_3=build_t5(t5, T5_WIDTH),
            tokenizer_3=t5,
        )
    return frozen(pipeline)


def build_transformer(heads: int, layers: int) -> SD3Transformer2DModel:
    """Build the transformer, which predicts the velocity of latents (B, 16, 8, 8).

    It reads patches of 2 x 2 latent pixels. It has `layers` layers and `heads` attention heads of width 32, with
    RMS-normed queries and keys as in SD3.5.
    """
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )


def build_vae() -> AutoencoderKL:
    """Build the autoencoder of pictures (B, 3, 64, 64) and latents (B, 16, 8, 8), with random weights.

    Its scaling factor is 1 and its shift factor is 0 until the training has set them.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def drawings(count: int, seed: int, split: Split, pairs: float) -> tuple[Tensor, list[str], list[Scene]]:
    """Draw `count` pictures (count, 3, 64, 64) in [0, 1], and return them with their captions and their scenes.

    With the `split` "heldout", each caption names a combination of attributes that no picture of the split "train"
    shows; "all" allows every combination. A picture shows two things with probability `pairs`, and otherwise one. The
    result depends on the arguments only.
    """
    captions = draw_captions(count, seed, split, pairs)
    pictures, scenes = draw_scenes(captions, seed, split if split != "heldout" else "all")
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, captions, scenes


def number(rng: torch.Generator) -> int:
    """Draw a whole number from `rng`, to be used as the seed of a batch of pictures."""
    return int(torch.randint(2**62, (), generator=rng))


def write_scene_prompts(folder: Path, train: Count, heldout: Count, pairs: Share, seed: Seed) -> None:
    """Write captions to the files `scenes_train.txt` and `scenes_heldout.txt` in `folder`, one per line.

    `train` and `heldout` are the numbers of captions in these files. A caption names two things with probability
    `pairs`, and otherwise one. Every held-out caption names a combination of attributes that no training picture shows
    (see `data.scenes.grammar.is_held_out`). All random draws depend on `seed` only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits: tuple[tuple[Split, int], ...] = (("train", train), ("heldout", heldout))
    for split, count in splits:
        captions = draw_captions(count, seed + 3000, split, pairs)
        (folder / f"scenes_{split}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def train_storybook_vae(
    vae: AutoencoderKL,
    recipe: Recipe,
    folder: Path,
    *,
    pairs: Share = 0.4,
    kl_weight: Weight = 1e-3,
    edge_weight: Weight = 1.0,
    standardised_on: Count = 1024,
) -> None:
    """Train the VAE in place on drawings that are new in every batch, and then standardise its latents.

    A drawing shows two things with probability `pairs`, and otherwise one. In the loss, `kl_weight` is the weight of
    the KL divergence, and `edge_weight` is the weight of the error in the differences between neighbouring pixels.
    After the training, the VAE's shift and scale are set so that the latents of `standardised_on` drawings have mean 0
    and standard deviation 1. The state of the training is saved in `folder`, from which an interrupted training
    resumes.
    """

    def batch(rng: torch.Generator) -> Tensor:
        return drawings(recipe.batch_size, number(rng), "train", pairs)[0] * 2 - 1

    fit_vae(vae, recipe, folder, batch, kl_weight, edge_weight, SAVE_EVERY)
    seed = stream(recipe.seed, "latents to standardise").initial_seed()
    standardise_latents(vae, drawings(standardised_on, seed, "train", pairs)[0] * 2 - 1)


def train_storybook_teacher(
    pipeline: StableDiffusion3Pipeline,
    recipe: Recipe,
    folder: Path,
    *,
    count: Count = 98304,
    keep: Tokens = 15,
    pairs: Share = 0.4,
    caption_dropout: Share = 0.1,
    sigma_mean: Finite = 0.4,
    sigma_std: Positive = 1.2,
    compile_network: bool = True,
) -> None:
    """Train the pipeline's transformer and text encoders in place by flow matching on `count` captioned drawings.

    A drawing shows two things with probability `pairs`, and otherwise one. `keep`, `caption_dropout`, `sigma_mean`,
    `sigma_std` and `compile_network` mean the same as in `teacher.train_teacher`. The state of the training and the
    latents of the drawings are saved in `folder`, from which an interrupted training resumes.
    """

    def data() -> Captioned:
        captions = draw_captions(count, recipe.seed + 1, "train", pairs)
        path = folder / "latents.safetensors"
        if not path.is_file():
            latents = encode_drawings(pipeline.vae, captions, recipe.seed + 1)
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file({"latents": latents}, temporary)
        return Captioned(load_file(path)["latents"], *tokenise(pipeline, [*captions, ""], keep))

    levels = NoiseLevels(caption_dropout, sigma_mean, sigma_std)
    fit_teacher(pipeline, recipe, folder, data, levels, compile_network, SAVE_EVERY)


@torch.no_grad()
def encode_drawings(vae: AutoencoderKL, captions: list[str], seed: int) -> Tensor:
    """Draw a picture for each of the N training `captions`, and return the latents (N, 16, 8, 8) of the pictures.

    The latents are in half precision and standardised by the VAE's shift and scale. The pictures depend on `captions`
    and `seed` only.
    """
    latents, config = [], cast(Any, vae.config)  # declared as a dict, but its keys are attributes too
    for begin in range(0, len(captions), CHUNK):
        pictures, _ = draw_scenes(captions[begin : begin + CHUNK], seed + begin, "train")
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        mean = posterior_of(vae, images.float() / 127.5 - 1).mean
        latents.append(((mean - config.shift_factor) * config.scaling_factor).half().contiguous())
    return torch.cat(latents)
