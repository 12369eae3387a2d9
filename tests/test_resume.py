"""A run that is stopped and resumed equals one that is not, bit for bit, through the real entry point."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cdm_lightning.checkpoint.folder import checkpoints_in
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.errors import UserError
from cdm_lightning.module import CDMModule
from cdm_lightning.train import TrainResult, train

SD3_SMALL = (  # the pipeline's own path, as small as it goes
    "experiment=tiny_sd3_cdm",
    "callbacks=none",
    "trainer.limit_val_batches=0",
    "objective.student_every=2",
    "compute.gradient_checkpointing=true",
    "data.batch_size=2",
    "schedule.length.high=3",
    "backbone.max_sequence_length=16",
    "optim.student.learning_rate.total=10",  # whatever max_steps is, so that a run in two parts has the same rates
    "optim.fake_score.learning_rate.total=10",
)

ROLES = (  # all weights, two adapters on one base, an adapter beside a whole network
    ("lora=none",),
    ("lora=lora", "lora.student.rank=2", "lora.fake_score.rank=2"),
    ("lora=lora_student", "lora.student.rank=2", "objective.fake_score_merge=0"),
)


def assert_equal_states(a: Path, b: Path) -> None:
    """Weights of all networks, both optimizers and all counters of two checkpoints are equal bit for bit."""
    left, right = (read_checkpoint(path) for path in (a, b))
    assert left.record == right.record
    tensors, others = left.tensors(), right.tensors()
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.equal(value, others[name]), name


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """(iteration, prompts) of every training step from here on."""
    steps: list[tuple[int, list[str]]] = []
    original = CDMModule.training_step

    def recording(self, batch, batch_idx):
        steps.append((self.iteration, batch.prompts))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(CDMModule, "training_step", recording)
    return steps


def assert_resume_is_exact(run: Callable[..., TrainResult], seen: list, half: int = 5) -> None:
    """`half` is odd, so that a run stops between two iterations with a student that roll out together."""
    whole = 2 * half
    straight = run(f"trainer.max_steps={whole}", folder="straight")
    straight_steps = list(seen)
    seen.clear()
    first = run(f"trainer.max_steps={half}", folder="resumed")
    assert first.iteration == half
    resumed = run(f"trainer.max_steps={whole}", folder="resumed")
    assert seen == straight_steps
    assert [iteration for iteration, _ in seen] == list(range(whole))
    assert resumed.iteration == whole
    assert_equal_states(straight.checkpoint, resumed.checkpoint)


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_iterations_equal_five_and_five(toy_run, seen, workers):
    def run(*overrides: str, folder: str) -> TrainResult:
        return toy_run(f"data.num_workers={workers}", *overrides, folder=folder)

    assert_resume_is_exact(run, seen)
    stored = read_checkpoint(toy_run("trainer.max_steps=10", folder="straight").checkpoint)
    assert stored.ema_updates == 5
    for name in ("student", "fake_score", "student_ema"):
        assert stored.network_weights(name)
    for name, steps in (("student", 5.0), ("fake_score", 10.0)):  # Adam's own count
        counts = {key: value for key, value in stored.tensors(f"optimizers.{name}.").items() if key.endswith(".step")}
        assert counts
        assert {count.item() for count in counts.values()} == {steps}


@pytest.mark.parametrize(
    "roles",
    [*ROLES[:2], pytest.param(ROLES[2], marks=pytest.mark.slow)],
    ids=lambda roles: roles[0],
)
def test_resume_is_exact_with_the_sd3_classes(tiny_pipeline_folder, prompt_file, tmp_path, seen, roles):
    def run(*overrides: str, folder: str) -> TrainResult:
        paths = [f"backbone.pretrained={tiny_pipeline_folder}", "backbone.compact_text=null"]
        paths += [f"data.train.path={prompt_file}", f"data.val.path={prompt_file}", f"output_dir={tmp_path / folder}"]
        return train(compose([*SD3_SMALL, *roles, *paths, *overrides]))

    assert_resume_is_exact(run, seen, half=3)


def test_another_seed_is_another_run(toy_run):
    """The comparison above can fail."""
    one, other = toy_run(folder="one"), toy_run("seed=1", folder="other")
    with pytest.raises(AssertionError):
        assert_equal_states(one.checkpoint, other.checkpoint)


def test_a_killed_run_goes_on_from_its_newest_checkpoint(toy_run, monkeypatch, seen):
    straight = toy_run(folder="straight")
    recording = CDMModule.training_step

    def dying(self, batch, batch_idx):
        if self.iteration == 7:
            raise RuntimeError("killed")
        return recording(self, batch, batch_idx)

    monkeypatch.setattr(CDMModule, "training_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        toy_run("checkpoint.every=3", folder="killed")
    monkeypatch.setattr(CDMModule, "training_step", recording)
    seen.clear()
    resumed = toy_run("checkpoint.every=3", folder="killed")
    assert [iteration for iteration, _ in seen] == [6, 7, 8, 9]
    assert_equal_states(straight.checkpoint, resumed.checkpoint)


def test_validation_and_its_rhythm_do_not_touch_training(toy_run, seen):
    straight = toy_run(folder="straight")
    seen.clear()
    validating = ("trainer.limit_val_batches=1.0", "trainer.val_check_interval=5", "data.val_prompts=3")
    toy_run("trainer.max_steps=5", *validating, folder="validated")
    resumed = toy_run(*validating, folder="validated")
    assert [iteration for iteration, _ in seen] == list(range(10))
    assert_equal_states(straight.checkpoint, resumed.checkpoint)


def test_a_finished_run_is_left_as_it_is(toy_run, seen):
    finished = toy_run()
    before = finished.checkpoint.stat().st_mtime_ns
    seen.clear()
    again = toy_run()
    assert seen == []
    assert again.iteration == 10
    assert again.checkpoint.stat().st_mtime_ns == before


def test_logs_go_on_at_the_right_iteration(toy_run, tmp_path):
    toy_run("trainer.max_steps=4", "trainer.log_every_n_steps=3")
    toy_run("trainer.max_steps=10", "trainer.log_every_n_steps=3")
    first, second = ((tmp_path / f"run/logs/version_{n}/metrics.csv").read_text().splitlines() for n in (0, 1))
    column = first[0].split(",").index("step")
    assert [int(line.split(",")[column]) for line in first[1:]] == [3]
    assert [int(line.split(",")[column]) for line in second[1:]] == [6, 9]


def test_a_checkpoint_given_by_path_is_taken(toy_run, tmp_path):
    straight = toy_run(folder="straight")
    half = toy_run("trainer.max_steps=5", folder="half")
    forked = toy_run(f"resume={half.checkpoint}", folder="fork")
    assert_equal_states(straight.checkpoint, forked.checkpoint)


def test_old_checkpoints_are_dropped(toy_run):
    result = toy_run("checkpoint.every=2", "checkpoint.keep=2")
    kept = checkpoints_in(result.folder / "checkpoints")
    assert [path.name for path in kept] == ["iteration_0000008", "iteration_0000010"]
    everything = toy_run("checkpoint.every=2", "checkpoint.keep=null", folder="all")
    assert len(checkpoints_in(everything.folder / "checkpoints")) == 5
    found = sorted(path.name for path in (result.folder / "checkpoints").iterdir())
    assert found == [".lock", *(path.name for path in kept)]


def test_another_configuration_is_refused_but_a_longer_run_is_not(toy_run):
    toy_run("trainer.max_steps=2")
    with pytest.raises(UserError, match=r"\(it differs in objective.student_every\)"):
        toy_run("objective.student_every=3")
    with pytest.raises(UserError, match=r"ema.decay"):
        toy_run("ema.decay=0.5")
    with pytest.raises(UserError, match=r"data.batch_size"):
        toy_run("data.batch_size=2")
    assert toy_run("trainer.max_steps=4", "data.num_workers=1", "trainer.log_every_n_steps=2").iteration == 4


def test_a_run_from_before_an_option_goes_on_while_the_option_is_off(toy_run):
    """Options that a new version adds are off by default, and must not end the runs of the old one."""
    saved = toy_run("trainer.max_steps=1").folder / "config.yaml"
    lines = saved.read_text().splitlines(keepends=True)
    older = [line for line in lines if line.split(":")[0].strip() not in ("rollouts_together", "streaming")]
    assert len(older) < len(lines)
    saved.write_text("".join(older))
    assert toy_run("trainer.max_steps=2").iteration == 2
    assert toy_run("trainer.max_steps=3", "compute.rollouts_together=1").iteration == 3


def as_written_before(saved: Path, **of_module: object) -> None:
    """Rewrite a run's configuration as versions before 2026-11-27 wrote it.

    The turns, compute and the samplers were the module's options then, and the EMA was a callback.
    """
    config = yaml.safe_load(saved.read_text())
    module, objective = config["module"], config["objective"]
    for name in ("metric", "feature"):
        del config[name]
    config["callbacks"] = {
        "ema": {"_target_": "cdm_lightning.callbacks.ema.StudentEMA", "decay": config["ema"]["decay"]}
    }
    module |= {"samplers": config.pop("validation")["samplers"], **config.pop("compute")}
    module["_target_"] = "cdm_lightning.module.CDMModule"
    del config["ema"], module["ema"], module["compute"]
    for recipe in module["optim"].values():
        recipe["_target_"] = "cdm_lightning.optim.OptimizerRecipe"
    config["resolution"]["_target_"] = "cdm_lightning.resolution.OwnSize"
    module |= {name: objective.pop(name) for name in ("student_every", "fake_score_steps", "fake_score_merge")}
    objective["_target_"] = "cdm_lightning.core.objective.CDMObjective"
    optim = module.pop("optim")
    module |= {"student_optim": optim["student"], "fake_score_optim": optim["fake_score"], "objective": objective}
    saved.write_text(yaml.safe_dump({**config, "module": {**module, "spread_anchors": False, **of_module}}))


def test_a_run_of_the_version_before_goes_on_although_options_have_moved(toy_run):
    undisturbed = toy_run("trainer.max_steps=4", folder="undisturbed")
    saved = toy_run("trainer.max_steps=2").folder / "config.yaml"
    as_written_before(saved)
    with pytest.raises(UserError, match=r"\(it differs in objective.student_every\)"):
        toy_run("trainer.max_steps=4", "objective.student_every=3")
    with pytest.raises(UserError, match=r"\(it differs in .*optim.student.learning_rate.peak\)"):
        toy_run("trainer.max_steps=4", "optim.student.learning_rate.peak=1.0")
    with pytest.raises(UserError, match=r"\(it differs in ema.decay\)"):
        toy_run("trainer.max_steps=4", "ema.decay=0.5")
    assert_equal_states(toy_run("trainer.max_steps=4").checkpoint, undisturbed.checkpoint)


def test_an_ema_may_not_come_or_go_in_a_run_but_a_run_begins_with_the_checkpoint_of_one_without(toy_run):
    without = toy_run("ema=none", "trainer.max_steps=2", folder="without")
    assert not [name for name in read_checkpoint(without.checkpoint).tensors() if "student_ema" in name]
    with pytest.raises(UserError, match=r"\(it differs in ema.decay\)"):
        toy_run("trainer.max_steps=4", folder="without")
    begun = toy_run(f"resume={without.checkpoint}", "trainer.max_steps=3", "ema=default", folder="begun")
    stored = read_checkpoint(begun.checkpoint)
    for name, value in stored.network_weights("student").items():
        assert torch.equal(stored.network_weights("student_ema")[name], value)


def test_a_run_without_ema_of_the_version_before_goes_on(toy_run):
    """It saved an average that never moved."""
    before = toy_run("trainer.max_steps=2", "ema.decay=0.0", folder="before")
    saved = before.folder / "config.yaml"
    as_written_before(saved)
    config = yaml.safe_load(saved.read_text())
    del config["callbacks"]["ema"]
    saved.write_text(yaml.safe_dump(config))
    assert toy_run("trainer.max_steps=3", "ema=none", folder="before").iteration == 3


def test_without_its_ema_a_run_counts_no_updates_of_it(toy_run):
    with_ema = toy_run("trainer.max_steps=2", folder="with")
    assert read_checkpoint(with_ema.checkpoint).ema_updates == 1
    begun = toy_run(f"resume={with_ema.checkpoint}", "ema=none", "trainer.max_steps=4", folder="begun")
    assert read_checkpoint(begun.checkpoint).ema_updates == 0
    with pytest.raises(UserError, match="has no network student_ema"):
        read_checkpoint(begun.checkpoint).network_weights("student_ema")


def test_an_option_that_is_deleted_counts_as_its_default(toy_run):
    toy_run("trainer.max_steps=1", "ema=default", folder="default")  # 0.999, which is the constructor's too
    assert toy_run("trainer.max_steps=2", "ema=default", "~ema.decay", folder="default").iteration == 2
    assert toy_run("trainer.max_steps=3", "ema=default", folder="default").iteration == 3
    with pytest.raises(UserError, match=r"it differs in ema.decay"):
        toy_run("trainer.max_steps=4", "ema=none", folder="default")
    assert toy_run("trainer.max_steps=1", "~optim.student.optimizer.betas", folder="betas").iteration == 1
    assert toy_run("trainer.max_steps=2", "optim.student.optimizer.betas=[0.9,0.999]", folder="betas").iteration == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("ema.decay", 0.5), ("objective.student_every", 3), ("optim.student.max_grad_norm", 7.0)],
)
def test_an_option_that_an_older_run_lacks_is_compared_with_its_constructors_default(toy_run, option, value):
    saved = toy_run("trainer.max_steps=1").folder / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    *path, name = option.split(".")
    for root in (config, config["module"]):
        node = root
        for step in path:
            node = node[step]
        node.pop(name)
    saved.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=rf"it differs in {option}"):
        toy_run("trainer.max_steps=2", f"{option}={value}")


@pytest.mark.parametrize("option", [{"spread_anchors": True}, {"student_every": 5}])
def test_a_run_of_the_version_before_that_differed_is_refused(toy_run, option):
    as_written_before(toy_run("trainer.max_steps=2").folder / "config.yaml", **option)
    with pytest.raises(UserError, match=rf"\(it differs in (module|objective).{next(iter(option))}\)"):
        toy_run("trainer.max_steps=4")


def test_never_resume_refuses_a_folder_with_checkpoints(toy_run):
    toy_run("trainer.max_steps=2", "resume=never")
    with pytest.raises(UserError, match="resume=never"):
        toy_run("trainer.max_steps=4", "resume=never")
