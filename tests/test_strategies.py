"""Two processes do what one does on the same global batch, whatever the strategy and whatever is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import train_together

from cdm_lightning.checkpoint.stored import newest_checkpoint
from cdm_lightning.config import build, compose
from cdm_lightning.errors import UserError
from cdm_lightning.train import train

SD3 = (  # the pipeline's own path, as small as it goes; an optimizer whose steps are as even as the gradients are
    "experiment=tiny_sd3_cdm",
    "callbacks=ema",
    "trainer.limit_val_batches=0",
    "trainer.max_steps=4",
    "trainer.log_every_n_steps=1",
    "module.student_every=2",
    "module.gradient_checkpointing=true",
    "schedule.length.high=4",
    "backbone.max_sequence_length=8",
    "backbone.compact_text=null",
    "optim.student.learning_rate.warmup=0",
    "optim.fake_score.learning_rate.warmup=0",
    "optim.student.optimizer.eps=1e-3",
    "optim.fake_score.optimizer.eps=1e-3",
)
ROLES = {
    "full": (),
    "lora": ("lora=lora", "lora.student.rank=2", "lora.fake_score.rank=2"),
    "lora_student": ("lora=lora_student", "lora.student.rank=2", "module.fake_score_merge=0"),
    "lora_fake_score": ("lora=lora_fake_score", "lora.fake_score.rank=2", "module.fake_score_merge=0"),
}
Run = Callable[..., Path]


@pytest.fixture
def sd3(tiny_pipeline_folder, prompt_file) -> list[str]:
    """Overrides of a run of the tiny pipeline without its batch size."""
    paths = [f"backbone.pretrained={tiny_pipeline_folder}"]
    return [*SD3, *paths, f"data.train.path={prompt_file}", f"data.val.path={prompt_file}"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return newest_checkpoint(folder / "checkpoints").tensors("networks.")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between any two weights of the same name."""
    assert a.keys() == b.keys()
    return max((value - b[name]).abs().max().item() for name, value in a.items())


def assert_two_equal_one(overrides: list[str], folder: Path, *strategies: str) -> None:
    """Two processes with half the batch each end where one ends, to the rounding of a few steps, having moved much further."""
    train(compose([*overrides, "data.batch_size=4", f"output_dir={folder / 'single'}"]))
    alone = weights_of(folder / "single")
    for strategy in strategies:
        place = [f"output_dir={folder / strategy}", f"strategy={strategy}", "trainer.devices=2"]
        train_together(2, [*overrides, "data.batch_size=2", "trainer.accelerator=cpu", *place])
        assert furthest(weights_of(folder / strategy), alone) < 2e-6
    other = train(compose([*overrides, "data.batch_size=4", "seed=1", f"output_dir={folder / 'other'}"])).folder
    assert furthest(weights_of(other), alone) > 1e-4


def test_the_plane_on_two_processes(toy_overrides, tmp_path):
    assert_two_equal_one([*toy_overrides, "trainer.max_steps=6"], tmp_path, "ddp", "fsdp2", "hsdp")


@pytest.mark.parametrize("roles", ROLES)
def test_the_sd3_classes_on_two_processes(sd3, roles, tmp_path):
    assert_two_equal_one([*sd3, *ROLES[roles]], tmp_path, "ddp", "fsdp2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=single", "trainer.devices=2"], "strategy=single runs one process, 2 were asked for"),
        (["strategy=hsdp", "trainer.devices=3", "strategy.replicas=2"], "3 processes cannot be 2 equal groups"),
    ],
)
def test_layouts_that_cannot_be_are_refused(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build(compose([f"output_dir={tmp_path}", "experiment=toy2d_cdm", *overrides]), "strategy")


def test_a_launcher_that_started_another_number_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="ask for 2 processes, but the launcher started 4"):
        build(compose([f"output_dir={tmp_path}", "strategy=fsdp2", "trainer.devices=2"]), "strategy")
