"""`python -m benchmarks.gpu` on the CPU with toys: it writes after every figure, goes on after errors and keeps to its minutes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bench, kernels, plans, steps
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.correctness import Outcomes
from benchmarks.gpu.record import LEFT_OUT, Record
from benchmarks.gpu.sizes import NETWORKS, Networks, label, peak_of
from benchmarks.sizes import SIZES

ONE = (Networks("sd3_toy", (2,)),)


@pytest.fixture
def record(tmp_path) -> Record:
    return Record("rehearsal", {"hardware": "a CPU"}, tmp_path, minutes=5)


def on_disk(record: Record) -> dict:
    return json.loads((record.folder / "rehearsal.json").read_text())["tables"]


class NoPlans:
    """In the place of the process that plans."""

    def __init__(self, sizes: list) -> None:
        self.sizes = sizes

    def found(self, seconds: float = 0.0) -> dict:
        return {(name, size.batch, size.accumulate): {"all": 2e9, "rollout": 1e9} for name, size in self.sizes}

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(NETWORKS, "toy", ONE)
    monkeypatch.setattr(steps, "Plans", NoPlans)
    monkeypatch.setattr(steps, "CYCLES", 1)
    monkeypatch.setattr(kernels, "REPEATS", 1)


def test_every_figure_is_on_disk_before_the_next_is_measured(record):
    record.put("A", "first", seconds=1.5)
    assert on_disk(record) == {"A": {"first": {"seconds": 1.5}}}

    def dies() -> None:
        assert on_disk(record)["A"]["first"]["seconds"] == 1.5
        raise RuntimeError("out of | memory\nmore")

    assert not record.attempt("second", dies)
    assert record.attempt("third", lambda: record.put("A", "third", share=0.25))
    assert on_disk(record)[LEFT_OUT] == {"second": {"reason": "RuntimeError: out of | memory"}}
    text = (record.folder / "rehearsal.md").read_text()
    assert "| second | RuntimeError: out of / memory |" in text
    assert "| third |  | 0.25 |" in text


def test_what_has_no_time_left_is_left_out(tmp_path):
    record = Record("rehearsal", {}, tmp_path, minutes=0.05)
    assert not record.attempt("long", lambda: pytest.fail("it was begun"), seconds=60)
    assert record.attempt("short", lambda: None)
    assert "about 60 s needed" in on_disk(record)[LEFT_OUT]["long"]["reason"]


def test_a_step_has_all_its_tables(record, small):
    steps.step(record, "toy", "cpu")
    tables = on_disk(record)
    row = "sd3_toy, batch 2, eager"
    assert {row, "sd3_toy, batch 2, authors"} <= tables[bench.STEP].keys()
    assert tables[bench.STEP][row]["calls a sample"] < tables[bench.STEP]["sd3_toy, batch 2, authors"]["calls a sample"]
    assert set(tables[bench.PHASES][row]) == {"rollout", "fake_score", "student", "rest"}
    assert tables[bench.PEAK][row]["planned, GB"] == 2
    assert tables[bench.WAITS][row] == {"an iteration": 0.0, "places": "none"}
    assert sum(
        tables["Where the time goes"]["sd3_toy, batch 2, student forward and backward"].values()
    ) == pytest.approx(1)
    assert (record.folder / "rehearsal_profile_sd3_toy_batch_2_student_forward_and_backward.txt").read_text()
    assert tables["Times as fast"]["sd3_toy, batch 2"]["eager against authors"] > 0


@pytest.mark.slow
def test_compiled_blocks_are_beside_plain_ones_and_nothing_is_compiled_anew(record, small):
    steps.compiled(record, "toy", "cpu", "eager")
    tables = on_disk(record)
    compilation = tables[steps.COMPILATION]["sd3_toy, batch 2, ours"]
    assert compilation["variants"] > 0 == compilation["recompiled"] == compilation["calls given up"]
    assert {"ours against eager", "ours against authors"} <= tables["Times as fast"]["sd3_toy, batch 2"].keys()
    for name in steps.OPTIONS:
        assert any(f"({name})" in key for key in tables[bench.STEP])


def test_every_command_comes_to_its_table(small, monkeypatch, tmp_path):
    """The command lines of a GPU lease, whole: tests/gpu is one small file here, and no block is really compiled."""
    test = "import pytest\n\n\n@pytest.mark.gpu\ndef test_small():\n    assert {}\n"
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "test_good.py").write_text(test.format(True))
    (tmp_path / "gpu" / "test_bad.py").write_text(test.format("1 == 2"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    monkeypatch.setattr("benchmarks.gpu.correctness.TESTS", tmp_path / "gpu")
    monkeypatch.setenv("CDM_GPU_TESTS_ON", "")  # set by the command
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("benchmarks.gpu.memory.Plans", NoPlans)
    monkeypatch.setattr("benchmarks.gpu.memory.BATCHES", (1,))
    monkeypatch.setattr(steps, "OPTIONS", {"attention kept": {"recompute_attention": False}})
    monkeypatch.setattr("cdm_lightning.training.networks.compile_blocks", lambda *_: None)
    expected = {
        "correctness": {"Losses and gradients of our order against the authors'": 6, "Tests": 2},
        "step": {bench.STEP: 2, bench.PHASES: 2, bench.PEAK: 2, "Times as fast": 1},
        "compiled": {steps.COMPILATION: 1, bench.STEP: 4, "Times as fast": 1},
        "memory": {"Decoding, GB": 4, "What rests, GB": 1, "Peak of each phase, GB": 1},
    }
    for command, tables in expected.items():
        main([command, "--device", "cpu", "--size", "toy", "--out", str(tmp_path / "out"), "--minutes", "2"])
        found = json.loads((tmp_path / "out" / f"gpu_{command}.json").read_text())["tables"]
        assert {name: len(found.get(name, {})) for name in tables} == tables, command
        for name in tables:
            assert f"## {name}" in (tmp_path / "out" / f"gpu_{command}.md").read_text()
    assert {row["outcome"] for row in load(tmp_path, "correctness")["Tests"].values()} == {"passed", "failed"}
    peaks = load(tmp_path, "memory")["Peak of each phase, GB"]["sd3_toy, batch 2"]
    assert peaks["all, planned"] == 2
    assert 0 < peaks["all, measured"] < 1


def load(folder: Path, command: str) -> dict:
    return json.loads((folder / "out" / f"gpu_{command}.json").read_text())["tables"]


def test_an_error_in_one_network_leaves_the_others(record, small, monkeypatch):
    monkeypatch.setitem(NETWORKS, "toy", (Networks("sd3_toy", (2, 3)),))
    cycle = bench.Bench.cycle

    def too_much(self, order: str, number: int) -> None:
        if self.size.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        cycle(self, order, number)

    monkeypatch.setattr(bench.Bench, "cycle", too_much)
    steps.step(record, "toy", "cpu")
    tables = on_disk(record)
    assert "out of memory" in tables[LEFT_OUT]["sd3_toy, batch 2, eager: warm-up"]["reason"]
    assert "sd3_toy, batch 3, eager" in tables[bench.STEP]


def test_the_plan_of_a_benchmark_is_that_of_its_phases():
    found = plans.plan(SIZES["sd3_toy"])
    assert found["all"] == max(
        size for phase, size in found.items() if phase not in ("all", "tflop a sample and iteration")
    )
    assert {"rollout", "fake_score", "student", "optimizer step"} <= found.keys()


def test_a_quarter_of_longcat_has_its_width():
    full, quarter = SIZES["longcat"].network, SIZES["longcat_quarter"].network
    assert 0.2 < (quarter["num_layers"] + quarter["num_single_layers"]) / 30 < 0.3
    assert {k: v for k, v in full.items() if "layers" not in k} == {
        k: v for k, v in quarter.items() if "layers" not in k
    }


def test_kernels_and_cards_are_known_by_their_names():
    assert kernels.kind_of("void cutlass::device_kernel<flash::FlashAttnFwdSm90>") == "attention"
    assert kernels.kind_of("nvjet_tst_256x128_64x4") == "products"
    assert kernels.kind_of("vectorized_elementwise_kernel") == "element-wise"
    assert peak_of("NVIDIA H100 80GB HBM3, 16 CPU cores") == 989e12
    assert peak_of("2 CPU cores") is None
    assert label(SIZES["sd3_toy"]) == "batch 2"


def test_outcomes_of_tests_are_written_one_by_one(record):
    class Report:
        when, outcome, failed, nodeid, duration = "call", "failed", True, "tests/gpu/test_a.py::test_b", 0.1
        longreprtext = "code\nE   assert 1 == 2\nE    more"

    Outcomes(record).pytest_runtest_logreport(Report())
    assert on_disk(record)["Tests"]["test_a.py::test_b"] == {
        "outcome": "failed",
        "seconds": 0.1,
        "said": "assert 1 == 2",
    }


def test_without_a_gpu_it_says_how_to_rehearse(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["step", "--out", str(tmp_path)])
    assert "--device cpu --size toy" in capsys.readouterr().err


def test_no_file_of_it_asks_for_a_hub():
    for file in Path(bench.__file__).parent.glob("*.py"):
        assert "from_pretrained" not in file.read_text(encoding="utf-8")
