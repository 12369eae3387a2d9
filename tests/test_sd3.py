"""SD3 backbone against the stock pipeline of diffusers, on a random pipeline of toy size."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from cdm_lightning.backbones import pipeline_folder
from cdm_lightning.backbones.base import BoundField
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.config import asset_path
from cdm_lightning.core.flow import GuidedField, evaluate_together
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.core.rollout import sample
from cdm_lightning.core.schedules import inference_sigmas, uniform_sigmas
from cdm_lightning.data.shapes import draw_scenes, render
from cdm_lightning.errors import UserError
from cdm_lightning.pretraining.tiny_sd3 import build_pipeline

PROMPTS = ["a large red circle", "a small blue square above a green ring", "a ring"]
LONG = " ".join(["a large red circle above a small blue square"] * 4)  # 36 T5 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny pipeline with random weights; the VAE's scaling and shift are not the trivial ones."""
    pipeline = build_pipeline(seed=0)
    pipeline.vae.register_to_config(scaling_factor=1.3, shift_factor=0.2)
    target = tmp_path_factory.mktemp("sd3") / "pipeline"
    pipeline.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def stock(folder) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def backbone(folder) -> SD3Backbone:
    return SD3Backbone(str(folder))


@pytest.fixture(scope="module")
def network(backbone) -> torch.nn.Module:
    return backbone.build_network()


@pytest.fixture(scope="module")
def compact(folder) -> SD3Backbone:
    backbone = SD3Backbone(str(folder), compact_text=20)
    backbone.setup(torch.device("cpu"))
    return backbone


def noise_for(backbone, count: int) -> torch.Tensor:
    return evaluation_noise(0, range(count), backbone.latent_shape, "cpu")


def field(backbone, network, prompts, **options) -> BoundField:
    return BoundField(backbone, network, backbone.encode_prompts(prompts), **options)


def stock_latents(stock, noise, nfe: int, guidance_scale: float) -> torch.Tensor:
    sigmas = uniform_sigmas(nfe).tolist()
    return stock(
        PROMPTS,
        num_inference_steps=nfe,
        sigmas=sigmas,
        guidance_scale=guidance_scale,
        latents=noise.clone(),
        output_type="latent",
    ).images


# ---- parity with the stock pipeline


@pytest.mark.parametrize("nfe", [1, 3, 4])
def test_euler_loop_is_the_stock_pipeline_bit_for_bit(stock, backbone, network, nfe):
    noise = noise_for(backbone, len(PROMPTS))
    ours = sample(field(backbone, network, PROMPTS), noise, inference_sigmas(nfe, backbone.shift_sigmas))
    assert torch.equal(ours, stock_latents(stock, noise, nfe, guidance_scale=1.0))
    assert (ours - noise).abs().mean() > 0.1


def test_guided_loop_is_the_stock_pipeline(stock, backbone, network):
    noise = noise_for(backbone, len(PROMPTS))
    uncond = field(backbone, network, [""] * len(PROMPTS))
    guided = GuidedField(field(backbone, network, PROMPTS), uncond, scale=3.0)
    ours = sample(guided, noise, inference_sigmas(4, backbone.shift_sigmas))
    torch.testing.assert_close(ours, stock_latents(stock, noise, 4, guidance_scale=3.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_compact_text_is_the_stock_pipeline_to_rounding(stock, compact, guidance_scale):
    noise, network = noise_for(compact, len(PROMPTS)), compact.build_network()
    cond, uncond = field(compact, network, PROMPTS), field(compact, network, [""] * len(PROMPTS))
    ours = sample(GuidedField(cond, uncond, guidance_scale), noise, inference_sigmas(4, compact.shift_sigmas))
    assert cond.cond["prompt_embeds"].shape[1] == 12 + 20 + 1
    torch.testing.assert_close(ours, stock_latents(stock, noise, 4, guidance_scale), rtol=0, atol=1e-5)


def test_shift_is_the_schedulers(backbone, stock):
    sigmas = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    stock.scheduler.set_timesteps(sigmas=sigmas.flatten().tolist())
    assert torch.equal(backbone.shift_sigmas(sigmas).flatten(), stock.scheduler.sigmas[:-1])
    torch.testing.assert_close(
        backbone.shift_sigmas(torch.tensor([1, 0.75, 0.5, 0.25])), torch.tensor([1, 0.9, 0.75, 0.5])
    )
    assert torch.equal(backbone.shift_sigmas(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 0.0]))
    assert backbone.shift_sigmas(torch.empty(2, 0)).shape == (2, 0)


def test_images_are_decoded_like_the_stock_pipeline(stock, backbone):
    latents = noise_for(backbone, 2)
    stock_image = stock(
        PROMPTS[:2], num_inference_steps=1, guidance_scale=1.0, latents=latents.clone(), output_type="pt"
    ).images
    x0 = stock(
        PROMPTS[:2], num_inference_steps=1, guidance_scale=1.0, latents=latents.clone(), output_type="latent"
    ).images
    images = backbone.decode_latents(x0)
    assert torch.equal(images, stock_image)
    assert images.shape == (2, 3, *backbone.image_size)
    assert 0 <= images.min() < images.max() <= 1


def test_encoding_uses_the_inverse_scaling_and_shift(stock, backbone):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = stock.vae.encode(2 * images - 1).latent_dist.mean
    encoded = backbone.encode_images(images)
    torch.testing.assert_close(encoded, (raw - 0.2) * 1.3)
    torch.testing.assert_close(encoded / 1.3 + 0.2, raw)
    assert encoded.shape == (2, *backbone.latent_shape)


def test_pictures_survive_the_bundled_autoencoder():
    bundled = SD3Backbone(asset_path("tiny_sd3"))
    pictures = render(draw_scenes(8, seed=0), seed=0)
    latents = bundled.encode_images(pictures)
    assert (bundled.decode_latents(latents) - pictures).abs().mean() < 0.01
    assert abs(latents.mean()) < 0.2  # scaling and shift make them like the noise
    assert 0.7 < latents.std() < 1.3


def test_the_empty_prompt_is_the_stock_negative_prompt_and_encoded_once(stock, folder):
    backbone = SD3Backbone(str(folder))
    with torch.no_grad():
        _, negative, _, negative_pooled = stock.encode_prompt(PROMPTS, None, None, device="cpu")
    cond = backbone.encode_prompts(["", "", ""])
    torch.testing.assert_close(cond["prompt_embeds"], negative)
    torch.testing.assert_close(cond["pooled"], negative_pooled)
    backbone._text.pipeline = None  # whatever needs an encoder from here on fails
    assert torch.equal(backbone.encode_prompts(["", ""])["pooled"], cond["pooled"][:2])


# ---- networks


def test_networks_are_equal_float32_and_trainable_and_the_teacher_is_frozen(folder, backbone):
    first, second = backbone.build_network(), backbone.build_network()
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert a.dtype == torch.float32
        assert a.requires_grad
    teacher = SD3Backbone(str(folder), teacher_dtype="bfloat16").build_teacher()
    assert not teacher.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in teacher.parameters())


def test_a_bfloat16_teacher_answers_in_float32_near_the_float32_one(folder, backbone):
    half = SD3Backbone(str(folder), teacher_dtype="bfloat16")
    x, sigma, cond = noise_for(backbone, 2), torch.tensor([0.9, 0.3]), backbone.encode_prompts(PROMPTS[:2])
    with torch.no_grad():
        exact = backbone.velocity(backbone.build_teacher(), x, sigma, cond)
        rounded = half.velocity(half.build_teacher(), x, sigma, cond)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_of_the_network_gets_a_gradient(backbone, checkpointing):
    network = backbone.build_network()
    if checkpointing:
        backbone.enable_gradient_checkpointing(network)
        assert network.is_gradient_checkpointing
    cond, x, sigma = backbone.encode_prompts(PROMPTS), noise_for(backbone, 3), torch.tensor([0.2, 0.6, 0.9])
    backbone.velocity(network, x, sigma, cond).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # the last block drops its text stream after attention, whose queries and output therefore have no effect
    assert all(name.startswith("transformer_blocks.3.attn.") and "add" in name for name in silent), silent
    assert not any(tensor.requires_grad for tensor in cond.values())


@pytest.mark.parametrize("name", ["backbone", "compact"])
def test_samples_do_not_depend_on_their_place_in_the_batch(request, name):
    backbone = request.getfixturevalue(name)
    network = backbone.build_network()
    order = torch.tensor([2, 0, 1])
    x, sigma = noise_for(backbone, 3), torch.tensor([0.2, 0.6, 0.9])
    with torch.no_grad():
        straight = field(backbone, network, PROMPTS)(x, sigma)
        permuted = field(backbone, network, [PROMPTS[i] for i in order])(x[order], sigma[order])
        selected = field(backbone, network, PROMPTS).select(order)(x[order], sigma[order])
    torch.testing.assert_close(permuted, straight[order], rtol=0, atol=2e-6)
    torch.testing.assert_close(selected, straight[order], rtol=0, atol=2e-6)


def test_timesteps_are_not_rounded_under_autocast(backbone, network):
    """In bfloat16, 737.3 is 736: a network that saw a rounded timestep could not tell the two apart."""
    assert torch.tensor(737.3).bfloat16() == 736
    bound = field(backbone, network, PROMPTS[:1], compute_dtype=torch.bfloat16)
    x = noise_for(backbone, 1)
    with torch.no_grad():
        fine, coarse = bound(x, torch.tensor([0.7373])), bound(x, torch.tensor([0.736]))
        rounded = bound(x, (torch.tensor([0.7373]) * 1000).bfloat16().float() / 1000)
    assert fine.dtype == torch.float32
    assert (fine - coarse).abs().max() > 1e-3
    torch.testing.assert_close(rounded, coarse)


def test_frozen_parts_stay_in_eval_mode_when_lightning_trains(folder):
    backbone = SD3Backbone(str(folder))
    backbone.setup(torch.device("cpu"))
    module = L.LightningModule()
    module.backbone = backbone
    module.train()
    loaded = [*backbone._codec.components.values(), *backbone._text_parts.components.values()]
    parts = [part for part in loaded if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4  # the VAE and three text encoders
    assert not any(m.training for part in parts for m in part.modules())
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not module.state_dict()


def test_fingerprint_tells_architectures_apart(folder, backbone, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert SD3Backbone(str(other)).fingerprint == backbone.fingerprint
    edit_json(other / "transformer/config.json", num_layers=5)
    assert SD3Backbone(str(other)).fingerprint != backbone.fingerprint
    assert backbone.fingerprint.startswith("sd3-")


def test_other_image_sizes_are_those_of_the_stock_pipeline(folder, stock, network):
    backbone = SD3Backbone(str(folder), height=48, width=16)
    assert backbone.latent_shape == (4, 24, 8)
    noise = noise_for(backbone, 3)
    ours = sample(field(backbone, network, PROMPTS), noise, inference_sigmas(2, backbone.shift_sigmas))
    theirs = stock(
        PROMPTS,
        num_inference_steps=2,
        sigmas=[1.0, 0.5],
        guidance_scale=1,
        height=48,
        width=16,
        latents=noise.clone(),
        output_type="latent",
    ).images
    assert torch.equal(ours, theirs)


# ---- compact text


def test_a_prompt_with_more_tokens_keeps_as_many_as_it_needs(folder, stock, compact):
    network, noise = compact.build_network(), noise_for(compact, 1)
    cond = compact.encode_prompts([LONG])
    assert cond["prompt_embeds"].shape[1] == 12 + 37 + 1  # 36 words and the end mark, then the padding token
    ours = sample(BoundField(compact, network, cond), noise, inference_sigmas(2, compact.shift_sigmas))
    theirs = stock(
        [LONG], num_inference_steps=2, sigmas=[1, 0.5], guidance_scale=1, latents=noise.clone(), output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_texts_of_different_lengths_are_evaluated_by_one_call(compact):
    """Processes with shards of one network must make the same calls, whatever the texts of each are."""
    network, x, sigma = compact.build_network(), noise_for(compact, 1), torch.tensor([0.5])
    long, short = field(compact, network, [LONG]), field(compact, network, ["a ring"])
    with torch.no_grad():
        apart = [long(x, sigma), short(x, sigma)]
        calls = []
        network.register_forward_pre_hook(lambda *_: calls.append(1))
        together = evaluate_together([(long, x, sigma), (short, x, sigma)])
        assert len(calls) == 1
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
        assert (apart[0] - apart[1]).abs().max() > 1e-3


def test_compact_text_under_autocast_is_the_stock_network_under_autocast(backbone, compact, network):
    x, sigma = noise_for(compact, 3), torch.tensor([0.2, 0.6, 0.9])
    with torch.no_grad():
        exact = field(backbone, network, PROMPTS)(x, sigma)
        stock = field(backbone, network, PROMPTS, compute_dtype=torch.bfloat16)(x, sigma)
        folded = field(compact, compact.build_network(), PROMPTS, compute_dtype=torch.bfloat16)(x, sigma)
    rounding = (stock - exact).abs().mean()
    assert 0 < (folded - exact).abs().mean() < 2 * rounding


def test_compact_text_is_refused_where_padding_tokens_differ(tmp_path):
    pipeline = build_pipeline(seed=0)
    bias = pipeline.text_encoder_3.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(0))
    pipeline.save_pretrained(tmp_path)
    SD3Backbone(str(tmp_path)).setup(torch.device("cpu"))  # the stock path does not care
    with pytest.raises(UserError, match=r"padding tokens are not identical.*compact_text=null"):
        SD3Backbone(str(tmp_path), compact_text=20).setup(torch.device("cpu"))


# ---- what is refused, in one line


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def use(backbone: SD3Backbone) -> None:
    _ = backbone.fingerprint, backbone.latent_shape, backbone.scheduler
    backbone.build_network()
    backbone.setup(torch.device("cpu"))


def refusal(backbone: SD3Backbone) -> str:
    """The one line that any use of the backbone ends with."""
    with pytest.raises(UserError) as caught:
        use(backbone)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


def test_missing_folder(tmp_path):
    missing = str(tmp_path / "nowhere")
    assert refusal(SD3Backbone(missing)) == (
        f"the folder {missing} does not exist; pass a pipeline folder or a hub id (owner/name)"
    )


def test_file_in_place_of_a_folder(folder):
    assert "is a file, not a pipeline folder" in refusal(SD3Backbone(str(folder / "model_index.json")))


def test_folder_that_is_no_pipeline(tmp_path):
    assert "is not a diffusers pipeline, because it has no model_index.json" in refusal(SD3Backbone(str(tmp_path)))
    (tmp_path / "model_index.json").write_text("{ half a")
    assert "cannot be read" in refusal(SD3Backbone(str(tmp_path)))


def test_pipeline_of_another_family(copied):
    edit_json(copied / "model_index.json", _class_name="FluxPipeline")
    assert "is a FluxPipeline, but this backbone needs a StableDiffusion3Pipeline" in refusal(SD3Backbone(str(copied)))


def test_pipeline_without_t5(copied):
    edit_json(copied / "model_index.json", text_encoder_3=[None, None])
    assert "has no text_encoder_3" in refusal(SD3Backbone(str(copied)))


def test_hub_id_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(SD3Backbone("stabilityai/no-such-model"))
    assert "cannot be downloaded from the Hugging Face hub" in line
    assert "backbone.pretrained=FOLDER" in line


def test_hub_ids_are_fetched_by_revision(folder, monkeypatch):
    """Stand-ins for the hub's two calls: both get the revision, and the folder they return is used."""
    seen = []
    monkeypatch.setattr(pipeline_folder, "snapshot_download", lambda *a, **k: seen.append((a, k)) or str(folder))
    monkeypatch.setattr(StableDiffusion3Pipeline, "download", lambda *a, **k: seen.append((a, k)) or str(folder))
    assert SD3Backbone("owner/model", revision="abc").latent_shape == (4, 16, 16)
    assert [(args[0], keywords["revision"]) for args, keywords in seen] == [("owner/model", "abc")] * 2
    assert seen[0][1]["allow_patterns"] == ["model_index.json"]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_3"])
def test_broken_weights(copied, part):
    weights = next((copied / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{copied / part}" in refusal(SD3Backbone(str(copied)))


def test_missing_weights_are_not_made_up(copied):
    from safetensors.torch import load_file, save_file

    path = copied / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "the weight proj_out.weight is missing" in refusal(SD3Backbone(str(copied)))


def test_missing_part(copied):
    shutil.rmtree(copied / "scheduler")
    assert f"{copied}: the part scheduler is missing" in refusal(SD3Backbone(str(copied)))


@pytest.mark.parametrize("size", [{"height": 36}, {"width": 10}, {"height": 0}, {"width": 128}])
def test_image_size_that_cannot_be_cut_into_patches(folder, size):
    ((name, side),) = size.items()
    line = refusal(SD3Backbone(str(folder), **size))
    assert line.startswith(f"{name}={side} does not fit")
    assert line.endswith("set a multiple of 8 up to 64")


def test_arguments_out_of_their_range():
    with pytest.raises(UserError, match=r"backbone.teacher_dtype='half' must be one of float32, bfloat16, float16"):
        SD3Backbone("anywhere", teacher_dtype="half")
    with pytest.raises(UserError, match="max_sequence_length=0 must be 1 to 512 tokens for SD3"):
        SD3Backbone("anywhere", max_sequence_length=0)


def test_scheduler_that_does_more_than_shift(copied):
    edit_json(copied / "scheduler/scheduler_config.json", shift_terminal=0.5)
    assert "sets shift_terminal" in refusal(SD3Backbone(str(copied)))
