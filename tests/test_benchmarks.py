"""The step-time benchmark: the authors' order computes what ours does, costs are counted rightly, results are written."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import evidence, gpu_tables, inference, machine, step_time, tiny_sd3
from benchmarks.comparison import Comparison
from benchmarks.sizes import SIZES, Size
from cdm_lightning.planning.live import LiveBytes


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Stand-ins for outputs/benchmarks/ and benchmarks/results/, neither of which is there yet."""
    outputs, published = tmp_path / "outputs", tmp_path / "published"
    monkeypatch.setattr(evidence, "OUTPUTS", outputs)
    monkeypatch.setattr(evidence, "PUBLISHED", published)
    return outputs, published


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "checkpointed"])
def comparison(request) -> Comparison:
    return Comparison(Size(batch=3, cycles=1, longest_rollout=4, gradient_checkpointing=request.param))


def test_the_authors_order_gives_the_same_losses_and_gradients(comparison):
    before = [parameter.clone() for parameter in comparison.module.networks.parameters()]
    differences = comparison.check()["float32"]
    assert set(differences) == {
        f"{role}_{what}" for role in comparison.module.networks.trained for what in ("loss", "gradient")
    }
    assert max(differences.values()) < 1e-4
    assert all(map(torch.equal, before, comparison.module.networks.parameters()))


def test_an_order_that_computes_something_else_is_refused(comparison, monkeypatch):
    real = comparison.authors._student_loss
    monkeypatch.setattr(comparison.authors, "_student_loss", lambda *arguments: 1.01 * real(*arguments))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        comparison.check()


def test_costs_are_counted_as_the_mathematics_says(comparison):
    comparison.calls = 0
    comparison.run("authors", 1)
    steps = (
        comparison.module.schedule.sample(torch_rng(comparison, 1), comparison.module.backbone.shift_steps).shape[1] - 1
    )
    assert comparison.calls == 3 * (steps + 3 + 3 * 3 + 6)  # rollout, fake score, three student passes, six scores
    comparison.calls = 0
    comparison.run("ours", 1)
    assert comparison.calls <= 3 * (steps + 3 + 2 * 3 + 6)  # one student pass less, and nothing after the anchors
    assert comparison.forward_flops() > 1e7


def torch_rng(comparison, iteration):
    from cdm_lightning.core.rng import StepRandom

    return StepRandom(comparison.module.seed, iteration, range(3), "cpu")


def test_each_order_recomputes_what_it_is_told():
    """Ours half of the blocks, and no attention; the authors' all: the same losses and gradients by fewer operations."""
    size = Size(
        batch=2, cycles=1, longest_rollout=2, gradient_checkpointing=True, recompute=0.5, recompute_attention=False
    )
    compared = Comparison(size)
    assert max(compared.check()["float32"].values()) < 1e-4
    backbone, student = compared.module.backbone, compared.module.networks.student
    cond, x = backbone.encode_prompts(["a", "b"]), torch.zeros(2, *backbone.latent_shape)

    def operations(order: str | None) -> int:
        if order is None:
            student.disable_gradient_checkpointing()
        else:
            compared._put_blocks_as_they_are_in(order)
        with LiveBytes() as live:
            backbone.velocity(student, x, torch.full((2,), 0.5), cond).sum().backward()
        return live.flops

    ours, authors, nothing_twice = operations("ours"), operations("authors"), operations(None)
    assert nothing_twice < ours < authors


def test_a_size_in_bfloat16_is_checked_in_float32_too():
    size = Size(batch=3, cycles=1, longest_rollout=2, compute_dtype="bfloat16", teacher_dtype="bfloat16")
    compared = Comparison(size)
    found = compared.check()
    assert max(found["float32"].values()) < 1e-4 < max(found["bfloat16"].values())
    assert next(compared.module.networks.teacher.parameters()).dtype == torch.bfloat16
    assert compared.module.compute_dtype == torch.bfloat16


@pytest.mark.slow
def test_all_gpu_tables_are_made_one_after_another(capfd):
    """With a size that a CPU can run; a run that fails leaves a row that says why."""
    failing = gpu_tables.Candidate("never_written", "too much", "--size tiny --batch none")
    working = gpu_tables.Candidate(
        "rehearsal", "as it is", "--size tiny --batch 2 --cycles 1 --longest-rollout 2 --attention flash"
    )
    other = gpu_tables.Candidate("never_run", "another time", "--size tiny")
    files = [evidence.OUTPUTS / f"rehearsal.{ending}" for ending in ("json", "md")]
    try:
        failures = gpu_tables.run([failing, working])
        now = gpu_tables.table([failing, working, other], failures)
        later = gpu_tables.table([failing, working, other], {})  # what an earlier run has left
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    assert "invalid int value" in now[0]["failed"]
    assert float(now[1]["samples/s"]) > 0
    assert now[1]["commit"]
    assert now[1]["failed"] == ""
    assert later == now[1:]
    assert "too much" in capfd.readouterr().out


def test_the_gpu_tables_are_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_tables.main([])
    assert "no GPU here" in capsys.readouterr().err
    for candidate in gpu_tables.CANDIDATES:  # the arguments of each are known
        options = (inference.parser() if "inference" in candidate.module else step_time.parser()).parse_args(
            candidate.command[3:]
        )
        assert options.size in SIZES


def test_peak_memory_is_that_of_live_tensors():
    def work() -> None:
        kept = torch.zeros(1000, 250)
        for _ in range(3):
            _ = torch.zeros(2000, 250)
        del kept

    assert machine.peak_bytes(work, "cpu") == pytest.approx(5 * 10**6, rel=0.5)


def test_the_command_writes_its_tables_and_leaves_published_ones_alone(folders, capsys):
    outputs, published = folders
    step_time.main(["--size", "tiny", "--batch", "2", "--cycles", "2", "--longest-rollout", "3", "--frame", "2"])
    result = json.loads((outputs / "step_time_tiny.json").read_text())
    assert result["ours"]["samples_per_second"] > 0
    assert result["ours"]["calls_per_sample"] < result["authors"]["calls_per_sample"]
    assert 0 < result["memory_ratio"] < 1.2
    assert result["frame"]["bare_seconds"] > 0
    assert len(result["ratios"]) == 2
    text = (outputs / "step_time_tiny.md").read_text()
    said = capsys.readouterr().out
    assert "| ours / authors |" in text
    assert text.strip() in said
    assert f"written to: {outputs / 'step_time_tiny.md'}" in said
    assert not published.exists()


def test_the_published_size_has_two_billion_weights():
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network = SD3Transformer2DModel(**SIZES["sd3_medium"].network)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(2.03e9, rel=0.01)


@pytest.mark.slow
def test_seconds_of_images_with_compiled_blocks_are_published_on_demand(folders):
    outputs, published = folders
    inference.main(["--size", "tiny", "--batch", "2", "--repeats", "1", "--compile", "aot_eager", "--publish"])
    assert not outputs.exists()
    seconds = json.loads((published / "inference_tiny.json").read_text())["seconds_per_image"]
    assert set(seconds) == {
        name + kind for name in (inference.STUDENT, inference.TEACHER) for kind in ("", ", compiled")
    }
    assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())


def test_all_gpu_tables_are_published_on_demand(monkeypatch):
    """The switch reaches each process, and the table of all is made of published figures."""
    commands: list[list[str]] = []
    written: list[bool] = []

    def note(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="error: rehearsal")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda *_: {})
    monkeypatch.setattr(gpu_tables.subprocess, "run", note)
    monkeypatch.setattr(machine, "write_results", lambda *arguments: written.append(arguments[-1]))
    for switch in ([], ["--publish"]):
        gpu_tables.main(["step_time_longcat", *switch])
    assert ["--publish" in command for command in commands] == written == [False, True]


def test_a_published_student_is_compared_with_the_published_teacher_alone(folders, monkeypatch):
    outputs, published = folders
    monkeypatch.setattr(tiny_sd3, "bundle", lambda: "now")

    def measure(folder: Path, bundle: str) -> None:
        folder.mkdir(exist_ok=True)
        teacher = {"facts": {"bundle": bundle}, "rows": {"teacher": [{"sampler": folder.name}]}}
        (folder / "tiny_sd3_teacher.json").write_text(json.dumps(teacher))

    measure(outputs, "now")
    assert list(tiny_sd3.measured_teacher(publish=False)) == ["outputs"]
    with pytest.raises(SystemExit, match=r"no measurement of the bundled teacher .*teacher --publish` first"):
        tiny_sd3.measured_teacher(publish=True)
    measure(published, "now")
    assert list(tiny_sd3.measured_teacher(publish=True)) == ["published"]
    measure(outputs, "of another bundle")
    assert list(tiny_sd3.measured_teacher(publish=False)) == ["published"]
