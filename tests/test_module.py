"""One iteration does what the algorithm box says: who is updated when, by how much, with which numbers."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.callbacks.ema import StudentEMA
from cdm_lightning.core.ema import lerp_parameters_
from cdm_lightning.core.lengths import FixedLength, UniformLength
from cdm_lightning.core.objective import CDMObjective, TermLosses
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import walk
from cdm_lightning.core.schedules import RandomSchedule
from cdm_lightning.data.batches import EndlessBatches
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.prompts import PromptList
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation import SamplerSpec
from cdm_lightning.module import CDMModule
from cdm_lightning.optim import LearningRate, OptimizerRecipe

PROMPTS = PromptList(["north", "south and east", "west", "anywhere"])


def recipe(lr: float = 1e-3, optimizer=torch.optim.AdamW, max_grad_norm: float = 1.0, **keywords) -> OptimizerRecipe:
    return OptimizerRecipe(partial(optimizer, **keywords), LearningRate(lr, warmup=0), max_grad_norm)


def make_module(**arguments) -> CDMModule:
    defaults = {
        "backbone": Toy2DBackbone(hidden=16, depth=1, fit_steps=20),
        "objective": CDMObjective(),
        "schedule": RandomSchedule(UniformLength(1, 4)),
        "student_optim": recipe(),
        "fake_score_optim": recipe(),
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
    trainer.fit(module, PromptDataModule(PROMPTS, PROMPTS, batch_size=3, val_batch_size=2))
    return trainer


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
        def fake_score_loss(self, fields, point, rng, shift):
            rollouts.append(point.x)
            sigmas.append(self.fake_score_levels.sample(rng, "fake_score.sigma", point.sigma, shift))
            return super().fake_score_loss(fields, point, rng, shift)

    sgd = recipe(lr=1e-2, optimizer=torch.optim.SGD, max_grad_norm=math.inf)
    settings = {"fake_score_optim": sgd, "fake_score_merge": 0.25, "student_every": 2, "gradient_checkpointing": True}
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
    rng = StepRandom(by_hand.seed, 0, [0, 1, 2], "cpu")
    fields = by_hand.bind(first_prompts())
    point = walk([by_hand.draw_rollout(fields.student, rng)])[0].point()
    network = by_hand.networks.fake_score
    for step in range(3):
        loss = by_hand.objective.fake_score_loss(fields, point, rng.again(step), by_hand.backbone.shift_sigmas).total
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
    module, snapshots = make_module(student_every=2), Snapshots("student", "student_ema")
    fit(module, 4, StudentEMA(decay=0.5), snapshots)
    student, average = snapshots.weights["student"], snapshots.weights["student_ema"]
    assert snapshots.changes("student_ema") == [False, True, False, True]
    assert module.ema_updates == 2
    first = torch.lerp(average[0], student[2], 1 - 1 / 10)  # decay min(0.5, 1 / 10)
    assert torch.allclose(average[2], first, atol=1e-7)
    assert torch.allclose(average[4], torch.lerp(first, student[4], 1 - 2 / 11), atol=1e-7)


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
    module = make_module(backbone=backbone)
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

    def fake_score_loss(self, fields, point, rng, shift) -> TermLosses:
        losses = super().fake_score_loss(fields, point, rng, shift)
        return replace(losses, total=losses.total * (math.nan if rng.iteration == 1 else 1.0))

    def student_losses(self, fields, point, rng, shift, iteration) -> Iterator[TermLosses]:
        for losses in super().student_losses(fields, point, rng, shift, iteration):
            yield replace(losses, total=losses.total * (math.inf if iteration == 3 else 1.0))


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    module, snapshots = make_module(objective=Spoiled(), fake_score_merge=0.0), Snapshots("student", "fake_score")
    trainer = fit(module, 6, snapshots, log_every_n_steps=1)
    assert snapshots.changes("fake_score") == [True, False, True, True, True, True]
    assert snapshots.changes("student") == [False, True, False, False, False, True]
    assert module.skipped_steps == {"student": 1, "fake_score": 1}
    assert trainer.global_step == 6
    assert trainer.callback_metrics["student/skipped_steps"] == 1
    assert flat(module.networks.student).isfinite().all()


def test_learning_rate_is_a_function_of_the_iteration():
    rate = LearningRate(peak=2.0, warmup=4, total=20, decay_from=0.5)
    assert [rate.at(i) for i in (0, 1, 3, 4, 9)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert [rate.at(i) for i in (10, 15, 19, 20, 30)] == pytest.approx([2.0, 1.0, 0.2, 0.0, 0.0])
    assert LearningRate(peak=2.0, warmup=0).at(10**6) == 2.0
    with pytest.raises(UserError, match="needs total"):
        LearningRate(peak=1.0, decay_from=0.5)


def test_both_optimizers_follow_their_own_rate():
    student = OptimizerRecipe(partial(torch.optim.AdamW), LearningRate(1e-3, warmup=4))
    fake_score = OptimizerRecipe(partial(torch.optim.AdamW), LearningRate(1e-2, warmup=0, total=8, decay_from=0.5))
    trainer = fit(make_module(student_optim=student, fake_score_optim=fake_score), 8, log_every_n_steps=2)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]  # as last set: iteration 7
    assert rates == pytest.approx([1e-2 * 0.25, 1e-3])


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


@pytest.mark.parametrize(
    "arguments",
    [
        {"student_every": 0},
        {"fake_score_steps": 0},
        {"fake_score_merge": 2.0},
        {"compute_dtype": "float16"},
        {"gradient_checkpointing": 2},
        {"accumulate": 0},
        {"rollouts_together": 0},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        make_module(**arguments)


# ---- rollouts


def test_objectives_that_need_it_get_full_rollouts():
    module = make_module(objective=CDMObjective(teacher_base="final"), student_every=1)
    fit(module, 2)
    assert flat(module.networks.student).isfinite().all()
    for base, expected in (("final", False), ("online", True)):  # whether the rollout's last call is trained on
        objective = CDMObjective(teacher_base=base)
        assert make_module(objective=objective).trains_at_anchor(1) is expected


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_student_is_trained_on_the_call_that_its_rollout_makes_anyway(share, monkeypatch):
    """One call less in each student's turn, and the same weights; the fake score learns in halves beside large graphs."""

    def trained() -> tuple[Tensor, int]:
        module = make_module(gradient_checkpointing=share)
        calls, velocity = [], module.backbone.velocity

        def counted(network, x, sigma, cond):
            calls.append(network)
            return velocity(network, x, sigma, cond)

        module.backbone.velocity = counted
        fit(module, 4)
        networks = module.networks
        counts = [sum(network is one for network in calls) for one in (networks.student, networks.fake_score)]
        return torch.cat([flat(networks.student), flat(networks.fake_score)]), counts

    shared, (calls, fake_score_calls) = trained()
    monkeypatch.setattr(CDMModule, "trains_at_anchor", lambda self, iteration: False)
    apart, (more_calls, whole_fake_score_calls) = trained()
    assert more_calls == calls + 2
    assert fake_score_calls == whole_fake_score_calls + (0 if share == 1 else 2)
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-6)
    start = flat(make_module().backbone.build_network())
    assert (shared[: len(start)] - start).abs().max() > 1e-4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rollouts_between_two_student_steps_walk_together(accumulate):
    """The same weights, in fewer calls of more samples."""

    def trained(together: int) -> tuple[Tensor, list[int]]:
        settings = {"student_every": 3, "accumulate": accumulate, "rollouts_together": together}
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


def test_anchors_can_be_spread_over_the_batch():
    """Of 8 slots in rollouts of 8 steps, one at each step; independent draws leave some out."""
    schedule, rng = RandomSchedule(FixedLength(8)), StepRandom(0, 3, range(8), "cpu")
    plain, spread = (
        make_module(schedule=schedule, spread_anchors=chosen).draw_rollout(None, rng) for chosen in (False, True)
    )
    assert sorted(spread.anchor.tolist()) == list(range(8))
    assert sorted(plain.anchor.tolist()) != list(range(8))
    assert torch.equal(plain.noise, spread.noise)
    assert torch.equal(plain.sigmas, spread.sigmas)


def test_which_rollouts_walk_together():
    groups = [make_module(student_every=5, rollouts_together=2).rolled_out_together(n) for n in range(10)]
    pairs = [range(0, 2), range(2, 4), range(4, 5), range(5, 7), range(7, 9), range(9, 10)]
    assert groups == [pairs[n] for n in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]
    assert make_module(student_every=2).rolled_out_together(3) == range(2, 4)
    assert make_module(student_every=1).rolled_out_together(3) == range(3, 4)
    full = make_module(objective=CDMObjective(teacher_base="final"))  # keeps all states: one batch at a time
    assert full.rolled_out_together(3) == range(3, 4)


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
    assert set(module._walked) == {1}
    module.on_train_start()
    assert not module._walked


def test_an_iteration_is_the_same_for_any_split_of_the_batch():
    """The points of a batch are those of its parts: draws belong to slots, K to the iteration."""
    module = make_module()
    fit(module, 1)
    prompts = [PROMPTS[i] for i in range(4)]

    def points(slots: list[int]) -> Tensor:
        rng = StepRandom(0, 5, slots, "cpu")
        return walk([module.draw_rollout(module.bind([prompts[i] for i in slots]).student, rng)])[0].x

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
    module, kept = make_module(samplers=samplers), Outputs()
    rhythm = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    fit(module, 2, StudentEMA(), kept, limit_val_batches=1.0, **rhythm)
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
    assert set(module.phase_seconds) == {"rollout", "fake_score", "student"}
    assert all(seconds > 0 for seconds in module.phase_seconds.values())


def test_a_module_is_built_once():
    module = make_module()
    fit(module, 1)
    networks = module.networks
    weights = copy.deepcopy(flat(networks.student))
    module.configure_model()
    assert module.networks is networks
    assert torch.equal(flat(networks.student), weights)
