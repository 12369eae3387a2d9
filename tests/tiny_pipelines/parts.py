"""Parts that several tiny pipelines have in common."""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

QWEN_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def seeded(pipeline_of, **parts) -> DiffusionPipeline:
    """`pipeline_of(**{name: make()})` with weights that are a function of nothing, frozen and in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = pipeline_of(**{name: make() for name, make in parts.items()})
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def vae(latent_channels: int = 4) -> AutoencoderKL:
    """(B, 3, H, W) <-> (B, C, H/4, W/4), with a scaling and a shift that are not trivial."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=1.3,
        shift_factor=0.2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def byte_tokenizer(**options) -> Qwen2Tokenizer:
    """Qwen's tokenizer with single bytes for words and the marks of its chat format."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_MARKS)})
    return tokenizer


def qwen_vl(tokenizer: Qwen2Tokenizer, width: int = 32) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of one layer."""
    ids = dict(zip(QWEN_MARKS, tokenizer.convert_tokens_to_ids(list(QWEN_MARKS))))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)
