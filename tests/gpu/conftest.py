"""Tests that need a CUDA device: all here are marked `gpu`, and are skipped where there is none.

`CDM_GPU_TESTS_ON=cpu` rehearses them: what they compare with the CPU is then compared with itself.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from cdm_lightning.config import compose
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import TrainResult, train

DEVICE = os.environ.get("CDM_GPU_TESTS_ON") or "cuda"
SHORT = (  # one cycle of two samples, without what is not asked for; the optimizers' steps are as even as the gradients are
    "callbacks=none",
    "logger=none",
    "schedule.length.high=3",
    "objective.student_every=2",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=0",
    "trainer.log_every_n_steps=1",
    "checkpoint.every=2",
    "optim.student.optimizer.eps=1e-3",
    "optim.fake_score.optimizer.eps=1e-3",
    # Without a step that is felt, the fake score is nearly the teacher, and the student's loss a difference of equal predictions.
    *(f"optim.{role}.learning_rate.{rate}" for role in ("student", "fake_score") for rate in ("peak=1e-2", "warmup=0")),
    "data.batch_size=2",
    "data.num_workers=0",
)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark and skip."""
    here = Path(__file__).parent
    lacking = DEVICE.startswith("cuda") and not torch.cuda.is_available()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if lacking:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture(scope="session")
def device() -> str:
    """The accelerator under test."""
    return DEVICE


@pytest.fixture(autouse=True)
def exact_products():
    """Products and convolutions in float32 are float32, not TF32, so that they can be compared with a CPU's."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture
def short_run(tiny_folder, prompt_file, tmp_path) -> Callable[..., TrainResult]:
    """`short_run("flux_dev", "cuda", "seed=3", folder="a")` trains a family's tiny pipeline by its own experiment in `tmp_path/a`."""

    def run(name: str, accelerator: str, *overrides: str, folder: str = "run") -> TrainResult:
        from tiny_pipelines import FAMILIES

        quiet_libraries()
        family = FAMILIES[name]
        exact = ("backbone.teacher_dtype=float32",) if "module.compute_dtype=float32" in overrides else ()
        return train(
            compose(
                [
                    f"experiment={family.experiment}",
                    *SHORT,
                    f"output_dir={tmp_path / folder}",
                    f"backbone.pretrained={tiny_folder(name)}",
                    "backbone.revision=null",
                    f"data.train.path={prompt_file}",
                    f"data.val.path={prompt_file}",
                    f"trainer.accelerator={accelerator}",
                    *(f"backbone.{option}={value}" for option, value in family.options.items()),
                    *exact,
                    *overrides,
                ]
            )
        )

    return run
