"""Every model family against the stock pipeline of diffusers, on genuine pipelines of toy size.

A new family joins by one `TinyFamily` in tests/tiny_pipelines; docs/new-backbone.md says how.
"""

import inspect
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny_pipelines import FAMILIES, TinyFamily
from torch._subclasses.fake_tensor import FakeTensorMode

from cdm_lightning import export
from cdm_lightning.backbones.anatomy import unwrapped
from cdm_lightning.backbones.base import BoundField
from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone
from cdm_lightning.backbones.families import FAMILIES as REGISTERED
from cdm_lightning.backbones.lora_file import write_lora_file
from cdm_lightning.backbones.packing import pack, unpack
from cdm_lightning.cache_text import fill_cache
from cdm_lightning.config import compose
from cdm_lightning.core.flow import GuidedField, evaluate_together
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.core.rollout import sample
from cdm_lightning.core.schedules import inference_sigmas, uniform_sigmas
from cdm_lightning.data.prompts import PromptList
from cdm_lightning.data.text_cache import StoredText, TextCacheSettings
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import SamplerSpec, generate
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.sample import sample_images
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import train
from cdm_lightning.training.gradient_checkpointing import Recomputation
from cdm_lightning.training.networks import Networks

CDM_ROLES = CDMObjective().roles

PROMPTS = ["a large red circle", "a small blue square above a green ring", "a ring"]
EXACT = {"rtol": 0, "atol": 1e-6}
ROUNDING = {"rtol": 0, "atol": 2e-5}  # guidance multiplies it


@dataclass
class Case:
    """A family with its folder, the stock pipeline and our backbone and network on it."""

    family: TinyFamily
    folder: Path
    stock: DiffusionPipeline
    backbone: PipelineBackbone
    network: torch.nn.Module

    def fresh(self, **options) -> PipelineBackbone:
        """A backbone on the same folder that has loaded nothing."""
        return self.family.backbone(str(self.folder), **self.family.options, **options)

    def field(self, prompts: list[str], network: torch.nn.Module | None = None, **options) -> BoundField:
        return BoundField(self.backbone, network or self.network, self.backbone.encode_prompts(prompts), **options)

    def noise(self, count: int = 3) -> torch.Tensor:
        return evaluation_noise(0, range(count), self.backbone.latent_shape, "cpu")

    def stock_run(self, noise: torch.Tensor, nfe: int = 4, output_type: str = "latent", **options) -> torch.Tensor:
        """What the stock pipeline makes of PROMPTS, latents unpacked."""
        call = {"sigmas": uniform_sigmas(nfe).tolist(), **self.family.options, **self.family.call, **options}
        made = self.stock(
            list(PROMPTS),  # some pipelines write their template into the list
            num_inference_steps=nfe,
            latents=pack(noise) if self.family.packed else noise.clone(),
            output_type=output_type,
            **call,
        ).images
        return unpack(made, *noise.shape[2:]) if output_type == "latent" and self.family.packed else made


def load(folder: Path) -> DiffusionPipeline:
    """What a user does."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny_folder) -> Case:
    family = FAMILIES[request.param]
    folder = tiny_folder(family.name)
    stock = load(folder)
    family.prepare(stock)
    stock.vae.enable_slicing()  # as backbones decode; a whole batch is rounded differently
    backbone = family.backbone(str(folder), **family.options)
    backbone.setup(torch.device("cpu"))
    return Case(family, folder, stock, backbone, backbone.build_network())


def only(*names: str) -> pytest.MarkDecorator:
    """Run a test on these families instead of all."""
    return pytest.mark.parametrize("case", names, indirect=True)


def perturbed(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


# ---- the suite


def test_the_suite_knows_every_family():
    assert {family.backbone.pipeline_class.__name__ for family in FAMILIES.values()} == set(REGISTERED)


def test_euler_loop_is_the_stock_pipeline(case):
    noise, sigmas = case.noise(), inference_sigmas(4, case.backbone.shift_steps)
    ours = sample(case.field(PROMPTS), noise, sigmas)
    torch.testing.assert_close(ours, case.stock_run(noise), **EXACT)
    torch.testing.assert_close(sigmas, case.stock.scheduler.sigmas, **EXACT)
    assert (ours - noise).abs().mean() > 0.1
    assert (ours[0] - ours[1]).abs().mean() > 0.1


def test_texts_matter(case):
    """Else the loops would agree on a text that reaches nobody."""
    x, sigma = case.noise(1), torch.tensor([0.7])
    with torch.no_grad():
        circle, ring, none = (case.field([text])(x, sigma) for text in (PROMPTS[0], PROMPTS[2], ""))
    assert (circle - ring).abs().max() > 1e-4
    assert (circle - none).abs().max() > 1e-4


@only(*(name for name, family in FAMILIES.items() if family.guided is not None))
def test_guided_loop_is_the_stock_pipeline(case):
    noise, sigmas = case.noise(), inference_sigmas(4, case.backbone.shift_steps)
    cond, uncond = case.field(PROMPTS), case.field([""] * len(PROMPTS))
    ours = sample(GuidedField(cond, uncond, 3.0, case.backbone.guide), noise, sigmas)
    theirs = case.stock_run(noise, **case.family.guided(3.0))
    torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert (ours - sample(cond, noise, sigmas)).abs().mean() > 1e-3


def test_shift_is_the_schedulers_and_looks_at_each_sigma_alone(case):
    config = {**case.stock.scheduler.config, "shift_terminal": None}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    given = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(sigmas=given.flatten().tolist(), mu=case.backbone._mu)
    shifted = case.backbone.shift_sigmas(given)
    torch.testing.assert_close(shifted.flatten(), scheduler.sigmas[:-1], **EXACT)
    torch.testing.assert_close(case.backbone.shift_sigmas(given[1, 2]), shifted[1, 2], **EXACT)
    assert torch.equal(case.backbone.shift_sigmas(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 0.0]))
    assert case.backbone.shift_sigmas(torch.empty(2, 0)).shape == (2, 0)


def test_rollouts_are_shifted_row_by_row(case):
    rows = torch.tensor([[0.9, 0.6, 0.3], [0.8, 0.7, 0.1]])
    terminal = case.stock.scheduler.config.shift_terminal
    both = case.backbone.shift_steps(rows)
    torch.testing.assert_close(both[1], case.backbone.shift_steps(rows[1]), **EXACT)
    assert (both.diff(dim=1) < 0).all()
    assert torch.equal(case.backbone.shift_steps(torch.ones(1)), torch.ones(1))
    assert case.backbone.shift_steps(torch.empty(2, 0)).shape == (2, 0)
    if terminal:
        torch.testing.assert_close(both[:, -1], torch.full((2,), terminal))
    else:
        torch.testing.assert_close(both, case.backbone.shift_sigmas(rows), **EXACT)


def test_images_are_decoded_like_the_stock_pipeline_and_encoded_by_the_inverse(case):
    backbone, noise = case.backbone, case.noise()
    images = backbone.decode_latents(case.stock_run(noise))
    torch.testing.assert_close(images, case.stock_run(noise, output_type="pt"), **EXACT)
    assert images.shape == (3, 3, *backbone.image_size)
    assert 0 <= images.min() < images.max() <= 1
    pictures = torch.rand(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(pictures)
    assert latents.shape == (2, *backbone.latent_shape)
    with torch.no_grad():
        raw = case.family.round_trip(case.stock.vae, pictures * 2 - 1)
    torch.testing.assert_close(backbone.decode_latents(latents), (raw / 2 + 0.5).clamp(0, 1), **ROUNDING)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_of_the_network_gets_a_gradient(case, checkpointing):
    network = case.backbone.build_network()
    if checkpointing:
        case.backbone.enable_gradient_checkpointing(network)
        assert network.is_gradient_checkpointing
    cond = case.backbone.encode_prompts(PROMPTS)
    velocity = case.backbone.velocity(network, case.noise(), torch.tensor([0.2, 0.6, 0.9]), cond)
    velocity.square().mean().backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert {name for name in silent if not re.match(case.family.silent, name)} == set()
    assert velocity.dtype == torch.float32
    assert not any(tensor.requires_grad for tensor in cond.values())


def test_samples_do_not_depend_on_their_place_in_the_batch(case):
    order, x, sigma = torch.tensor([2, 0, 1]), case.noise(), torch.tensor([0.2, 0.6, 0.9])
    with torch.no_grad():
        straight = case.field(PROMPTS)(x, sigma)
        permuted = case.field([PROMPTS[i] for i in order])(x[order], sigma[order])
        selected = case.field(PROMPTS).select(order)(x[order], sigma[order])
        halves = [case.field(PROMPTS[:1]), case.field(PROMPTS[1:])]
        joined = evaluate_together([(halves[0], x[:1], sigma[:1]), (halves[1], x[1:], sigma[1:])])
        assert halves[0].join(halves[1:]) is not None  # texts of all lengths fit together
        mixed = case.field([PROMPTS[0], "", PROMPTS[2]])(x, sigma)
    torch.testing.assert_close(permuted, straight[order], **ROUNDING)
    torch.testing.assert_close(selected, straight[order], **ROUNDING)
    torch.testing.assert_close(torch.cat(joined), straight, **ROUNDING)
    with torch.no_grad():
        torch.testing.assert_close(mixed[1:2], case.field([""])(x[1:2], sigma[1:2]), **ROUNDING)


def test_another_image_size_shares_the_parts_and_is_that_of_the_stock_pipeline(case):
    size, factor = case.backbone.image_size, case.backbone.vae_factor
    view = case.backbone.at(64, 32)
    assert view._codec is case.backbone._codec
    assert view._text_parts is case.backbone._text_parts
    assert view.latent_shape == (case.backbone.latent_shape[0], 64 // factor, 32 // factor)
    assert case.backbone.image_size == size
    assert view.fingerprint == case.backbone.fingerprint
    noise = evaluation_noise(0, range(3), view.latent_shape, "cpu")
    sigmas = inference_sigmas(2, view.shift_steps)
    ours = sample(BoundField(view, case.network, view.encode_prompts(PROMPTS)), noise, sigmas)
    torch.testing.assert_close(ours, case.stock_run(noise, nfe=2, height=64, width=32), **EXACT)
    torch.testing.assert_close(sigmas, case.stock.scheduler.sigmas, **EXACT)
    follows = not torch.equal(sigmas, inference_sigmas(2, case.backbone.shift_steps))
    moves = case.stock.scheduler.config.use_dynamic_shifting and not case.stock.scheduler.config.shift_terminal
    assert follows == bool(moves)  # with a terminal sigma, two steps end alike whatever the shift
    with pytest.raises(UserError, match=r"height=33 does not fit .*; set a multiple of \d+"):
        case.backbone.at(33, 32)


def test_a_text_cache_serves_for_the_text_encoders(case, tmp_path):
    settings = TextCacheSettings(tmp_path, dtype="float32", batch_size=4)
    fill_cache(case.backbone, {"training": PromptList(PROMPTS)}, settings)
    cached = case.family.backbone(str(case.folder), **case.family.options)
    cached.use_text_cache(StoredText(tmp_path, cached.text_fingerprint))
    cached.setup(torch.device("cpu"))
    for prompts in (PROMPTS, [""] * 2, [PROMPTS[1], ""]):
        stored, encoded = cached.encode_prompts(prompts), case.backbone.encode_prompts(prompts)
        assert stored.keys() == encoded.keys()
        for name, value in encoded.items():
            assert stored[name].dtype == value.dtype
            torch.testing.assert_close(stored[name], value, **EXACT)
    field = BoundField(cached, case.network, cached.encode_prompts(PROMPTS))
    images = cached.decode_latents(sample(field, case.noise(), inference_sigmas(2, cached.shift_steps)))
    torch.testing.assert_close(images, case.stock_run(case.noise(), nfe=2, output_type="pt"), **ROUNDING)
    assert "_text_parts" not in cached.shared  # no text encoder was loaded


def test_an_exported_student_reloads_in_plain_diffusers(case, tmp_path):
    student = perturbed(case.backbone.build_network(), seed=1)
    folder = export.export_pipeline(case.backbone, student, tmp_path / "student", nfe=4)
    call = json.loads((folder / "call.json").read_text())
    noise, plain = case.noise(), load(folder)
    latents = pack(noise) if case.family.packed else noise.clone()
    theirs = plain(list(PROMPTS), latents=latents, output_type="pt", **call).images
    ours = generate(case.backbone, student, SamplerSpec("student"), PROMPTS, range(3), seed=0, batch_size=3)
    torch.testing.assert_close(theirs, ours, **ROUNDING)
    sigmas = inference_sigmas(4, case.backbone.shift_steps)
    torch.testing.assert_close(plain.scheduler.sigmas.float(), sigmas, **EXACT)
    assert (ours - case.backbone.decode_latents(case.stock_run(noise))).abs().mean() > 1e-3
    made = sample_images(str(folder), PROMPTS, seed=0)  # knows family, sizes and steps by the folder alone
    assert made.steps == 4
    torch.testing.assert_close(made.images, ours, **ROUNDING)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{case.family.backbone.pipeline_class.__name__}.from_pretrained" in card
    assert all(f"{name}={value}" in card for name, value in call.items())
    again = case.family.backbone(str(folder), **case.family.options)
    assert torch.equal(again.shift_steps(uniform_sigmas(3)), case.backbone.shift_steps(uniform_sigmas(3)))


def test_a_folder_of_another_family_is_refused_in_one_line(case, tiny_folder):
    other = tiny_folder("flux_dev" if case.family.name.startswith("sd3") else "sd3")
    with pytest.raises(
        UserError, match=r"is a \w+, but this backbone needs a \w+; choose the backbone of its family"
    ) as caught:
        _ = case.family.backbone(str(other)).fingerprint
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_does_more_is_refused(case, tmp_path):
    copied = shutil.copytree(case.folder, tmp_path / "copied")
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).save_pretrained(copied / "scheduler")
    with pytest.raises(UserError, match=r"sets use_karras_sigmas, .* supports only a static shift"):
        _ = case.family.backbone(str(copied)).scheduler


def test_text_lengths_out_of_range_are_refused(case):
    with pytest.raises(UserError, match=r"max_sequence_length=2000 must be (\d+ to )?\d+ tokens for [\w.-]+"):
        case.family.backbone("anywhere", max_sequence_length=2000)


def test_four_iterations_train_export_and_sample(case, tmp_path, prompt_file):
    """The family's own experiment, in its precision, on the tiny folder; then both commands on the run."""
    quiet_libraries()
    options = [f"backbone.{name}={value}" for name, value in case.family.options.items()]
    overrides = [
        f"experiment={case.family.experiment}",
        f"output_dir={tmp_path / 'run'}",
        f"backbone.pretrained={case.folder}",
        "backbone.revision=null",
        "schedule.length.high=3",
        "trainer.max_steps=4",
        "trainer.limit_val_batches=0",
        "trainer.log_every_n_steps=1",
        "callbacks=none",
        "logger=none",
        "checkpoint.every=4",
        "data.batch_size=2",
        "data.num_workers=0",
        f"data.train.path={prompt_file}",
        f"data.val.path={prompt_file}",
    ]
    result = train(compose([*overrides, *options]))
    assert result.iteration == 4
    figures = {name: value for name, value in result.metrics.items() if name.endswith(("loss", "grad_norm"))}
    assert {"student/loss", "fake_score/loss", "student/grad_norm"} <= figures.keys()
    assert all(0 < value < float("inf") for value in figures.values())
    assert result.metrics["student/skipped_steps"] == 0
    folder = export.export_checkpoint(tmp_path / "run", tmp_path / "student")
    images = sample_images(str(folder), PROMPTS[:1]).images
    assert images.shape == (1, 3, *case.backbone.image_size)
    assert images.std() > 0.01


# ---- what single families do


def seen_timesteps(part: torch.nn.Module, run) -> torch.Tensor:
    """The first argument that a network's time embedding `part` is given while `run()` runs."""
    seen = []
    hook = part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        run()
    hook.remove()
    return torch.stack([value.flatten()[0].float() for value in seen])


@only("longcat", "flux_dev", "qwen_image")  # the others are given float32 timesteps
def test_bfloat16_timesteps_are_those_of_the_bfloat16_pipeline(case):
    """Sigma 0.9045 is timestep 904 there; casting sigma itself would make it 908."""
    part, sigmas = case.backbone.time_module, [0.9045, 0.8261, 0.7595, 0.5128]
    stock = load(case.folder).to(torch.bfloat16)
    stock.scheduler = FlowMatchEulerDiscreteScheduler()
    latents = pack(case.noise())
    call = {**case.family.options, **case.family.call, "num_inference_steps": 4, "sigmas": sigmas}
    theirs = seen_timesteps(
        part(stock.transformer), lambda: stock(list(PROMPTS), latents=latents, output_type="latent", **call)
    )
    bound, x = case.field(PROMPTS[:1], compute_dtype=torch.bfloat16), case.noise(1)
    ours = seen_timesteps(part(case.network), lambda: [bound(x, torch.tensor([sigma])) for sigma in sigmas])
    assert torch.equal(ours, theirs)
    scale = 1 if ours[0] > 1 else 1000
    assert (scale * theirs - 1000 * torch.tensor(sigmas)).abs().max() < 4
    assert not torch.equal(ours, torch.tensor(sigmas).bfloat16().float() * (1000 / scale))


@only("longcat")
def test_longcat_never_rewrites_prompts(case, monkeypatch, tmp_path):
    def rewrite(*_):
        raise AssertionError("prompt rewriting was called")

    monkeypatch.setattr(case.family.backbone.pipeline_class, "rewire_prompt", rewrite)
    assert case.backbone.encode_prompts(["a ring"])["prompt_embeds"].shape[1] == 512
    case.stock_run(case.noise())
    call = case.backbone._student_call(4).arguments
    assert call["enable_prompt_rewrite"] is False
    with pytest.raises(AssertionError, match="was called"):  # the pipeline's default, which the export turns off
        case.stock_run(case.noise(), enable_prompt_rewrite=True)


@only("longcat")
def test_longcat_guidance_makes_no_token_longer(case):
    cond, uncond = torch.randn(2, 2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    guided = pack(case.backbone.guide(cond, uncond, 4.5)).norm(dim=-1)
    assert (guided <= pack(cond).norm(dim=-1) * (1 + 1e-5)).all()
    torch.testing.assert_close(case.backbone.guide(cond, uncond, 1.0), cond)


@only("flux_dev")
def test_flux_dev_is_told_its_guidance(case):
    x, sigma, cond = case.noise(1), torch.tensor([0.5]), case.backbone.encode_prompts(PROMPTS[:1])
    other = case.family.backbone(str(case.folder), guidance_embed=1.0, **case.family.options)
    with torch.no_grad():
        assert not torch.allclose(
            case.backbone.velocity(case.network, x, sigma, cond), other.velocity(case.network, x, sigma, cond)
        )
    call = other._student_call(4).arguments
    assert call["guidance_scale"] == 1.0
    assert case.family.backbone.settings_of(call)["guidance_embed"] == 1.0


@only("qwen_image")
def test_qwen_image_exports_a_single_step_that_is_a_number(case, tmp_path):
    """With its terminal sigma, diffusers would divide 0 by 0."""
    folder = export.export_pipeline(case.backbone, case.network, tmp_path / "student", nfe=1)
    call, noise = json.loads((folder / "call.json").read_text()), case.noise()
    theirs = load(folder)(list(PROMPTS), latents=pack(noise), output_type="pt", **call).images
    ours = generate(case.backbone, case.network, SamplerSpec("s", nfe=1), PROMPTS, range(3), seed=0, batch_size=3)
    torch.testing.assert_close(theirs, ours, **ROUNDING)
    assert case.family.backbone(str(folder)).scheduler.config.shift_terminal == 0.02  # that of training


@only("sana")
def test_sana_leaves_a_scheduler_that_is_no_flow_solver(case, tmp_path):
    copied = shutil.copytree(case.folder, tmp_path / "copied")
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_flow_sigmas": False}))
    with pytest.raises(UserError, match="is not that of a flow model"):
        _ = case.family.backbone(str(copied)).scheduler
    index = json.loads(
        (export.export_pipeline(case.backbone, case.network, tmp_path / "s") / "model_index.json").read_text()
    )
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]


def test_packing_is_that_of_the_pipelines():
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 10))
    assert torch.equal(unpack(pack(x), 6, 10), x)


def test_every_backbone_can_be_made_from_its_yaml():
    for family in FAMILIES.values():
        keys = compose([f"backbone={family.name}", "output_dir=x"]).backbone.keys() - {"_target_"}
        assert keys <= inspect.signature(family.backbone).parameters.keys()


# ---- weights read row by row


@pytest.mark.parametrize("teacher", [False, True], ids=["trained", "teacher"])
def test_an_empty_network_that_is_filled_is_the_loaded_one(case, teacher):
    backbone = case.family.backbone(str(case.folder), teacher_dtype="bfloat16", **case.family.options)
    loaded = backbone.build_teacher() if teacher else backbone.build_network()
    empty = backbone.build_empty(teacher)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
    assert empty.training == loaded.training
    for name, parameter in loaded.named_parameters():
        hollow = empty.get_parameter(name)
        assert (hollow.shape, hollow.dtype, hollow.requires_grad) == (parameter.shape, parameter.dtype, not teacher)
        rows = len(parameter)
        halves = [backbone.read_rows(name, 0, rows // 2), backbone.read_rows(name, rows // 2, rows)]
        assert torch.equal(torch.cat(halves).to(parameter.dtype), parameter), name
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@only("sd3")
def test_a_network_that_is_not_in_one_file_is_never_empty(case, tmp_path):
    factors = {"proj_out.lora_A.weight": torch.ones(1, 64), "proj_out.lora_B.weight": torch.ones(8, 1)}
    file = write_lora_file(case.family.backbone.pipeline_class, factors, tmp_path)
    with_lora = case.family.backbone(str(case.folder), teacher_lora=file, **case.family.options)
    assert with_lora.build_empty(True) is None
    broken = tmp_path / "broken"
    shutil.copytree(case.folder, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if "proj_out.bias" not in name}, weights)
    with pytest.raises(UserError, match=r"the weight proj_out\.bias is missing"):
        case.family.backbone(str(broken), **case.family.options).build_empty(False)


# ---- sizes without weights


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}


def test_blank_conditioning_is_shaped_like_encoded_prompts_and_loads_nothing(case):
    backbone = case.fresh()
    if case.family.name == "z_image":
        with pytest.raises(
            UserError,
            match="the planner cannot plan Z-Image, because its network computes with the length of each text",
        ):
            backbone.blank_conditioning(3)
        return
    with FakeTensorMode():
        blank = backbone.blank_conditioning(3)
    assert shapes(blank) == shapes(case.backbone.encode_prompts(PROMPTS))
    assert backbone.shared.keys() <= {"folder", "network_config", "tokenizer_config"}


@only("sd3")
@pytest.mark.parametrize("keep", [12, 23, 100])
def test_blank_conditioning_knows_compact_text(case, keep):
    backbone = case.fresh(compact_text=keep)
    backbone.setup(torch.device("cpu"))
    assert shapes(backbone.blank_conditioning(1)) == shapes(backbone.encode_prompts([PROMPTS[2]]))


def test_networks_without_weights_have_the_sizes_of_the_loaded_ones(case, monkeypatch):
    backbone = case.fresh(teacher_dtype="bfloat16")
    monkeypatch.setattr(backbone, "_load_pretrained", lambda *_: pytest.fail("weights were read"))
    view = backbone.at(64, 32)
    backbone.leave_weights_out()
    trained, teacher = backbone.build_network(), view.build_teacher()
    assert all(tensor.is_meta for network in (trained, teacher) for tensor in network.state_dict().values())
    assert shapes(dict(trained.named_parameters())) == shapes(dict(case.network.named_parameters()))
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert next(teacher.parameters()).dtype == torch.bfloat16
    assert backbone.build_empty(teacher=False) is None
    assert not {"_codec", "_text_parts"} & backbone.shared.keys()


def test_an_architecture_stands_in_for_the_folder(case):
    backbone = case.family.backbone("no/such-model", **case.family.options)
    known = {name: value for name, value in case.backbone.network_config.items() if not isinstance(value, bool)}
    backbone.leave_weights_out({"transformer": known, "vae": case.backbone.vae_config})
    assert backbone.latent_shape == case.backbone.latent_shape
    assert backbone.feature_width == case.backbone.feature_width
    assert len(backbone.blocks_of(backbone.build_network())) == len(case.backbone.blocks_of(case.network))
    assert "folder" not in backbone.shared


@only("sd3")
def test_a_lora_of_the_teachers_own_changes_no_size(case, tmp_path):
    factors = {"proj_out.lora_A.weight": torch.ones(1, 64), "proj_out.lora_B.weight": torch.ones(8, 1)}
    backbone = case.fresh(teacher_lora=write_lora_file(case.family.backbone.pipeline_class, factors, tmp_path))
    backbone.leave_weights_out()
    assert shapes(backbone.build_base().state_dict()) == shapes(case.network.state_dict())


# ---- time embeddings and hidden features


def test_what_is_added_to_the_time_embedding_reaches_the_velocity(case):
    x, sigma, seen = case.noise(), torch.tensor([0.2, 0.6, 0.9]), []
    field, added = case.field(PROMPTS), torch.tensor(0.0)

    def add(_module, _inputs, output):
        seen.append(output)
        return output + added

    with torch.no_grad():
        plain = field(x, sigma)
        with case.backbone.time_module(case.network).register_forward_hook(add):
            same = field(x, sigma)
            added = torch.randn(case.backbone.time_embedding_width, generator=torch.Generator().manual_seed(0))
            moved = field(x, sigma)
    assert [output.shape for output in seen] == [(3, case.backbone.time_embedding_width)] * 2
    assert torch.equal(same, plain)
    assert ((moved - plain).flatten(1).abs().amax(dim=1) > 1e-4).all()
    assert not torch.equal(seen[0][0], seen[0][1])  # each sample has its own time


def test_features_after_every_block(case):
    x, sigma, field = case.noise(), torch.tensor([0.2, 0.6, 0.9]), case.field(PROMPTS)
    blocks = case.backbone.blocks_of(case.network)
    with torch.no_grad():
        plain = field(x, sigma)
        velocity, features = field.with_features(x, sigma, range(len(blocks)))
    tokens = x[0, 0].numel() // case.backbone.patch**2
    for feature in features:
        assert feature.shape[::2] == (3, case.backbone.feature_width)
        assert feature.dtype == torch.float32
        if case.family.name != "z_image":  # its tokens are also those of the text
            assert feature.shape[1] == tokens
    assert features[-1].shape[1] >= tokens
    assert not torch.equal(features[-1][0], features[-1][1])
    assert torch.equal(velocity, plain)
    assert not any(block._forward_hooks for block in blocks)
    with pytest.raises(
        UserError, match=rf"block {len(blocks)} does not exist, .* the network's blocks: 0 to {len(blocks) - 1}"
    ):
        field.with_features(x, sigma, [0, len(blocks)])


UNUSED = {"allow_unused": True, "materialize_grads": True}  # the last text stream reaches nothing


def weights(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


@only("sd3", "flux_dev", "sana")
@pytest.mark.parametrize("checkpointing", [0.0, 1.0])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_features_are_those_of_a_hook_and_carry_gradients(case, checkpointing, lora):
    adapter = Adapter(rank=2, alpha=4) if lora else None
    student = Networks(
        case.backbone, CDM_ROLES, Recomputation(checkpointing), LoRAPlan(student=adapter, fake_score=adapter)
    ).student
    with torch.no_grad():
        for name, parameter in student.named_parameters():  # adapters start at nothing
            parameter += 0.1 * ("lora_B" in name)
    field, sigma, seen = case.field(PROMPTS, student), torch.tensor([0.2, 0.6, 0.9]), []
    x = case.noise().requires_grad_(True)
    last = case.backbone.blocks_of(student)[-1]
    with last.register_forward_hook(lambda _module, _inputs, output: seen.append(output)), torch.no_grad():
        plain = field(x, sigma)
    velocity, (feature, again) = field.with_features(x, sigma, [-1, len(case.backbone.blocks_of(student)) - 1])
    assert torch.equal(velocity.detach(), plain)
    assert torch.equal(feature.detach(), seen[0][-1] if isinstance(seen[0], tuple) else seen[0])
    assert again is feature
    ours = torch.autograd.grad((feature.square().mean() + velocity.square().mean()), [x, *weights(student)], **UNUSED)
    with last.register_forward_hook(lambda _module, _inputs, output: seen.append(output)):
        velocity = field(x, sigma)
        made = seen[1][-1] if isinstance(seen[1], tuple) else seen[1]
    theirs = torch.autograd.grad((made.square().mean() + velocity.square().mean()), [x, *weights(student)], **UNUSED)
    assert ours[0].abs().max() > 0
    assert sum(gradient.abs().max() > 0 for gradient in ours[1:]) > len(ours) / 2
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


@only("sd3")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_of_blocks_that_are_compiled(case, checkpointing):
    network = case.backbone.build_network()
    if checkpointing:
        case.backbone.enable_gradient_checkpointing(network)
    x, sigma, field = case.noise(), torch.tensor([0.2, 0.6, 0.9]), case.field(PROMPTS, network)
    expected = field.with_features(x, sigma, [0, 1])
    for block in case.backbone.blocks_of(network):
        block.compile(backend="eager")
    for _ in range(2):  # the compiled call, before and after there is a program
        velocity, features = field.with_features(x, sigma, [0, 1])
        torch.testing.assert_close(velocity, expected[0], **EXACT)
        torch.testing.assert_close(features, expected[1], **EXACT)
        assert torch.equal(field(x, sigma), velocity)
        features[1].square().mean().backward()
    assert network.transformer_blocks[0].ff.net[2].weight.grad.abs().max() > 0


@only("sd3")
def test_bfloat16_features_are_given_in_float32(case):
    networks = Networks(case.backbone, CDM_ROLES, lora=LoRAPlan(student=Adapter(rank=2), fake_score=Adapter(rank=2)))
    assert case.backbone.time_module(networks.teacher) is unwrapped(networks.student).time_text_embed
    field = case.field(PROMPTS, networks.student, compute_dtype=torch.bfloat16)
    _, (feature,) = field.with_features(case.noise(), torch.full((3,), 0.5), [-1])
    assert feature.dtype == torch.float32
    assert feature.grad_fn is not None
