"""The frozen parts compute what is used of them and nothing more, with the same numbers."""

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import FAMILIES
from torch import nn

from cdm_lightning import sample
from cdm_lightning.evaluation.samplers import encode_ahead
from cdm_lightning.planning.live import LiveBytes

PROMPTS = ["a large red circle", "a ring", ""]
HALVES = ["sd3", "flux_dev", "longcat", "qwen_image", "sana", "z_image"]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def backbone_of(name, tiny_folder):
    family = FAMILIES[name]
    made = family.backbone(str(tiny_folder(name)), **family.options)
    made.setup(torch.device("cpu"))
    return made


@pytest.mark.parametrize("name", HALVES)
def test_images_are_decoded_one_at_a_time(name, tiny_folder):
    backbone = backbone_of(name, tiny_folder)
    latents = torch.randn(6, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))

    def peak_of(count: int) -> tuple[torch.Tensor, float]:
        with LiveBytes() as live:
            images = backbone.decode_latents(latents[:count])
        return images, live.timeline.peak(0) - 6 * images.nbytes  # some copies of the result itself are needed

    sliced, little = peak_of(6)
    backbone._codec.vae.disable_slicing()
    whole, much = peak_of(6)
    torch.testing.assert_close(sliced, whole, **ROUNDING)
    assert little < much / 3


@pytest.mark.parametrize("name", HALVES)
def test_large_images_are_decoded_in_tiles(name, tiny_folder):
    backbone = backbone_of(name, tiny_folder)
    backbone.decode_tile = 64
    backbone.setup(torch.device("cpu"))
    side, channels = 64 // backbone.vae_factor, backbone.latent_shape[0]
    latents = torch.randn(1, channels, 2 * side, side, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    backbone._codec.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-2]))
    assert backbone.decode_latents(latents).shape == (1, 3, 128, 64)
    assert len(seen) > 1
    assert max(seen) <= side
    seen.clear()
    backbone.decode_latents(latents[..., :side, :])
    assert len(seen) == 1  # as large as a tile: whole


@pytest.mark.parametrize("name", ["longcat", "qwen_image"])
def test_text_encoders_give_the_last_state_alone(name, tiny_folder):
    backbone = backbone_of(name, tiny_folder)
    stock = DiffusionPipeline.from_pretrained(tiny_folder(name))
    length = {"max_sequence_length": backbone.text_length} if name == "qwen_image" else {}
    for prompt in PROMPTS[:2]:
        with torch.no_grad():
            expected = stock.encode_prompt([prompt], **length)[0].float()
        ours = backbone.encode_prompts([prompt])["prompt_embeds"]
        assert torch.equal(ours[:, : expected.shape[1]], expected)
    head = stock.text_encoder.lm_head
    with LiveBytes() as live:
        backbone._text_parts.text_encoder(torch.zeros(4, 100, dtype=torch.long), output_hidden_states=True)
    logits = 4 * 100 * head.out_features * 4
    with LiveBytes() as before:
        stock.text_encoder(torch.zeros(4, 100, dtype=torch.long), output_hidden_states=True)
    assert before.timeline.peak(0) > logits
    assert live.timeline.peak(0) < before.timeline.peak(0) - logits / 2
    kept = [type(part) for part in backbone._text_parts.text_encoder.modules()]
    assert not any("Vision" in kind.__name__ for kind in kept)
    assert nn.Identity in kept


def test_prompts_are_encoded_before_the_network_and_its_encoders_are_freed(tiny_folder):
    backbone = backbone_of("sd3", tiny_folder)
    expected = [backbone.encode_prompts(PROMPTS[:2]), backbone.encode_prompts(PROMPTS[2:])]
    encode_ahead(backbone, PROMPTS, 2)
    assert "_text_parts" not in backbone.shared
    for prompts, cond in zip((PROMPTS[:2], PROMPTS[2:]), expected):
        for name, value in backbone.encode_prompts(prompts).items():
            assert torch.equal(value, cond[name])


def test_samples_in_bfloat16_are_those_of_float32_up_to_its_rounding(tiny_pipeline_folder):
    options = {"steps": 2, "guidance_scale": 2.0}
    full = sample.sample_images(str(tiny_pipeline_folder), PROMPTS, **options).images
    half = sample.sample_images(str(tiny_pipeline_folder), PROMPTS, dtype="bfloat16", **options).images
    difference = (full - half).abs().mean()
    assert 0 < difference < 0.05 * full.std()
