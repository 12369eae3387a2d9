"""A LoRA run from training to pictures: the real entry points on a tiny pipeline."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    StableDiffusion3Pipeline,
)

from cdm_lightning import export, sample
from cdm_lightning.backbones.lora_file import WEIGHTS, read_lora_file, write_lora_file
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import SamplerSpec, generate
from cdm_lightning.exporting.pipeline import MARKER
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.run.student import open_student
from cdm_lightning.train import TrainResult, train
from cdm_lightning.training.networks import Networks

CDM_ROLES = CDMObjective().roles

PROMPTS = ["a large red circle", "a small blue square above a green ring", "a ring"]
UNMERGED = (
    "objective.fake_score_merge=0",
    "callbacks.ladder.evaluation.count=2",
    "~metric.adherence",
    "~metric.frechet_teacher",
    "~metric.diversity",
)
KINDS = [Adapter(rank=3, alpha=6), Adapter(rank=2, alpha=1, use_rslora=True), Adapter(rank=2, alpha=2, use_dora=True)]
TOKENS = 16  # of T5: most of the time of a tiny network goes into 256
SMALL = (
    "experiment=tiny_sd3_cdm",
    "callbacks=none",
    "trainer.limit_val_batches=0",
    "trainer.max_steps=4",
    "objective.student_every=2",
    "compute.gradient_checkpointing=true",
    "data.batch_size=2",
    "schedule.length.high=3",
    "optim.student.learning_rate.peak=0.05",  # so that pictures change
    "optim.student.learning_rate.warmup=0",
    "backbone.compact_text=null",
    f"backbone.max_sequence_length={TOKENS}",
)


@pytest.fixture(scope="module")
def overrides(tiny_pipeline_folder, prompt_file) -> list[str]:
    data = [f"data.train.path={prompt_file}", f"data.val.path={prompt_file}"]
    return [*SMALL, f"backbone.pretrained={tiny_pipeline_folder}", *data]


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> TrainResult:
    """Four iterations of `lora=lora`."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    ranks = ["lora.student.rank=4", "lora.fake_score.rank=4"]
    return train(compose([f"output_dir={folder}", *overrides, "lora=lora", *ranks]))


def stock(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_images(pipeline, backbone, prompts: Sequence[str] = PROMPTS) -> torch.Tensor:
    noise = evaluation_noise(0, range(len(prompts)), backbone.latent_shape, "cpu")
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt", "max_sequence_length": TOKENS}
    return pipeline(list(prompts), latents=noise, **options).images


def with_lora(base: Path, folder: Path) -> StableDiffusion3Pipeline:
    """What the README of an exported LoRA says."""
    pipeline = stock(base)
    pipeline.load_lora_weights(folder, weight_name=WEIGHTS)
    pipeline.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipeline


def our_images(backbone, network) -> torch.Tensor:
    return generate(backbone, network, SamplerSpec("s", nfe=4), PROMPTS, range(3), seed=0, batch_size=3)


def assert_same_images(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# ---- checkpoints


def test_a_checkpoint_holds_adapters_and_their_optimizer_states_alone(run, tiny_pipeline_folder):
    stored = read_checkpoint(run.checkpoint)
    weights = stored.tensors("networks.")
    assert {name.split(".")[0] for name in weights} == {"student", "fake_score", "student_ema"}
    assert all(".lora_" in name for name in weights)
    adapter = sum(value.numel() for name, value in weights.items() if name.startswith("student."))
    tensors = {name: value for name, value in stored.tensors().items() if not name.endswith(".step")}
    assert sum(value.numel() for value in tensors.values()) == (3 + 2 * 2) * adapter
    assert sum(file.stat().st_size for file in run.checkpoint.iterdir()) < 4 * 7 * adapter + 600_000
    assert stored.record["fingerprint"].endswith(
        "+lora(student=4:128:attention_feed_forward, fake_score=4:128:attention_feed_forward)"
    )
    assert stored.ema_updates == 2


def test_a_checkpoint_of_other_adapters_is_refused(run, overrides, tmp_path):
    for other in (["lora=none"], ["lora=lora", "lora.student.rank=8", "lora.fake_score.rank=8"]):
        config = compose([f"output_dir={tmp_path / 'new'}", *overrides, *other, f"resume={run.checkpoint}"])
        with pytest.raises(UserError, match="but the configuration has"):
            train(config)


# ---- export and sampling


def test_an_exported_run_gives_the_samplers_images_fused_and_as_a_lora(run, tiny_pipeline_folder, tmp_path, capsys):
    found = open_student(run.folder)
    networks = Networks(found.backbone, CDM_ROLES, lora=found.plan)
    networks.student_ema.load_state_dict(found.network().tensors)
    found.backbone.setup(torch.device("cpu"))
    ours = our_images(found.backbone, networks.student_ema)
    assert (ours - our_images(found.backbone, networks.teacher)).abs().max() > 1e-2

    fused = export.export_checkpoint(run.folder, tmp_path / "fused")
    assert_same_images(ours, stock_images(stock(fused), found.backbone))
    export.main([str(run.folder), "--output", str(tmp_path / "lora"), "--form", "lora"])
    assert capsys.readouterr().out == f"exported pipeline: {tmp_path / 'lora'}\n"
    assert_same_images(ours, stock_images(with_lora(tiny_pipeline_folder, tmp_path / "lora"), found.backbone))

    made = sample.sample_images(str(run.folder), PROMPTS)
    assert made.steps == 4
    assert_same_images(made.images, ours)
    assert_same_images(sample.sample_images(str(run.checkpoint), PROMPTS).images, ours)
    added = sample.sample_images(str(tiny_pipeline_folder), PROMPTS, lora=str(tmp_path / "lora"))
    assert added.steps == 4
    assert_same_images(added.images, ours)
    with pytest.raises(UserError, match="--lora needs a pipeline"):
        sample.sample_images(str(run.folder), PROMPTS, lora=str(tmp_path / "lora"))

    files = {path.name for path in (tmp_path / "lora").iterdir()}
    assert files == {WEIGHTS, "scheduler", "call.json", "README.md", MARKER}
    assert json.loads((tmp_path / "lora" / MARKER).read_text())["form"] == "lora"
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "rank: 4" in card
    assert str(tmp_path) not in card
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace("BASE", str(tiny_pipeline_folder)).replace("FOLDER", str(tmp_path / "lora")), scope)
    assert scope["image"].size == (32, 32)


@pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: adapter.tag)
def test_every_kind_of_adapter_reads_back_in_plain_diffusers(adapter, tiny_pipeline_folder, tmp_path):
    backbone = SD3Backbone(str(tiny_pipeline_folder), max_sequence_length=TOKENS)
    backbone.setup(torch.device("cpu"))
    networks = Networks(backbone, CDM_ROLES, lora=LoRAPlan(student=adapter, fake_score=None))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in networks.student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = export.export_pipeline(backbone, networks.student, tmp_path / "lora", form="lora")
    ours = our_images(backbone, networks.student)
    assert (ours - our_images(backbone, networks.teacher)).abs().max() > 1e-2
    assert_same_images(ours, stock_images(with_lora(tiny_pipeline_folder, folder), backbone))


@pytest.mark.parametrize("mode", ["lora_student", "lora_fake_score"])
def test_mixed_modes_train_and_export(mode, overrides, tmp_path):
    adapter = mode.removeprefix("lora_")
    mixed = [f"lora={mode}", f"lora.{adapter}.rank=2", "objective.fake_score_merge=0"]
    result = train(compose([f"output_dir={tmp_path / 'run'}", *overrides, *mixed]))
    names = list(read_checkpoint(result.checkpoint).sizes)
    for role in ("student", "fake_score", "student_ema"):
        is_adapter = all(".lora_" in name for name in names if name.startswith(f"networks.{role}."))
        assert is_adapter == (role.removesuffix("_ema") == adapter)
    exported = export.export_checkpoint(result.folder, tmp_path / "student")
    assert SD3Backbone(str(exported)).build_network().proj_out.weight.isfinite().all()
    if adapter == "fake_score":
        with pytest.raises(UserError, match="extract_lora"):
            export.export_checkpoint(result.folder, tmp_path / "lora", form="lora")
        assert not (tmp_path / "lora").exists()


def test_a_family_without_lora_files_says_so(tmp_path):
    from cdm_lightning.backbones.toy2d import Toy2DBackbone

    adapter = Adapter(rank=1, targets="blocks")
    backbone = Toy2DBackbone(hidden=8, depth=1, fit_steps=2)
    student = Networks(backbone, CDM_ROLES, lora=LoRAPlan(student=adapter, fake_score=adapter)).student
    with pytest.raises(UserError, match="--form pipeline"):
        export.export_pipeline(backbone, student, tmp_path / "lora", form="lora")
    assert list(tmp_path.iterdir()) == []
    assert (export.export_pipeline(backbone, student, tmp_path / "fused") / "network.safetensors").is_file()


def test_a_pipeline_without_a_lora_loader_gets_a_file_for_its_transformer(tmp_path):
    network = LongCatImageTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 6, 6],
        in_channels=16,
    )
    layer = next(name for name, module in network.named_modules() if name.endswith("attn.to_q"))
    out_features, in_features = network.get_submodule(layer).weight.shape
    factors = {
        f"{layer}.lora_A.weight": torch.randn(2, in_features),
        f"{layer}.lora_B.weight": torch.randn(out_features, 2),
    }
    file = write_lora_file(LongCatImagePipeline, factors, tmp_path)
    own = read_lora_file(LongCatImagePipeline, file)
    assert own.tensors.keys() == factors.keys()
    assert own.settings is None
    before = network.get_submodule(layer).weight.detach().clone()
    network.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS)
    network.fuse_lora()
    network.unload_lora()
    change = network.get_submodule(layer).weight.detach() - before
    torch.testing.assert_close(change, factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"])


def test_the_recipe_of_24_gb_runs_on_a_tiny_folder(tiny_pipeline_folder, prompt_file, tmp_path):
    """bfloat16 base, rank 64, gradient checkpointing: all but the paths and sizes as conf/experiment has it."""
    paths = [f"backbone.pretrained={tiny_pipeline_folder}", f"data.train.path={prompt_file}", f"output_dir={tmp_path}"]
    sizes = ["backbone.max_sequence_length=8", "schedule.length.high=2", "trainer.max_steps=2", "data.num_workers=0"]
    result = train(
        compose(["experiment=sd3_cdm_lora", *paths, f"data.val.path={prompt_file}", *sizes, "callbacks=none"])
    )
    tensors = read_checkpoint(result.checkpoint).tensors("networks.")
    assert all(".lora_" in name and value.dtype == torch.float32 for name, value in tensors.items())
    assert any(
        value.any() for name, value in tensors.items() if name.startswith("student.transformer") and ".lora_B." in name
    )
    exported = export.export_checkpoint(tmp_path, tmp_path / "student", form="lora", dtype="bfloat16")
    assert with_lora(tiny_pipeline_folder, exported).get_active_adapters()


def test_a_lora_that_cannot_be_fused_ends_the_run_before_its_first_step(overrides, tmp_path, monkeypatch):
    def no_fusion(*_: object) -> None:
        raise NotImplementedError("this adapter cannot be merged")

    monkeypatch.setattr("cdm_lightning.lora.fuse.fuse", no_fusion)
    config = compose([f"output_dir={tmp_path}", *overrides, "lora=lora_student", "callbacks=ladder", *UNMERGED])
    with pytest.raises(UserError, match=r"cannot be fused .*NotImplementedError: this adapter cannot be merged"):
        train(config)
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == [".lock"]
