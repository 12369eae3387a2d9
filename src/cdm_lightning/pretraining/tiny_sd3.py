"""The tiny pipeline: a real `StableDiffusion3Pipeline` that is small.

Its networks have the same diffusers and transformers classes as those of SD3-Medium. Images have 32 x 32 pixels,
latents have 16 x 16 with 4 channels by default, and the transformer reads the latents as 16 patches. The CLIP encoders
read 12 tokens. The T5 has no positions (its bias table stays zero), so all padding tokens have the same embedding, and
`backbones.compact_text` can replace them by a single one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from cdm_lightning.backbones.pipeline_folder import loading, locate_pipeline
from cdm_lightning.data.shapes import all_words
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.kinds import Count, Seed

CLIP_TOKENS = 12
CLIP_WIDTH = 32
T5_WIDTH = 64
SHIFT = 3.0  # as in SD3-Medium's scheduler


def build_pipeline(
    seed: Seed = 0, heads: Count = 3, layers: Count = 4, latent_channels: Count = 4
) -> StableDiffusion3Pipeline:
    """Build the tiny pipeline with random weights that depend on `seed` only. It is frozen and in eval mode.

    The transformer has `layers` layers and `heads` attention heads of width 32. The latents have the shape
    (B, latent_channels, 16, 16).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_tokenizer, t5_tokenizer = build_clip_tokenizer(all_words()), build_t5_tokenizer(all_words())
        pipeline = StableDiffusion3Pipeline(
            transformer=build_transformer(heads, layers, latent_channels),
            vae=build_vae(latent_channels),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            text_encoder=build_clip(clip_tokenizer),
            tokenizer=clip_tokenizer,
            text_encoder_2=build_clip(clip_tokenizer),
            tokenizer_2=clip_tokenizer,
            text_encoder_3=build_t5(t5_tokenizer),
            tokenizer_3=t5_tokenizer,
        )
    return frozen(pipeline)


def frozen(pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """Freeze all networks of the pipeline in place, set them to eval mode, and return the pipeline."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def start_from(pipeline: StableDiffusion3Pipeline, folder: str | Path) -> None:
    """Copy all weights of the tiny pipeline in `folder` into `pipeline`, those of the VAE included.

    The vocabulary of `pipeline` may be larger; tokens that the pipeline in `folder` lacks keep their random embeddings.
    The VAE is copied because the transformer in `folder` was trained on its latents. Raises `UserError` if `folder`
    holds no tiny pipeline, or if the networks in `folder` differ in size from those of `pipeline`.
    """
    folder = locate_pipeline(str(folder), None, StableDiffusion3Pipeline, ("transformer", "vae"))
    with loading(folder):
        earlier = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    try:
        for name in ("transformer", "vae"):
            getattr(pipeline, name).load_state_dict(getattr(earlier, name).state_dict())
        for number in ("", "_2", "_3"):
            ours, theirs = (getattr(p, f"text_encoder{number}") for p in (pipeline, earlier))
            known = getattr(earlier, f"tokenizer{number}").get_vocab()
            table = ours.get_input_embeddings().weight.detach().clone()
            for token, row in getattr(pipeline, f"tokenizer{number}").get_vocab().items():
                if token in known:
                    table[row] = theirs.get_input_embeddings().weight[known[token]].detach()
            theirs.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
            ours.load_state_dict(theirs.state_dict())
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"earlier={folder} is not a tiny pipeline with the sizes in `pipeline` ({first_line(error)}); "
            "pass a folder that pretrain wrote with these sizes"
        ) from error
    config = earlier.vae.config
    pipeline.vae.register_to_config(scaling_factor=config.scaling_factor, shift_factor=config.shift_factor)


def build_transformer(heads: int, layers: int, latent_channels: int) -> SD3Transformer2DModel:
    """Build the transformer, which predicts the velocity of latents (B, latent_channels, 16, 16).

    It reads patches of 4 x 4 latent pixels. It has `layers` layers and `heads` attention heads of width 32, with
    RMS-normed queries and keys as in SD3.5.
    """
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_vae(latent_channels: int) -> AutoencoderKL:
    """Build the autoencoder of images (B, 3, 32, 32) and latents (B, latent_channels, 16, 16), with random weights.

    Its scaling factor is 1 and its shift factor is 0 until the training has set them.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_clip(
    tokenizer: CLIPTokenizer, width: int = CLIP_WIDTH, layers: int = 2, heads: int = 2
) -> CLIPTextModelWithProjection:
    """Build a CLIP text encoder for the vocabulary of `tokenizer`.

    `width` is the width of its hidden states and of its pooled output. It has `layers` layers and `heads` attention
    heads.
    """
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5Tokenizer, width: int = T5_WIDTH) -> T5EncoderModel:
    """Build a T5 encoder with one layer, of width `width`, for the vocabulary of `tokenizer`.

    It has no positions, so it cannot see the order of words; only the CLIP encoders can.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config)
    stack: Any = encoder.encoder
    torch.nn.init.zeros_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return encoder


def build_clip_tokenizer(words: Sequence[str], tokens: int = CLIP_TOKENS) -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer with CLIP's end-of-word mark, in which each of `words` is one token.

    It pads texts to `tokens` tokens, the start token and the end token included.

    On its own, the trainer of the BPE would number the last letters of the words in the order of a hash table, and two
    processes would build tokenizers with different ids. Therefore these letters, each with the end-of-word mark, are
    sorted and given to the trainer as special tokens.
    """
    final_letters = sorted({f"{word[-1]}</w>" for word in words})
    trained = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *final_letters],
        show_progress=False,
    )
    trained.train_from_iterator([" ".join(words)] * 2, trainer)
    state = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(merge) for merge in state["merges"]]  # declared as strings, but the tokenizer takes pairs
    return CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=tokens)


def build_t5_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """Build a unigram tokenizer in which each of `words` is one token. All other words are split into letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in words]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.'\"-"]
    return T5Tokenizer(vocab=pieces, extra_ids=0)
