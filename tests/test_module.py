"""One iteration does what the algorithm box says: who is updated when, by how much, with which numbers."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from core.samples import summed
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.core.ema import HostFollower, lerp_parameters_
from cdm_lightning.core.lengths import UniformLength
from cdm_lightning.core.rollout import walk
from cdm_lightning.core.schedules import RandomSchedule
from cdm_lightning.data.batches import EndlessBatches, PromptBatch
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.prompts import PromptList
from cdm_lightning.distributed.strategy import MeshStrategy
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.base import Objective, Role, RolledOutSample, TermLosses, Update
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.training.compute import Compute
from cdm_lightning.training.ema import EMA, follower_of
from cdm_lightning.training.optim import LearningRate, OptimizerRecipe
from cdm_lightning.training.rollouts import RolloutGroups, with_point

PROMPTS = PromptList(["north", "south and east", "west", "anywhere"])


def recipe(lr: float = 1e-3, optimizer=torch.optim.AdamW, max_grad_norm: float = 1.0, **keywords) -> OptimizerRecipe:
    return OptimizerRecipe(partial(optimizer, **keywords), LearningRate(lr, warmup=0), max_grad_norm)


TURNS = ("student_every", "fake_score_steps", "fake_score_merge")  # options of the objective


def make_module(student_optim=None, fake_score_optim=None, objective=None, **arguments) -> CDMModule:
    turns = {name: arguments.pop(name) for name in TURNS if name in arguments}
    defaults = {
        "backbone": Toy2DBackbone(hidden=16, depth=1, fit_steps=20),
        "objective": replace(objective or CDMObjective(), **turns),
        "schedule": RandomSchedule(UniformLength(1, 4)),
        "optim": {"student": student_optim or recipe(), "fake_score": fake_score_optim or recipe()},
    }
    return CDMModule(**{**defaults, **arguments})


def fit(module: CDMModule, iterations: int, *callbacks: L.Callback, **trainer_arguments) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=iterations,
        max_epochs=-1,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"logger": False, "limit_val_batches": 0, **trainer_arguments},
    )
    trainer.fit(module, data_of(module))
    return trainer


def data_of(module: CDMModule) -> PromptDataModule:
    return PromptDataModule(PROMPTS, PROMPTS, batch_size=3, val_batch_size=2, groups=module.groups.of)


class Snapshots(L.Callback):
    """The weights of a network before training and after each iteration."""

    def __init__(self, *names: str) -> None:
        self.names, self.weights = names, {name: [] for name in names}

    def _take(self, module: CDMModule) -> None:
        for name in self.names:
            self.weights[name].append(flat(getattr(module.networks, name)))

    def on_train_start(self, trainer, pl_module) -> None:
        self._take(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self._take(pl_module)

    def changes(self, name: str) -> list[bool]:
        return [not torch.equal(a, b) for a, b in zip(self.weights[name], self.weights[name][1:])]


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in network.parameters()])


# ---- turns and counts


@pytest.mark.parametrize("every", [1, 3])
def test_the_student_moves_in_every_nth_iteration_and_all_count_iterations(every):
    module, snapshots = make_module(student_every=every), Snapshots("student", "fake_score")
    trainer = fit(module, 7, snapshots)
    assert snapshots.changes("student") == [i % every == every - 1 for i in range(7)]
    assert snapshots.changes("fake_score") == [True] * 7
    assert trainer.global_step == module.iteration == 7


def test_several_fake_score_steps_share_one_rollout_with_fresh_draws():
    """One iteration of three updates, against the same three made by hand: each on the point of that iteration."""
    rollouts, sigmas = [], []

    class Watching(CDMObjective):
        def fake_score_losses(self, sample):
            rollouts.append(sample.point.x)
            levels = self.fake_score_levels
            sigmas.append(levels.sample(sample.rng, "fake_score.sigma", sample.point.sigma, sample.shift))
            return super().fake_score_losses(sample)

    sgd = recipe(lr=1e-2, optimizer=torch.optim.SGD, max_grad_norm=math.inf)
    settings = {"fake_score_optim": sgd, "fake_score_merge": 0.25, "student_every": 2}
    settings["compute"] = Compute(gradient_checkpointing=True)
    module = make_module(objective=Watching(), fake_score_steps=3, **settings)
    snapshots = Snapshots("fake_score", "student")
    trainer = fit(module, 2, snapshots)
    assert trainer.global_step == module.iteration == 2
    assert snapshots.changes("student") == [False, True]
    assert len(rollouts) == 6
    assert all(torch.equal(rollouts[i], rollouts[i - i % 3]) for i in range(6))
    assert not torch.equal(rollouts[0], rollouts[3])
    assert len({float(sigma[0]) for sigma in sigmas}) == 6

    by_hand = make_module(fake_score_steps=3, **settings)
    fit(by_hand, 0)
    (sample,) = by_hand.rollouts.bound(PromptBatch(first_prompts(), torch.tensor([0, 1, 2])), 0)
    rollout = by_hand.rollouts.draw(sample)
    sample = with_point(sample, rollout.point(*walk([rollout])), rollout.steps)
    network = by_hand.networks.fake_score
    for step in range(3):
        loss = summed(by_hand.objective.fake_score_losses(sample.again(step))).total
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients):
                parameter.sub_(gradient, alpha=1e-2)
        lerp_parameters_(network, by_hand.networks.student, 0.25)
    assert torch.allclose(flat(network), snapshots.weights["fake_score"][1], atol=1e-6)


def first_prompts() -> list[str]:
    """The prompts of the first training batch of `fit`."""
    batch = EndlessBatches(len(PROMPTS), 3, seed=0, order=PROMPTS.order(0)).batch(0)
    return [PROMPTS[draw.prompt] for draw in batch]


def test_the_average_follows_student_steps_only():
    module, snapshots = make_module(student_every=2, ema=EMA(decay=0.5)), Snapshots("student", "student_ema")
    fit(module, 4, snapshots)
    student, average = snapshots.weights["student"], snapshots.weights["student_ema"]
    assert snapshots.changes("student_ema") == [False, True, False, True]
    assert module.ema_updates == 2
    first = torch.lerp(average[0], student[2], 1 - 1 / 10)  # decay min(0.5, 1 / 10)
    assert torch.allclose(average[2], first, atol=1e-7)
    assert torch.allclose(average[4], torch.lerp(first, student[4], 1 - 2 / 11), atol=1e-7)


@pytest.mark.parametrize(
    ("on_cpu", "device", "follows"),
    [(["student_ema"], "cuda", True), ([], "cuda", False), (["student_ema"], "cpu", False)],
)
def test_an_average_follows_beside_a_gpu_only_where_it_rests_on_the_host(on_cpu, device, follows, monkeypatch):
    """Whatever device it is on when it is built: Lightning moves networks later."""
    strategy = MeshStrategy(1, 1, on_cpu=on_cpu)
    monkeypatch.setattr(MeshStrategy, "root_device", property(lambda self: torch.device(device)))
    assert (follower_of(nn.Linear(1, 1), strategy) is not None) == follows
    assert follower_of(nn.Linear(1, 1), SingleDeviceStrategy(torch.device(device))) is None
    assert follower_of(None, strategy) is None


def test_an_average_that_follows_on_the_host_is_the_same(monkeypatch):
    kept = []

    def follower_of(average, strategy):
        kept.append(HostFollower())
        kept[-1].guard(average)
        return kept[-1]

    at_once, beside = (make_module(student_every=2, ema=EMA(decay=0.5)) for _ in range(2))
    fit(at_once, 6)
    monkeypatch.setattr("cdm_lightning.module.follower_of", follower_of)
    fit(beside, 6)
    assert kept == [beside.follower]
    assert kept[0]._thread is None  # it has come to its end with the training
    assert torch.equal(flat(beside.networks.student_ema), flat(at_once.networks.student_ema))
    assert not torch.equal(flat(beside.networks.student_ema), flat(beside.networks.student))


def test_the_fake_score_is_merged_with_the_student_after_its_step():
    frozen = recipe(lr=0.0, weight_decay=0.0)
    module = make_module(fake_score_optim=frozen, fake_score_merge=0.25, student_every=2)
    snapshots = Snapshots("student", "fake_score")
    fit(module, 3, snapshots)
    student, fake = snapshots.weights["student"], snapshots.weights["fake_score"]
    assert torch.equal(fake[2], fake[0])  # the student, still equal, moves after the second merge
    assert torch.allclose(fake[3], 0.75 * fake[2] + 0.25 * student[2], atol=1e-7)
    assert not torch.equal(fake[3], fake[2])


def test_a_merge_of_weight_0_is_off(monkeypatch):
    monkeypatch.setattr("cdm_lightning.module.lerp_parameters_", lambda *_: pytest.fail("merged"))
    fit(make_module(fake_score_merge=0.0), 2)


# ---- the teacher


def test_the_teacher_is_no_part_of_the_state_and_does_not_change():
    backbone = Toy2DBackbone(hidden=16, depth=1, fit_steps=20)
    backbone.build_teacher = backbone.build_network  # one with parameters, as pretrained networks have
    module = make_module(backbone=backbone, ema=EMA())
    fit(module, 4)
    assert torch.equal(flat(module.networks.teacher), flat(backbone.build_network()))
    assert {key.split(".")[1] for key in module.state_dict()} == {"student", "fake_score", "student_ema"}
    owned = {id(parameter) for parameter in module.parameters()}
    assert not owned & {id(parameter) for parameter in module.networks.teacher.parameters()}
    assert not any(parameter.requires_grad for parameter in module.networks.teacher.parameters())
    assert not module.networks.student_ema.training
    assert not module.networks.teacher.training


# ---- the step


def test_gradients_are_clipped_for_each_network():
    sgd = recipe(lr=1.0, optimizer=torch.optim.SGD, max_grad_norm=1e-3)
    module = make_module(student_optim=sgd, fake_score_optim=sgd, fake_score_merge=0.0)
    snapshots = Snapshots("student", "fake_score")
    fit(module, 2, snapshots)
    for name, steps in (("student", 1), ("fake_score", 2)):
        before, after = snapshots.weights[name][2 - steps], snapshots.weights[name][2 - steps + 1]
        assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


class Spoiled(CDMObjective):
    """Losses that are not finite at iteration 1 (fake score) and 3 (student)."""

    def fake_score_losses(self, sample) -> Iterator[TermLosses]:
        for losses in super().fake_score_losses(sample):
            yield replace(losses, total=losses.total * (math.nan if sample.iteration == 1 else 1.0))

    def student_losses(self, sample) -> Iterator[TermLosses]:
        for losses in super().student_losses(sample):
            yield replace(losses, total=losses.total * (math.inf if sample.iteration == 3 else 1.0))


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    module, snapshots = make_module(objective=Spoiled(), fake_score_merge=0.0), Snapshots("student", "fake_score")
    trainer = fit(module, 6, snapshots, log_every_n_steps=1)
    assert snapshots.changes("fake_score") == [True, False, True, True, True, True]
    assert snapshots.changes("student") == [False, True, False, False, False, True]
    assert module.updates.skipped_steps == {"student": 1, "fake_score": 1}
    assert trainer.global_step == 6
    assert trainer.callback_metrics["student/skipped_steps"] == 1
    assert flat(module.networks.student).isfinite().all()


def test_learning_rate_is_a_function_of_the_iteration():
    rate = LearningRate(peak=2.0, warmup=4, total=20, decay_from=0.5)
    assert [rate.at(i) for i in (0, 1, 3, 4, 9)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert [rate.at(i) for i in (10, 15, 19, 20, 30)] == pytest.approx([2.0, 1.0, 0.2, 0.0, 0.0])
    assert LearningRate(peak=2.0, warmup=0).at(10**6) == 2.0
    with pytest.raises(UserError, match=r"learning_rate.total=.* must be at least 1"):
        LearningRate(peak=1.0, decay_from=0.5)


def test_warmup_counts_iterations_and_not_the_steps_of_an_optimizer():
    """The authors count the student's steps: with a student step in every 2nd iteration their warm-up is twice as long here."""
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            rates.append(pl_module.optimizers_by_role["student"].param_groups[0]["lr"])

    student = OptimizerRecipe(partial(torch.optim.AdamW), LearningRate(1e-3, warmup=8))
    fit(make_module(student_optim=student, student_every=2), 10, Rates())
    at_steps = rates[1::2]  # the student's steps are in iterations 1, 3, 5, ... counted from 0
    assert at_steps == pytest.approx([1e-3 * min(1, iterations / 8) for iterations in (2, 4, 6, 8, 10)])
    assert at_steps == pytest.approx([1e-3 * min(1, step / 4) for step in (1, 2, 3, 4, 5)])  # 4 of the authors' steps


def test_both_optimizers_follow_their_own_rate():
    student = OptimizerRecipe(partial(torch.optim.AdamW), LearningRate(1e-3, warmup=4))
    fake_score = OptimizerRecipe(partial(torch.optim.AdamW), LearningRate(1e-2, warmup=0, total=8, decay_from=0.5))
    trainer = fit(make_module(student_optim=student, fake_score_optim=fake_score), 8, log_every_n_steps=2)
    module = trainer.lightning_module
    rates = {role: optimizer.param_groups[0]["lr"] for role, optimizer in module.optimizers_by_role.items()}
    assert rates == pytest.approx({"fake_score": 1e-2 * 0.25, "student": 1e-3})  # as last set: iteration 7


def test_an_optimizer_keyword_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        recipe(beta=0.9)


# ---- precision


class Recording(Toy2DBackbone):
    """Notes what networks are given."""

    def __init__(self) -> None:
        super().__init__(hidden=16, depth=1, fit_steps=20)
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.autocast: list[torch.dtype | None] = []

    def velocity(self, network, x, sigma, cond) -> Tensor:
        self.inputs.append((x.detach(), sigma.detach()))
        self.autocast.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return super().velocity(network, x, sigma, cond)


def test_sigmas_weights_and_states_stay_float32_when_networks_compute_in_bfloat16():
    backbone = Recording()
    module = make_module(backbone=backbone, compute_dtype="bfloat16", student_every=1)
    trainer = fit(module, 3)
    sigmas = torch.cat([sigma for _, sigma in backbone.inputs])
    assert set(backbone.autocast) == {torch.bfloat16}
    assert {x.dtype for x, _ in backbone.inputs} == {sigmas.dtype} == {torch.float32}
    inner = sigmas[(sigmas > 0.02) & (sigmas < 0.98)]
    assert (inner.bfloat16().float() != inner).float().mean() > 0.9  # not rounded on the way
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}


def test_lightnings_own_precision_is_refused():
    with pytest.raises(UserError, match="compute_dtype"):
        fit(make_module(), 1, precision="bf16-true")


def test_an_unknown_compute_dtype_is_refused():
    with pytest.raises(UserError, match="compute_dtype"):
        make_module(compute_dtype="float16")


@pytest.mark.parametrize("options", [{"gradient_checkpointing": 2}, {"accumulate": 0}, {"rollouts_together": 0}])
def test_options_of_compute_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Compute(**options)


# ---- rollouts


def test_objectives_that_need_it_get_full_rollouts():
    module = make_module(objective=CDMObjective(teacher_base="final"), student_every=1)
    fit(module, 2)
    assert flat(module.networks.student).isfinite().all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rollouts_between_two_student_steps_walk_together(accumulate):
    """The same weights, in fewer calls of more samples."""

    def trained(together: int) -> tuple[Tensor, list[int]]:
        compute = Compute(accumulate=accumulate, rollouts_together=together)
        settings = {"student_every": 3, "compute": compute}
        module, rows = make_module(schedule=RandomSchedule(UniformLength(3, 6)), **settings), []
        velocity = module.backbone.velocity

        def counted(network, x, sigma, cond):
            if not torch.is_grad_enabled() and network is module.networks.student:
                rows.append(len(x))
            return velocity(network, x, sigma, cond)

        module.backbone.velocity = counted
        fit(module, 6)
        return torch.cat([flat(module.networks.student), flat(module.networks.fake_score)]), rows

    alone, small = trained(1)
    for together in (2, 3, 9):  # at most as many as there are between two updates
        weights, rows = trained(together)
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)
        assert sum(rows) == sum(small)
        assert len(rows) < len(small)
        assert max(rows) > max(small)
    start = flat(make_module().backbone.build_network())
    assert (alone[: len(start)] - start).abs().max() > 1e-4


def test_which_rollouts_walk_together():
    groups = [make_module(student_every=5, compute=Compute(rollouts_together=2)).groups.of(n) for n in range(10)]
    pairs = [range(0, 2), range(2, 4), range(4, 5), range(5, 7), range(7, 9), range(9, 10)]
    assert groups == [pairs[n] for n in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]
    assert make_module(student_every=2).groups.of(3) == range(2, 4)
    assert make_module(student_every=1).groups.of(3) == range(3, 4)
    full = make_module(objective=CDMObjective(teacher_base="final"))  # keeps all states: one batch at a time
    assert full.groups.of(3) == range(3, 4)


def test_the_teacher_without_text_sees_the_empty_prompt_in_every_sample():
    module = make_module()
    fit(module, 0)
    fields = module.bind(["north", "west"])
    expected = module.backbone.encode_prompts(["", ""])
    assert fields.teacher_uncond.cond.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(fields.teacher_uncond.cond[name], value)
        assert not torch.equal(fields.teacher.cond[name], value)


def test_rollouts_of_an_earlier_training_are_forgotten():
    module = make_module()
    fit(module, 1)
    assert set(module.rollouts._waiting) == {1}
    module.on_train_start()
    assert not module.rollouts._waiting


def test_an_iteration_is_the_same_for_any_split_of_the_batch():
    """The points of a batch are those of its parts: draws belong to slots, K to the iteration."""
    module = make_module()
    fit(module, 1)
    prompts = [PROMPTS[i] for i in range(4)]

    def points(slots: list[int]) -> Tensor:
        (sample,) = module.rollouts.bound(PromptBatch([prompts[i] for i in slots], torch.tensor(slots)), 5)
        return walk([module.rollouts.draw(sample)])[0]

    assert torch.allclose(points([0, 1, 2, 3]), torch.cat([points([0, 1]), points([2, 3])]), atol=1e-6)


# ---- evaluation and logs


class Outputs(L.Callback):
    """Keeps what validation hands to callbacks."""

    def __init__(self) -> None:
        self.outputs: list[dict] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        self.outputs.append(outputs)


def test_validation_generates_for_each_sampler_with_the_average():
    samplers = [SamplerSpec("a", nfe=2), SamplerSpec("b", network="teacher", nfe=3)]
    module, kept = make_module(samplers=samplers, ema=EMA()), Outputs()
    rhythm = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    fit(module, 2, kept, limit_val_batches=1.0, **rhythm)
    assert [output["indices"].tolist() for output in kept.outputs] == [[0, 1], [2, 3]]
    assert kept.outputs[1]["prompts"] == ["west", "anywhere"]
    shapes = {name: tuple(images.shape) for name, images in kept.outputs[0]["images"].items()}
    assert shapes == {"a": (2, 3, 32, 32), "b": (2, 3, 32, 32)}
    assert module.evaluated_network is module.networks.student_ema
    assert make_module().ema_updates == 0


def test_logs_stand_at_the_iteration_and_only_every_nth(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="", version="logs")
    fit(make_module(student_every=4), 9, logger=logger, log_every_n_steps=3)
    lines = [line.split(",") for line in (tmp_path / "logs" / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line)) for line in lines[1:]]
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    assert [bool(row["student/cdm"]) for row in rows] == [False, True, True]  # the latest figures known
    expected = {"fake_score/loss", "fake_score/grad_norm", "fake_score/learning_rate", "fake_score/skipped_steps"}
    student = ("loss", "ca", "dm", "cdm", "ca_delta_rms", "ca_dm_cosine", "x0_std", "grad_norm")
    expected |= {f"student/{name}" for name in student}
    assert expected <= set(lines[0])
    total = sum(float(rows[2][f"student/{term}"]) for term in ("ca", "dm", "cdm"))
    assert float(rows[2]["student/loss"]) == pytest.approx(total, rel=1e-5)


def test_phases_are_timed():
    module = make_module()
    fit(module, 2)
    assert set(module.timer.seconds) == {"rollout", "fake_score", "student"}
    assert all(seconds > 0 for seconds in module.timer.seconds.values())


def test_a_module_is_built_once():
    module = make_module()
    fit(module, 1)
    networks = module.networks
    weights = copy.deepcopy(flat(networks.student))
    module.configure_model()
    assert module.networks is networks
    assert torch.equal(flat(networks.student), weights)


# ---- other objectives


class Alone(Objective):
    """Pulls the student's clean prediction to 0; no network beside it."""

    def updates(self, iteration: int) -> list[Update]:
        return [Update("student", self.losses)]

    def losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        yield TermLosses(sample.fields.student(sample.point.x, sample.point.sigma).square().mean())


def test_an_objective_that_trains_the_student_alone_is_counted_and_logged():
    module, snapshots = make_module(objective=None), Snapshots("student")
    module = CDMModule(module.backbone, Alone(), module.schedule, {"student": recipe(), "unused": recipe()})
    trainer = fit(module, 5, snapshots, log_every_n_steps=1)
    assert trainer.global_step == module.iteration == 5
    assert snapshots.changes("student") == [True] * 5
    assert set(module.optimizers_by_role) == {"student"}
    assert {name for name in module.state_dict() if not name.startswith("networks.student")} == set()
    assert {"student/loss", "student/grad_norm", "student/learning_rate"} <= set(trainer.callback_metrics)


class Idle(Alone):
    """Says that nothing is to be trained."""

    def updates(self, iteration: int) -> list[Update]:
        return []


def test_an_iteration_without_an_update_is_an_error_and_not_endless():
    module = make_module()
    with pytest.raises(ValueError, match="Idle has no update in iteration 0"):
        fit(CDMModule(module.backbone, Idle(), module.schedule, {"student": recipe()}), 2)


def test_a_role_without_an_optimizer_is_refused():
    with pytest.raises(UserError, match=r"optim: CDMObjective trains fake_score, .* add optim\.fake_score"):
        CDMModule(
            Toy2DBackbone(fit_steps=1), CDMObjective(), RandomSchedule(UniformLength(1, 4)), {"student": recipe()}
        )


class Through(Alone):
    """The student learns through a head that is never updated, then the head learns by itself in every second iteration."""

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role("head", build=lambda width: nn.Linear(width, 1)),)

    def updates(self, iteration: int) -> list[Update]:
        student = Update("student", self.losses, repeat=2)
        return [student, Update("head", self.losses)] if iteration % 2 else [student]

    def losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        point = sample.point
        _, (features,) = sample.fields.student.with_features(point.x, point.sigma, [-1])
        yield TermLosses(sample.fields.heads["head"](features).square().mean())


def test_gradients_that_reach_another_role_are_dropped():
    module, snapshots = make_module(), Snapshots("student", "head")
    optim = {"student": recipe(), "head": recipe(optimizer=torch.optim.SGD)}
    module = CDMModule(module.backbone, Through(), module.schedule, optim)
    fit(module, 4, snapshots)
    assert snapshots.changes("student") == [True] * 4
    assert snapshots.changes("head") == [False, True, False, True]
    assert all(parameter.grad is None for parameter in module.networks.parameters())
    assert module.updated_roles == ("student", "head")


def test_a_built_network_starts_alike_for_a_seed():
    def start(seed: int) -> Tensor:
        module = make_module()
        optim = {"student": recipe(), "head": recipe()}
        module = CDMModule(module.backbone, Through(), module.schedule, optim, seed=seed)
        fit(module, 0)
        return flat(module.networks.head)

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


class Following(Objective):
    """Updates the student until its loss, as all processes measured it, has been seen `patience` times; counts them."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role("fake_score"),)

    def updates(self, iteration: int) -> list[Update]:
        return [Update("student" if len(self.seen) < 2 else "fake_score", self.losses)]

    def losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        role = "student" if len(self.seen) < 2 else "fake_score"
        yield TermLosses(sample.fields[role](sample.point.x, sample.point.sigma).square().mean())

    def observe(self, role: str, figures, made: bool) -> None:
        assert made
        self.seen.append(float(figures["loss"]))


def test_the_turn_of_an_update_may_follow_what_was_measured():
    objective, snapshots = Following(), Snapshots("student", "fake_score")
    module = make_module()
    module = CDMModule(module.backbone, objective, module.schedule, {"student": recipe(), "fake_score": recipe()})
    trainer = fit(module, 4, snapshots, log_every_n_steps=1)
    assert snapshots.changes("student") == [True, True, False, False]
    assert snapshots.changes("fake_score") == [False, False, True, True]
    assert len(objective.seen) == 4
    assert objective.seen[1] == float(trainer.callback_metrics["student/loss"])
    assert not CDMObjective().observes
    assert module.groups.of(3) == range(3, 4)  # nobody knows whose turn comes next


@pytest.mark.parametrize("period", [1, 2, 3, 5])
@pytest.mark.parametrize("together", [1, 2, 3, 7])
def test_groups_of_rollouts_never_span_an_update_of_the_student(period, together):
    groups = RolloutGroups(together, period)
    for iteration in range(20):
        group = groups.of(iteration)
        assert iteration in group
        assert len(group) <= together
        assert all(groups.of(other) == group for other in group)
        assert len({other // period for other in group}) == 1
    whole_turns = 20 // period
    assert len({groups.of(n) for n in range(whole_turns * period)}) == whole_turns * -(-period // together)


@pytest.mark.parametrize("name", ["student", "student_ema", "teacher", "no name", ""])
def test_names_that_no_role_can_have_are_refused(name):
    with pytest.raises(ValueError, match="choose a Python identifier"):
        Role(name)


class Named(Alone):
    """Has roles of these names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(Role(name) for name in self.names)


@pytest.mark.parametrize("names", [("judge", "judge"), ("train",), ("trained",), ("base",), ("rollout",), ("_shared",)])
def test_names_that_are_taken_are_refused_before_anything_is_built(names):
    optim = {name: recipe() for name in ("student", *names)}
    with pytest.raises(
        UserError, match=f"Named has a role '{names[0]}', but this name is already in use or begins with _; choose"
    ):
        CDMModule(Toy2DBackbone(fit_steps=1), Named(*names), RandomSchedule(UniformLength(1, 4)), optim)


class Hasty(CDMObjective):
    """Updates the student in every iteration, but says as CDM does that it stays the same for two."""

    def updates(self, iteration: int) -> list[Update]:
        return super().updates(self.student_every - 1)


def test_a_student_that_moves_while_its_rollouts_wait_is_an_error():
    with pytest.raises(
        ValueError, match=r"Hasty updates the student in iteration 0, but its student_period .* iteration 1"
    ):
        fit(make_module(objective=Hasty()), 2)
    fit(make_module(objective=Hasty(), compute=Compute(rollouts_together=1)), 2)  # nothing waits


class Twice(Alone):
    """Two updates of the student, the first repeated, each noting its draws."""

    def __init__(self) -> None:
        self.draws: list[float] = []

    def updates(self, iteration: int) -> list[Update]:
        return [Update("student", self.losses, repeat=2), Update("student", self.losses)]

    def losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        self.draws.append(float(sample.rng.uniform("a")[0]))
        yield from super().losses(sample)


def test_every_update_of_a_role_has_draws_of_its_own_and_the_iteration_counts_once():
    objective, module = Twice(), make_module()
    trainer = fit(CDMModule(module.backbone, objective, module.schedule, {"student": recipe()}), 2)
    assert len(set(objective.draws)) == len(objective.draws) == 6
    assert trainer.global_step == 2


class Misspelt(Alone):
    """Updates a role that there is not."""

    def updates(self, iteration: int) -> list[Update]:
        return [Update("studnet", self.losses)]


def test_an_update_of_an_unknown_role_is_refused_before_anything_is_built():
    with pytest.raises(UserError, match="Misspelt updates or merges 'studnet', but trains only student"):
        CDMModule(Toy2DBackbone(fit_steps=1), Misspelt(), RandomSchedule(UniformLength(1, 4)), {"student": recipe()})


@pytest.mark.parametrize("value", [None, 5])
def test_what_is_no_optimizer_recipe_is_refused(value):
    optim = {"student": recipe(), "fake_score": value}
    with pytest.raises(UserError, match=r"optim\.fake_score must be an optimizer recipe"):
        CDMModule(Toy2DBackbone(fit_steps=1), CDMObjective(), RandomSchedule(UniformLength(1, 4)), optim)


def test_an_adapter_on_a_built_network_is_refused_and_one_of_an_unknown_role_is_named():
    plan = LoRAPlan(head=Adapter(rank=1, targets="blocks"))
    optim = {"student": recipe(), "head": recipe()}
    with pytest.raises(UserError, match=r"lora\.head: the objective builds this network itself"):
        CDMModule(Toy2DBackbone(fit_steps=1), Through(), RandomSchedule(UniformLength(1, 4)), optim, lora=plan)
    assert LoRAPlan(fake_scroe=Adapter()).unused(["student", "fake_score"]) == ["fake_scroe"]
