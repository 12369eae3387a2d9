"""Resuming on several processes: bit for bit in the same layout, to rounding in another one; and what can go wrong."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from killable import Run, start
from processes import train_together
from soak import soak
from test_resume import assert_equal_states

from cdm_lightning.cache_text import cache_text
from cdm_lightning.checkpoint.folder import checkpoints_in
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.errors import UserError
from cdm_lightning.objectives.base import TermLosses
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.train import train

LAYOUTS = {  # number of processes and overrides; the batch of all together is the same
    "single": (1, "strategy=single", "data.batch_size=4"),
    "ddp": (2, "strategy=ddp", "trainer.devices=2", "data.batch_size=2"),
    "fsdp2": (2, "strategy=fsdp2", "trainer.devices=2", "data.batch_size=2"),
}
SD3 = (
    "experiment=tiny_sd3_cdm",
    "callbacks=none",
    "trainer.accelerator=cpu",
    "trainer.limit_val_batches=0",
    "objective.student_every=2",
    "schedule.length.high=3",
    "backbone.max_sequence_length=8",
    "backbone.compact_text=null",
    "optim.student.learning_rate.total=10",
    "optim.fake_score.learning_rate.total=10",
    "checkpoint.keep=null",
)
ROLES = {
    "full": ("lora=none",),
    "lora": ("lora=lora", "lora.student.rank=2", "lora.fake_score.rank=2"),
}


def last(folder: Path) -> Path:
    return checkpoints_in(folder / "checkpoints")[-1]


def furthest(a: Path, b: Path) -> float:
    """The largest difference of any two weights."""
    left, right = (read_checkpoint(path).tensors("networks.") for path in (a, b))
    assert left.keys() == right.keys()
    return max((value - right[name]).abs().max().item() for name, value in left.items())


@pytest.fixture
def layouts(toy_overrides, tmp_path) -> Callable[..., Path]:
    """`layouts("fsdp2", "trainer.max_steps=3", folder="a")` trains the toy in that layout and gives the run folder."""

    def run(layout: str, *overrides: str, folder: str, base: list[str] = toy_overrides) -> Path:
        processes, *options = LAYOUTS[layout]
        arguments = [*base, "trainer.accelerator=cpu", *options, f"output_dir={tmp_path / folder}", *overrides]
        if processes == 1:
            train(compose(arguments))
        else:
            train_together(processes, arguments)
        return tmp_path / folder

    return run


@pytest.mark.parametrize(
    ("roles", "layout"),
    [
        ("full", "fsdp2"),
        pytest.param("lora", "ddp", marks=pytest.mark.slow),
        pytest.param("full", "ddp", marks=pytest.mark.slow),
        pytest.param("lora", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_five_and_five_equal_ten_with_the_sd3_classes_and_a_text_cache(
    layouts, tiny_pipeline_folder, prompt_file, tmp_path, layout, roles
):
    paths = [f"backbone.pretrained={tiny_pipeline_folder}", f"data.train.path={prompt_file}"]
    cache = [f"data.val.path={prompt_file}", f"text_cache.folder={tmp_path / 'cache'}", "text_cache.dtype=float32"]
    base = [*SD3, *ROLES[roles], *paths, *cache, "checkpoint.every=4"]
    cache_text(compose([*base, f"output_dir={tmp_path / 'unused'}"]))
    straight = layouts(layout, "trainer.max_steps=5", folder="straight", base=base)
    layouts(layout, "trainer.max_steps=3", folder="resumed", base=base)
    resumed = layouts(layout, "trainer.max_steps=5", folder="resumed", base=base)
    assert_equal_states(last(straight), last(resumed))
    assert read_checkpoint(last(resumed)).record["world_size"] == 2
    assert furthest(last(straight), checkpoints_in(straight / "checkpoints")[0]) > 0


@pytest.mark.parametrize(
    ("before", "after"), [("single", "fsdp2"), ("fsdp2", "single"), ("ddp", "fsdp2"), ("ddp", "single")]
)
def test_a_run_goes_on_in_another_layout(layouts, before, after):
    eps = ("optim.student.optimizer.eps=1e-3", "optim.fake_score.optimizer.eps=1e-3")  # steps as even as gradients
    straight = layouts("single", *eps, folder="straight")
    layouts(before, *eps, "trainer.max_steps=5", folder="moved")
    moved = layouts(after, *eps, folder="moved")
    assert furthest(last(straight), last(moved)) < 2e-6
    other = layouts("single", *eps, "seed=1", folder="other")
    assert furthest(last(straight), last(other)) > 1e-4


def test_another_batch_in_all_is_refused(layouts):
    layouts("single", "trainer.max_steps=1", folder="run")
    with pytest.raises(UserError, match=r"data.batch_size x processes"):
        layouts("single", "data.batch_size=2", folder="run")


# ---- faults


@pytest.fixture
def started(toy_overrides, tmp_path) -> Callable[..., Run]:
    """`started("ddp", "trainer.max_steps=3")` starts a toy run on two processes."""

    def begin(layout: str, *overrides: str, folder: str = "run", **options) -> Run:
        (tmp_path / folder).mkdir(exist_ok=True)
        processes, *arguments = LAYOUTS[layout]
        arguments = [*toy_overrides, "trainer.accelerator=cpu", *arguments, *overrides]
        return start(arguments, tmp_path / folder, processes, **options)

    return begin


@pytest.mark.parametrize(
    ("layout", "number", "ranks"),
    [("fsdp2", signal.SIGTERM, (0, 1)), ("fsdp2", signal.SIGTERM, (1,)), ("ddp", signal.SIGINT, (0,))],
    ids=str,
)
def test_a_signal_to_one_or_all_stops_all(started, layouts, tmp_path, layout, number, ranks):
    long = ("trainer.max_steps=400", "checkpoint.every=1000")
    run = started(layout, *long).wait_for_training().kill(number, *ranks)
    assert run.wait() == [75, 75], run.output
    stopped = last(tmp_path / "run")
    iteration = read_checkpoint(stopped).iteration
    assert 0 < iteration < 400
    straight = layouts(layout, f"trainer.max_steps={iteration}", folder="straight")
    assert_equal_states(last(straight), stopped)


def test_a_rank_that_dies_does_not_leave_the_other_waiting(started, layouts, tmp_path):
    run = started("fsdp2", "trainer.max_steps=2000", "checkpoint.every=5").wait_for_training()
    while not checkpoints_in(tmp_path / "run/checkpoints"):
        run.processes[0].join(0.05)
    run.kill(signal.SIGKILL, 1)
    codes = run.wait(60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 75), run.output
    iteration = read_checkpoint(last(tmp_path / "run")).iteration
    assert iteration >= 5
    layouts("fsdp2", f"trainer.max_steps={iteration + 2}", "checkpoint.every=5", folder="run")


def poison(rank: int) -> None:
    """An infinite loss on the second process alone, its gradient finite."""
    original, calls = CDMObjective.fake_score_losses, [0]

    def losses(self, sample) -> Iterator[TermLosses]:
        for loss in original(self, sample):
            calls[0] += 1
            spoilt = rank == 1 and calls[0] in (3, 4)
            yield TermLosses(loss.total + float("inf"), loss.terms, loss.logs) if spoilt else loss

    CDMObjective.fake_score_losses = losses


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_all_leave_an_update_out_where_one_has_an_infinite_loss(started, tmp_path, layout):
    run = started(layout, "trainer.max_steps=6", prepare=poison)
    assert run.wait() == [0, 0], run.output
    stored = read_checkpoint(last(tmp_path / "run"))
    assert stored.record["skipped_steps"] == {"student": 0, "fake_score": 2}
    assert all(torch.isfinite(value).all() for value in stored.tensors().values())
    steps = {value.item() for name, value in stored.tensors("optimizers.fake_score.").items() if name.endswith("step")}
    assert steps == {4.0}


def fill_up(rank: int) -> None:
    """The second process cannot write from its second save on."""
    if rank == 1:
        from cdm_lightning.checkpoint import tensors

        original, saves = tensors._SummedFiles.create_stream, [0]

        def create(self, path, mode):
            saves[0] += 1
            if saves[0] == 2:
                path = Path(path).with_name("link.safetensors")
                path.symlink_to("/dev/full")
            return original(self, path, mode)

        tensors._SummedFiles.create_stream = create


def test_a_disk_that_is_full_for_one_process_stops_none(started, tmp_path):
    run = started("fsdp2", "trainer.max_steps=6", "checkpoint.every=2", prepare=fill_up)
    assert run.wait() == [0, 0], run.output
    assert "WARNING: the checkpoint of iteration 4 could not be written" in run.output
    assert "No space left on device" in run.output
    left = sorted(os.listdir(tmp_path / "run/checkpoints"))
    assert left == [".lock", "iteration_0000002", "iteration_0000006"]


@pytest.mark.slow
def test_soak_on_two_processes(started, toy_overrides, tmp_path, capsys):
    """One of two processes is killed at random moments; the other has to stop by itself."""
    length = ("trainer.max_steps=300", "checkpoint.every=5", "trainer.log_every_n_steps=50")
    assert started("fsdp2", *length, folder="straight").wait(600) == [0, 0]
    (tmp_path / "soaked").mkdir()
    overrides = [*toy_overrides, "trainer.accelerator=cpu", *LAYOUTS["fsdp2"][1:], *length]
    losses = soak(overrides, tmp_path / "soaked", kills=12, seed=int(os.environ.get("SOAK_SEED", "0")), world_size=2)
    with capsys.disabled():
        print(f"\ntwo processes: {losses}")
    assert losses.bytes_lost == 0
    assert_equal_states(last(tmp_path / "straight"), last(tmp_path / "soaked"))
