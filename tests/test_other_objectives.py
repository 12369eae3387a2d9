"""Objectives that the project does not know (`other_objectives`): a file and a YAML each, and all that a run can do."""

import json
import math
import re
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from killable import die, start
from other_objectives.adaptive import AdaptiveObjective
from test_resume import assert_equal_states
from test_strategies import furthest, shared, weights_of

from cdm_lightning import export, sample
from cdm_lightning.checkpoint.folder import checkpoints_in
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import asset_path, build, compose
from cdm_lightning.core.flow import FunctionField
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.errors import UserError
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.base import RolledOutSample, VelocityFields
from cdm_lightning.objectives.consistency import ConsistencyObjective, pseudo_huber
from cdm_lightning.objectives.dmd2 import RealHead
from cdm_lightning.plan import plan
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import TrainResult, train
from cdm_lightning.training.networks import Networks

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/new-objective.md"
TRAINED = {
    "consistency": ("student",),
    "scm": ("student",),
    "dmd2": ("student", "fake_score", "head"),
    "f_distill": ("student", "fake_score", "head"),
    "tdm": ("student", "fake_score"),
    "adaptive": ("student", "fake_score"),
    "level_aware": ("student", "fake_score"),
}
WITH_IMAGES = ("dmd2", "f_distill", "scm")
WITH_STATE = ("adaptive", "f_distill")
EVERY_RUN = (
    "callbacks=none",
    "trainer.limit_val_batches=0",
    "trainer.log_every_n_steps=1",
    "compute.gradient_checkpointing=true",
)
FAMILIES = {
    "toy2d": ("backbone=toy2d", "backbone.hidden=16", "backbone.depth=1", "backbone.fit_steps=20"),
    "sd3": (
        "backbone=tiny_sd3",
        "backbone.max_sequence_length=8",
        "backbone.compact_text=null",
        "schedule/length=uniform_short",
        "schedule.length.high=3",
    ),
}
TARGETS = {"toy2d": "blocks", "sd3": "attention_feed_forward"}
LENGTH = {"toy2d": 6, "sd3": 4}  # iterations
STOP = 3  # with students in every other iteration, the middle of a group of two that roll out together
ROUNDING = 2e-6  # of weights that move by 1e-4 and more in every step
USELESS = ("student.transformer_blocks.3.attn.add_q", "fake_score.transformer_blocks.3.attn.add_q")  # of the last text
CASES = [(name, kind, "toy2d") for name in TRAINED for kind in ("full", "lora")]
CASES += [(name, "full", "sd3") for name in TRAINED]
CASES += [(name, "lora", "sd3") for name in ("dmd2", "level_aware")]  # what they have beside adapters

# These are made of the parts of others, which the quick tests run in full: their own long cases are for `make test-slow`.
DERIVED = ("f_distill", "tdm")
SHORT = {case for case in CASES if case[1:] == ("full", "toy2d")}
SHORT |= {(name, "lora", "toy2d") for name in ("dmd2", "level_aware")}
SHORT |= {("dmd2", "full", "sd3"), ("level_aware", "lora", "sd3")}


def quick(cases: Iterable, is_quick: Callable[..., bool]) -> list:
    """All cases, with the mark `slow` on those that take a minute more."""
    return [pytest.param(*case, marks=[] if is_quick(*case) else pytest.mark.slow) for case in cases]


CASE = ("name", "kind", "family")
# the quick ones: a third network that is trained, and a state of the objective's own
each_killed = pytest.mark.parametrize("name", quick(zip(TRAINED), lambda name: name in ("dmd2", "adaptive")))
each_case_in_time = pytest.mark.parametrize(CASE, quick(CASES, lambda *case: case in SHORT))
each_exported = pytest.mark.parametrize("name", quick(zip(TRAINED), lambda name: name in ("dmd2", "level_aware")))
each_case_on_two = pytest.mark.parametrize(
    CASE, quick(CASES, lambda *case: case in SHORT and case[0] not in DERIVED and case != ("dmd2", "full", "sd3"))
)

Overrides = Callable[..., list[str]]  # (objective, family, kind) -> overrides without batch size and output folder
Straight = Callable[..., TrainResult]  # (objective, family, kind) -> an undisturbed run of one process, trained once


@pytest.fixture(scope="module")
def overrides(prompt_file, tiny_pipeline_folder, tmp_path_factory) -> Overrides:
    captions = tmp_path_factory.mktemp("captions") / "shapes.txt"
    lines = Path(asset_path("prompts/shapes_train.txt")).read_text(encoding="utf-8").splitlines()
    captions.write_text("\n".join(lines[:28]) + "\n", encoding="utf-8")

    def of(name: str, family: str = "toy2d", kind: str = "full") -> list[str]:
        made = [f"hydra.searchpath=[file://{HERE}/other_objectives/conf]", f"experiment={name}"]
        made += [*EVERY_RUN, *FAMILIES[family], f"trainer.max_steps={LENGTH[family]}"]
        prompts = captions if family == "sd3" else prompt_file
        made += [f"data.train.path={prompts}", f"data.val.path={prompts}"]
        if family == "sd3":
            made.append(f"backbone.pretrained={tiny_pipeline_folder}")
        elif name in WITH_IMAGES:
            made.append("data.train._target_=benchmarks.dots.Dots")
        if name == "adaptive":
            made.append(f"objective.longest={3 if family == 'toy2d' else 2}")
        for role in TRAINED[name]:
            made += [f"optim.{role}.learning_rate.{value}" for value in ("peak=1e-3", "warmup=0")]
            made += [f"optim.{role}.optimizer.eps=1e-3"]  # steps as even as the gradients are
        return [*made, *lora(name, family)] if kind == "lora" else made

    return of


def lora(name: str, family: str) -> list[str]:
    """An adapter on each role that starts from the pretrained weights."""
    roles = ("student", "fake_score")  # one that is not trained is not used
    return ["lora=lora", *(f"lora.{r}.{o}" for r in roles for o in ("rank=2", f"targets={TARGETS[family]}"))]


def run(overrides: Sequence[str], folder: Path, *more: str) -> TrainResult:
    quiet_libraries()
    return train(compose([*overrides, "data.batch_size=4", f"output_dir={folder}", *more]))


@pytest.fixture(scope="module")
def straight(overrides, tmp_path_factory) -> Straight:
    @cache
    def of(name: str, family: str = "toy2d", kind: str = "full") -> TrainResult:
        return run(overrides(name, family, kind), tmp_path_factory.mktemp("straight") / name)

    return of


def untrained(overrides: Sequence[str], folder: Path) -> Networks:
    """The networks as a run starts with them."""
    module = build(compose([*overrides, f"output_dir={folder}"]), "module")
    return Networks(module.backbone, module.objective.roles, lora=module.lora, seed=module.seed)


# ---- what each of them does


@each_case_in_time
def test_each_trains_to_its_end(overrides, straight, name, kind, family, tmp_path):
    result = straight(name, family, kind)
    assert result.iteration == LENGTH[family]
    assert {figure.partition("/")[0] for figure in result.metrics} == {*TRAINED[name], "step"}
    assert all(math.isfinite(result.metrics[f"{role}/loss"]) for role in TRAINED[name])
    assert all(result.metrics[f"{role}/skipped_steps"] == 0 for role in TRAINED[name])
    networks, weights = untrained(overrides(name, family, kind), tmp_path), weights_of(result.folder)
    assert tuple(networks.trained) == TRAINED[name]
    still = [
        f"{role}.{key}"
        for role, network in networks.trained.items()
        for key, parameter in network.named_parameters()
        if torch.equal(parameter, weights[f"{role}.{key}"])
    ]
    assert [name for name in still if not name.startswith(USELESS)] == []


@each_case_in_time
def test_each_stopped_and_resumed_is_the_undisturbed_run(overrides, straight, name, kind, family, tmp_path):
    command = overrides(name, family, kind)
    half = run(command, tmp_path, f"trainer.max_steps={STOP}")
    assert half.iteration == STOP
    whole = run(command, tmp_path)
    undisturbed = straight(name, family, kind)
    assert_equal_states(undisturbed.checkpoint, whole.checkpoint)
    states = [read_checkpoint(r.checkpoint).trainer_state()["objective"] for r in (undisturbed, whole, half)]
    assert states[0] == states[1]
    assert (states[0] != states[2]) == bool(states[0]) == (name in WITH_STATE)


@each_killed
def test_each_killed_goes_on_from_its_newest_checkpoint(overrides, straight, name, tmp_path):
    command = [*overrides(name), "data.batch_size=4", "checkpoint.every=2"]
    killed = start(command, tmp_path, prepare=die_after, arguments=(5,))
    assert killed.wait() == [-signal.SIGKILL], killed.output
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")][-1] == "iteration_0000004"
    assert_equal_states(straight(name).checkpoint, run(command, tmp_path).checkpoint)


def die_after(rank: int, iterations: int) -> None:
    """Let the process kill itself when so many iterations are done, before it can save the last of them."""
    original = CDMModule.training_step

    def dying(self, *batch):
        original(self, *batch)
        if self.iteration == iterations:
            die()

    CDMModule.training_step = dying


@each_case_on_two
def test_each_on_two_processes_is_each_on_one(overrides, straight, name, kind, family, tmp_path):
    command = overrides(name, family, kind)
    two = shared(command, tmp_path / "two", "fsdp2")
    assert furthest(two, straight(name, family, kind).folder) < ROUNDING
    if family == "toy2d":  # the comparison can fail
        other = run(command, tmp_path / "other", "seed=1")
        assert furthest(other.folder, straight(name, family, kind).folder) > 50 * ROUNDING


@each_exported
def test_each_is_exported_and_sampled(straight, name, tmp_path):
    folder = straight(name, "sd3").folder
    exported = export.export_checkpoint(folder, tmp_path / "student", nfe=2)
    prompts = ["a large red circle", "a ring"]
    made = sample.sample_images(str(exported), prompts, seed=3)
    assert made.steps == 2
    assert made.images.isfinite().all()
    of_run = sample.sample_images(str(folder), prompts, seed=3, steps=2)
    torch.testing.assert_close(made.images, of_run.images)


def test_a_lora_is_exported_as_a_pipeline(straight, tmp_path):
    exported = export.export_checkpoint(
        straight("level_aware", "sd3", "lora").folder, tmp_path / "student", form="pipeline"
    )
    assert sample.sample_images(str(exported), ["a ring"]).images.isfinite().all()


@pytest.mark.parametrize(  # `test_planning.py` holds the figures of some
    "name", ["consistency", "scm", "dmd2", *(pytest.param(name, marks=pytest.mark.slow) for name in DERIVED)]
)
def test_each_is_planned(overrides, name):
    (planned,) = plan([*overrides(name, "sd3"), "data.batch_size=4", "gpus=1x80"])
    text = json.dumps(planned.as_json())
    for role in {role for roles in TRAINED.values() for role in roles}:
        assert (role in text) == (role in TRAINED[name]), role
    assert planned.total > 0
    assert str(planned)


# ---- consistency


def sample_of(student, teacher, x: torch.Tensor, sigma: torch.Tensor) -> RolledOutSample:
    fields = VelocityFields(student, teacher, teacher)
    rng = StepRandom(0, 0, range(len(x)), "cpu")
    point = TrajectoryPoint(x, student(x, sigma), sigma)
    return RolledOutSample(["a"] * len(x), fields, rng, torch.clone, torch.clone, tuple(x.shape[1:]), 0, point=point)


def test_a_consistent_student_has_no_loss():
    """Data that are one point m: the ODE's paths are straight lines to m, and so is an Euler step."""
    x, sigma = torch.randn(5, 2, 3, 3), torch.linspace(0.1, 1, 5)
    m = torch.tensor(0.7)
    right = FunctionField(lambda x, sigma: (x - m) / sigma[:, None, None, None].clamp(min=1e-6))
    wrong = FunctionField(lambda x, sigma: x)
    (loss,) = ConsistencyObjective(step=0.3).student_losses(sample_of(right, right, x, sigma))
    assert loss.total.item() < 1e-3  # float32; at sigma 0 the quotient above is wrong, and is multiplied by 0
    (loss,) = ConsistencyObjective(step=0.3).student_losses(sample_of(wrong, right, x, sigma))
    assert loss.total.item() > 0.1


def test_pseudo_huber_is_the_distance_of_far_samples_and_smooth_at_none():
    a = torch.zeros(2, 1, 2, 2, requires_grad=True)
    far = torch.full((2, 1, 2, 2), 100.0)
    assert pseudo_huber(a, far).item() == pytest.approx(200, rel=1e-4)
    pseudo_huber(a, a.detach()).backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_a_step_out_of_range_is_refused(overrides, tmp_path):
    with pytest.raises(UserError, match="step=0 must be a number above 0"):
        run(overrides("consistency"), tmp_path, "objective.step=0")


# ---- dmd2


def test_the_head_learns_to_tell_and_the_student_hears_of_it(overrides, tmp_path):
    longer = ["trainer.max_steps=60", "data.batch_size=32", "optim.head.learning_rate.peak=3e-2"]
    levels = "objective.gan_levels.high=0.2"
    far = [
        levels,
        "backbone.fit_steps=1",
        *(f"optim.{role}.learning_rate.peak=0" for role in ("student", "fake_score")),
    ]  # the student draws nothing like the data
    result = run(overrides("dmd2"), tmp_path, *longer, *far)
    assert result.metrics["head/loss"] < 0.9 * 2 * math.log(2)
    assert result.metrics["student/gan"] > 5e-3 * math.log(2)  # the student is not taken for real


def test_the_head_takes_features_of_several_blocks():
    head = RealHead(8, 2)
    assert head([torch.randn(3, 5, 8), torch.randn(3, 7, 8)]).shape == (3,)
    with pytest.raises(ValueError, match="shorter"):
        head([torch.randn(3, 5, 8)])


def test_real_images_are_needed(overrides, tmp_path):
    blind = ["data.train._target_=cdm_lightning.data.prompts.PromptFile", "~data.train.seed"]
    with pytest.raises(UserError, match="needs real images"):
        run(overrides("dmd2"), tmp_path, *blind)


def test_a_role_without_an_optimizer_is_refused(overrides, tmp_path):
    without = [o for o in overrides("dmd2") if not o.startswith("optim.head")]
    with pytest.raises(UserError, match="trains head, which has no optimizer"):
        run([*without, "~optim.head"], tmp_path)


# ---- adaptive


def fed(objective: AdaptiveObjective, losses: Sequence[float]) -> list[bool]:
    """Whether the student was updated in each of the iterations with these losses of the fake score."""
    turns = []
    for iteration, loss in enumerate(losses):
        updates = objective.updates(iteration)
        assert [u.role for u in objective.updates(iteration)] == [u.role for u in updates]  # asking changes nothing
        for update in updates:
            objective.observe(update.role, {"loss": torch.tensor(loss)}, made=math.isfinite(loss))
        turns.append(len(updates) == 2)
    return turns


def test_the_student_waits_while_the_fake_score_lags():
    assert fed(AdaptiveObjective(), [1.0] * 4) == [False, True, True, True]
    jump = [1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 0.1, 0.1, 0.1, 0.1, 0.1]
    turns = fed(AdaptiveObjective(longest=4), jump)
    assert turns == [False, True, True, False, False, False, True, False, True, True, True]
    assert fed(AdaptiveObjective(), [1.0, float("nan"), 1.0]) == [False, True, True]


def test_the_measured_ratio_changes_in_a_run(overrides, tmp_path, monkeypatch):
    turns, original = [], CDMModule.training_step

    def recording(self, *batch):
        original(self, *batch)
        turns.append("student" in self.updated_roles)

    monkeypatch.setattr(CDMModule, "training_step", recording)
    run(overrides("adaptive"), tmp_path, "trainer.max_steps=20", "objective.longest=4")
    updated = [iteration for iteration, turn in enumerate(turns) if turn]
    waits = {after - before for before, after in pairwise(updated)}
    assert len(waits) > 1
    assert max(waits) <= 4


# ---- level aware


def test_the_further_input_has_no_effect_at_the_start_and_one_later(overrides, tmp_path):
    first = ["trainer.max_steps=1", "objective.student_every=1", "optim.fake_score.learning_rate.peak=0"]
    first.append("objective.off_trajectory_share=0")
    theirs = "objective.fake_score_conditioning=none"
    ours = run(overrides("level_aware"), tmp_path / "ours", *first).metrics
    cdm = run(overrides("level_aware"), tmp_path / "cdm", "objective=cdm", *first[:3]).metrics
    assert cdm == run(overrides("level_aware"), tmp_path / "none", *first, theirs).metrics
    equal = {figure for figure in cdm if ours[figure] == cdm[figure]}
    assert cdm.keys() - equal == {"fake_score/grad_norm"}  # the further weights have a gradient
    learning = [*first[:2], *first[3:], "trainer.max_steps=4"]
    ours = run(overrides("level_aware"), tmp_path / "ours_later", *learning).metrics
    cdm = run(overrides("level_aware"), tmp_path / "cdm_later", *learning, theirs).metrics
    assert ours["fake_score/loss"] != cdm["fake_score/loss"]
    assert ours["student/dm"] != cdm["student/dm"]


# ---- the page


def test_the_pages_example_trains(overrides, prompt_file, tmp_path, monkeypatch):
    page = PAGE.read_text(encoding="utf-8")
    (python,), (yaml,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(python, encoding="utf-8")
    (tmp_path / "conf/experiment/mine.yaml").write_text(yaml, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    command = [f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine", *EVERY_RUN, *FAMILIES["toy2d"]]
    paths = [f"data.train.path={prompt_file}", f"data.val.path={prompt_file}"]
    result = run([*command, *paths], tmp_path / "run", "trainer.max_steps=2")
    assert result.iteration == 2
    assert result.metrics["student/loss"] > 0
