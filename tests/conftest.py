"""What several tests need: a tiny pipeline folder, prompts, and short toy runs through the real entry point."""

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from cdm_lightning.backbones.toy2d import MODES, Toy2DBackbone
from cdm_lightning.config import compose
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import TrainResult, main, train

torch.set_num_threads(1)

TINY_TOY = (  # the plane with a small network that is hardly fitted: 10 ms an iteration
    "experiment=toy2d_cdm",
    "backbone.hidden=16",
    "backbone.depth=1",
    "backbone.fit_steps=20",
    "callbacks=none",
    "trainer.limit_val_batches=0",
    "trainer.max_steps=10",
    "trainer.log_every_n_steps=1",
    "optim.student.learning_rate.total=10",  # whatever max_steps is, so that a run in two parts has the same rates
    "optim.fake_score.learning_rate.total=10",
    "data=prompts",
    "data.batch_size=4",
)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a `StableDiffusion3Pipeline` of toy size with random weights; read only."""
    from cdm_lightning.pretraining.tiny_sd3 import build_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "tiny_sd3"
    build_pipeline(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder("longcat")` is the folder of that family's tiny pipeline, built once; read only."""

    @cache
    def folder(name: str) -> Path:
        from tiny_pipelines import FAMILIES

        made = tmp_path_factory.mktemp("pipelines") / name
        FAMILIES[name].build().save_pretrained(made)
        return made

    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text file of 28 different prompts, each naming two modes of the toy mixture."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"{a} and {b}\n" for a, b in itertools.combinations(MODES, 2)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def toy_overrides(prompt_file: Path) -> list[str]:
    """Overrides of a toy run of 10 iterations of 4 prompts, an average of the student and nothing else."""
    return [*TINY_TOY, f"data.train.path={prompt_file}", f"data.val.path={prompt_file}"]


@pytest.fixture
def toy_run(toy_overrides: list[str], tmp_path: Path) -> Callable[..., TrainResult]:
    """`toy_run("seed=3", folder="a")` trains in `tmp_path/a` through the entry point's own function."""

    def run(*overrides: str, folder: str = "run") -> TrainResult:
        quiet_libraries()
        return train(compose([f"output_dir={tmp_path / folder}", *toy_overrides, *overrides]))

    return run


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys, toy_overrides) -> Callable[..., str]:
    """`refused("a=b")` is the one line that a toy run ends with; no network is built before it."""

    def run(*overrides: str, base: Sequence[str] = toy_overrides) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", ["train", *base, "run_name=mine", *overrides])
        monkeypatch.setattr(Toy2DBackbone, "build_network", lambda self: pytest.fail("long work was begun"))
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1, printed.err
        return printed.err.strip()

    return run
