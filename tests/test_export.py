"""Export: the folder that comes out is loaded by diffusers alone and gives the student's own images."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from cdm_lightning import export
from cdm_lightning.backbones.base import BoundField
from cdm_lightning.backbones.plain_scheduler import plain_scheduler
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.checkpoint.save import save_checkpoint
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.core.rollout import sample
from cdm_lightning.core.schedules import inference_sigmas, uniform_sigmas
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import SamplerSpec, generate
from cdm_lightning.exporting.model_card import metrics_table, recipe
from cdm_lightning.exporting.pipeline import MARKER
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.training.networks import Networks

CDM_ROLES = CDMObjective().roles

PROMPTS = ["a large red circle", "a small blue square above a green ring", "a ring"]


@pytest.fixture(scope="module")
def backbone(tiny_pipeline_folder) -> SD3Backbone:
    backbone = SD3Backbone(str(tiny_pipeline_folder))
    backbone.setup(torch.device("cpu"))
    return backbone


@pytest.fixture(scope="module")
def student(backbone) -> torch.nn.Module:
    """A network that is clearly not the pretrained one."""
    return perturbed(backbone.build_network(), seed=1).eval()


@pytest.fixture(scope="module")
def exported(backbone, student, tmp_path_factory) -> Path:
    return export.export_pipeline(backbone, student, tmp_path_factory.mktemp("export") / "student", nfe=4)


def perturbed(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network


def load(folder: Path, **options) -> StableDiffusion3Pipeline:
    """What a user does."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_call(pipeline, noise: torch.Tensor, nfe: int, guidance_scale: float = 1.0, **options) -> torch.Tensor:
    return pipeline(
        PROMPTS,
        num_inference_steps=nfe,
        guidance_scale=guidance_scale,
        latents=noise.clone(),
        output_type="pt",
        **options,
    ).images


def noise_for(backbone) -> torch.Tensor:
    return evaluation_noise(0, range(len(PROMPTS)), backbone.latent_shape, "cpu")


def write_run(folder: Path, pretrained: Path, ema_updates: int = 3) -> tuple[Path, Networks]:
    """A run folder as training leaves it, whose student and running average are two different networks."""
    backbone = SD3Backbone(str(pretrained), compact_text=20)
    networks = Networks(backbone, CDM_ROLES)
    perturbed(networks.student, seed=2)
    perturbed(networks.student_ema, seed=3)
    tensors = {f"networks.{name}": value for name, value in networks.state_dict().items()}
    record = {"fingerprint": backbone.fingerprint, "iteration": 10, "ema_updates": ema_updates}
    save_checkpoint(folder / "checkpoints", tensors, record, {})
    config = {
        "backbone": {
            "_target_": "cdm_lightning.backbones.sd3.SD3Backbone",
            "pretrained": str(pretrained),
            "compact_text": 20,
        },
        "objective": {"_target_": "cdm_lightning.core.objective.CDMObjective", "guidance_scale": 7.0},
        "data": {"train": {"path": str(folder / "prompts.txt")}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder, networks


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_pipeline_folder) -> tuple[Path, Networks]:
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny_pipeline_folder)


def same_weights(folder: Path, network: torch.nn.Module) -> bool:
    saved, expected = load(folder).transformer.state_dict(), network.state_dict()
    return saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


# ---- the schedule of the plain call


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 6, 8, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 100.0])
def test_the_plain_scheduler_runs_the_students_sigmas_in_every_number_of_steps(nfe, shift):
    made = plain_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), 4)
    plain = FlowMapEulerDiscreteScheduler.from_config(made.config)
    plain.set_timesteps(nfe)
    u = uniform_sigmas(nfe).double()
    expected = torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1)])
    torch.testing.assert_close(plain.sigmas.double(), expected, rtol=0, atol=2e-7)


def test_a_stock_scheduler_would_run_other_sigmas():
    """The reason for another class; if this fails, diffusers spaces its steps evenly now and the stock class would do."""
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(4)
    torch.testing.assert_close(stock.sigmas, torch.tensor([1, 0.8577, 0.6022, 0.0089, 0]), rtol=0, atol=1e-4)


def test_less_than_one_step_is_refused():
    with pytest.raises(UserError, match="nfe=0"):
        plain_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 0)


# ---- the exported folder


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_the_plain_call_gives_the_samplers_images(exported, backbone, student, guidance_scale):
    noise = noise_for(backbone)
    field = BoundField(backbone, student, backbone.encode_prompts(PROMPTS))
    ours = backbone.decode_latents(sample(field, noise, inference_sigmas(4, backbone.shift_sigmas)))
    theirs = plain_call(load(exported), noise, 4, guidance_scale)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # its scheduler computes in float64
    assert ours.std() > 0.05
    spec = SamplerSpec("student 4 steps", nfe=4)
    again = generate(backbone, student, spec, PROMPTS, range(3), seed=0, batch_size=3)
    torch.testing.assert_close(again, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_other_numbers_of_steps(backbone, student, tmp_path, nfe):
    folder = export.export_pipeline(backbone, student, tmp_path / "student", nfe=nfe)
    spec = SamplerSpec("student", nfe=nfe)
    ours = generate(backbone, student, spec, PROMPTS, range(3), seed=0, batch_size=3)
    theirs = plain_call(load(folder), noise_for(backbone), nfe)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # 3 steps: thirds are rounded in another order


def test_a_student_trained_on_compact_text_gives_the_same_images_by_the_stock_path(tiny_pipeline_folder, tmp_path):
    compact = SD3Backbone(str(tiny_pipeline_folder), compact_text=20)
    compact.setup(torch.device("cpu"))
    network = perturbed(compact.build_network(), seed=1)
    folder = export.export_pipeline(compact, network, tmp_path / "student", nfe=4)
    ours = generate(compact, network, SamplerSpec("student", nfe=4), PROMPTS, range(3), seed=0, batch_size=3)
    torch.testing.assert_close(ours, plain_call(load(folder), noise_for(compact), 4), rtol=0, atol=1e-5)


def test_image_and_text_sizes_stand_in_the_call_and_in_the_card(tiny_pipeline_folder, tmp_path):
    backbone = SD3Backbone(str(tiny_pipeline_folder), height=16, width=48, max_sequence_length=32)
    backbone.setup(torch.device("cpu"))
    network = backbone.build_network()
    folder = export.export_pipeline(backbone, network, tmp_path / "student", nfe=2)
    call = json.loads((folder / "call.json").read_text())
    sizes = {"max_sequence_length": 32, "height": 16, "width": 48}
    assert call == {"num_inference_steps": 2, "guidance_scale": 1.0, **sizes}
    assert "height=16, width=48" in (folder / "README.md").read_text()
    ours = generate(backbone, network, SamplerSpec("student", nfe=2), PROMPTS, range(3), seed=0, batch_size=3)
    torch.testing.assert_close(ours, plain_call(load(folder), noise_for(backbone), 2, **sizes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_networks_stay_near_and_take_half_the_space(exported, backbone, student, tmp_path, dtype):
    folder = export.export_pipeline(backbone, student, tmp_path / "student", nfe=4, dtype=dtype)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (folder / weights).stat().st_size < 0.52 * (exported / weights).stat().st_size
    noise = noise_for(backbone)
    images, exact = plain_call(load(folder), noise, 4), plain_call(load(exported), noise, 4)
    assert 0 < (images - exact).abs().max() < 0.1
    assert next(student.parameters()).dtype == torch.float32


def test_an_exported_folder_is_a_pretrained_pipeline_with_the_schedule_of_training(exported, backbone, student):
    again = SD3Backbone(str(exported))
    sigmas = torch.tensor([1.0, 0.8, 0.3])
    assert torch.equal(again.shift_sigmas(sigmas), backbone.shift_sigmas(sigmas))
    assert again.fingerprint == backbone.fingerprint
    assert torch.equal(again.build_network().proj_out.weight, student.proj_out.weight)


def test_the_other_parts_are_copied_byte_for_byte(exported, tiny_pipeline_folder):
    parts = ["vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
    for source in (file for part in parts for file in (tiny_pipeline_folder / part).rglob("*") if file.is_file()):
        assert (exported / source.relative_to(tiny_pipeline_folder)).read_bytes() == source.read_bytes()


def test_no_path_of_this_machine_is_exported(exported, tiny_pipeline_folder, tmp_path, run):
    export.export_checkpoint(run[0], tmp_path / "student")
    texts = [
        f for folder in (exported, tmp_path / "student") for f in folder.rglob("*") if f.suffix in (".json", ".md")
    ]
    assert len(texts) > 20
    for root in (tiny_pipeline_folder, run[0], tmp_path):
        assert not [file for file in texts if str(root.parent) in file.read_text(encoding="utf-8")]


# ---- from a run


def test_the_running_average_is_exported_by_default(run, tmp_path):
    folder, networks = run
    assert same_weights(export.export_checkpoint(folder, tmp_path / "ema"), networks.student_ema)
    checkpoint = folder / "checkpoints/iteration_0000010"
    assert same_weights(export.export_checkpoint(checkpoint, tmp_path / "s", weights="student"), networks.student)
    marker = json.loads((tmp_path / "ema" / MARKER).read_text())
    assert marker["weights"] == "student_ema"
    assert marker["iteration"] == 10


def test_without_an_average_the_student_is_exported(tmp_path, tiny_pipeline_folder):
    folder, networks = write_run(tmp_path / "run", tiny_pipeline_folder, ema_updates=0)
    assert same_weights(export.export_checkpoint(folder, tmp_path / "student"), networks.student)
    with pytest.raises(UserError, match="has no EMA of the student"):
        export.export_checkpoint(folder, tmp_path / "other", weights="student_ema")


def test_a_pipeline_that_has_moved(tmp_path, tiny_pipeline_folder, run):
    moved = tmp_path / "moved"
    write_run(moved, tiny_pipeline_folder)
    config = (moved / "config.yaml").read_text().replace(str(tiny_pipeline_folder), str(tmp_path / "gone"))
    (moved / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=r"gone.*does not exist"):
        export.export_checkpoint(moved, tmp_path / "student")
    export.export_checkpoint(moved, tmp_path / "student", pretrained=str(tiny_pipeline_folder))


def test_model_card_says_what_it_is_how_it_was_made_and_what_was_measured(tmp_path, tiny_pipeline_folder):
    folder, _ = write_run(tmp_path / "run", tiny_pipeline_folder)
    rows = [{"sampler": "teacher 50 steps", "frechet_real": 1.25}, {"sampler": "student 4 steps", "frechet_real": 0.5}]
    (folder / "metrics.json").write_text(json.dumps({"settings": {}, "rows": rows}))
    card = (export.export_checkpoint(folder, tmp_path / "student") / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "diffusers"
    assert header["tags"] == ["distillation", "few-step"]
    assert "base_model" not in header  # a local folder means nothing to others
    assert "| student 4 steps | 0.5 |" in card
    assert "guidance_scale: 7.0" in card
    assert "class: CDMObjective" in card
    assert "iterations of training | 10" in card
    assert 'pipe("a prompt", num_inference_steps=4, guidance_scale=1.0)' in card
    assert "1 > 0.9 > 0.75 > 0.5 > 0" in card


def test_the_cards_example_runs(exported, monkeypatch):
    code = (exported / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace("FOLDER", str(exported)), scope)
    assert scope["image"].size == (32, 32)


def test_metrics_tables():
    assert metrics_table(None) == metrics_table({}) == metrics_table("?") == "None were recorded with the run."
    assert metrics_table({"fid": 1.5}).splitlines()[-1] == "| fid | 1.5 |"
    assert metrics_table({"student": {"fid": 1.5, "n": None}}).splitlines()[-1] == "| student | 1.5 |  |"


def test_recipe_hides_folders_but_not_hub_ids_or_files():
    config = {
        "data": {"path": "/home/someone/prompts.txt", "name": "owner/set", "_target_": "a.b.PromptFile"},
        "logger": {"token": "x"},
        "trainer": {"max_steps": 4, "devices": 1},
        "callbacks": {"report": {"folder": "x"}},
        "ema": {"decay": 0.99},
        "compute": {"accumulate": 2},
        "module": {"compute_dtype": "float32", "ema": {"decay": 0.99}, "samplers": [1]},
    }
    assert recipe(config) == {
        "data": {"class": "PromptFile", "path": "prompts.txt", "name": "owner/set"},
        "trainer": {"max_steps": 4},
        "ema": {"decay": 0.99},
        "module": {"compute_dtype": "float32"},
    }


# ---- what is refused, in one line


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        export.export_checkpoint(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_output_that_is_a_file(run, tmp_path):
    (tmp_path / "student").write_text("mine")
    assert "is a file" in refusal(run[0], tmp_path / "student")
    assert (tmp_path / "student").read_text() == "mine"
    assert "cannot be written" in refusal(run[0], tmp_path / "student" / "inside")


def test_folder_that_no_export_wrote(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    assert "was not written by an export" in refusal(run[0], tmp_path / "mine")
    assert "was not written by an export" in refusal(run[0], run[0])
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    export.export_checkpoint(run[0], tmp_path / "empty")


def test_an_earlier_export_is_replaced_as_a_whole(run, tmp_path):
    folder = export.export_checkpoint(run[0], tmp_path / "student", nfe=4)
    (folder / "left over.txt").write_text("")
    export.export_checkpoint(run[0], folder, nfe=2)
    assert not (folder / "left over.txt").exists()
    assert json.loads((folder / "call.json").read_text())["num_inference_steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_failed_export_leaves_the_earlier_one_and_nothing_else(run, tmp_path):
    folder = export.export_checkpoint(run[0], tmp_path / "student")
    assert "nfe=0 must be at least 1" in refusal(run[0], folder, nfe=0)
    (run[0] / "metrics.json").write_text("{ half a")
    try:
        assert "metrics.json cannot be read" in refusal(run[0], folder)
    finally:
        (run[0] / "metrics.json").unlink()
    assert same_weights(folder, run[1].student_ema)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_sources_that_are_no_run(tmp_path, run):
    assert "does not exist" in refusal(tmp_path / "nowhere", tmp_path / "student")
    (tmp_path / "empty").mkdir()
    assert "is not a run folder" in refusal(tmp_path / "empty", tmp_path / "student")
    (tmp_path / "empty/config.yaml").write_text("run_name: x\n")
    assert "has no option `backbone`" in refusal(tmp_path / "empty", tmp_path / "student")
    (tmp_path / "empty/config.yaml").write_text((run[0] / "config.yaml").read_text())
    assert "has no checkpoint yet" in refusal(tmp_path / "empty", tmp_path / "student")


def test_truncated_checkpoint(tmp_path, tiny_pipeline_folder):
    folder, _ = write_run(tmp_path / "run", tiny_pipeline_folder)
    checkpoint = folder / "checkpoints/iteration_0000010"
    shard = next(checkpoint.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "truncated" in refusal(checkpoint, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_checkpoint_of_another_backbone(tmp_path, tiny_pipeline_folder):
    folder, _ = write_run(tmp_path / "run", tiny_pipeline_folder)
    checkpoint = folder / "checkpoints/iteration_0000010"
    stored = read_checkpoint(checkpoint)
    save_checkpoint(checkpoint.parent, stored.tensors(), {**stored.record, "fingerprint": "toy2d-0123"}, {})
    assert "toy2d-0123" in refusal(checkpoint, tmp_path / "student")


# ---- the command line


def test_command_line(run, tmp_path, capsys):
    export.main([str(run[0]), "--output", str(tmp_path / "student"), "--nfe", "2", "--dtype", "bfloat16"])
    assert capsys.readouterr().out == f"exported pipeline: {tmp_path / 'student'}\n"
    marker = json.loads((tmp_path / "student" / MARKER).read_text())
    assert (marker["nfe"], marker["dtype"]) == (2, "bfloat16")


def test_command_line_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "student")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'nowhere'} does not exist; pass a run folder or one of its checkpoints\n"
    )
