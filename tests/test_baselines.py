"""The baselines' losses against closed forms: consistency of a Gaussian, and DMD2's adversarial terms by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import FunctionField, VelocityField, interpolate, per_sample, predict_x0
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.objectives.base import RolledOutSample, Sample, VelocityFields
from cdm_lightning.objectives.consistency import ConsistencyObjective, ContinuousConsistencyObjective
from cdm_lightning.objectives.dmd2 import DMD2Objective, RealHead

SHAPE, BATCH, WIDTH = (3, 2, 2), 6, 0.5  # of latents; WIDTH is the standard deviation of Gaussian data around 0


def variance(sigma: Tensor) -> Tensor:
    return (1 - sigma) ** 2 * WIDTH**2 + sigma**2


@FunctionField
def teacher(x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity E[noise - x0 | x] of Gaussian data."""
    return per_sample((sigma - (1 - sigma) * WIDTH**2) / variance(sigma), x) * x


@FunctionField
def consistent(x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity whose prediction is the end of the teacher's path, x WIDTH / sqrt(variance)."""
    return per_sample((1 - WIDTH / variance(sigma).sqrt()) / sigma, x) * x


def sample_of(student: VelocityField, iteration: int = 0) -> RolledOutSample:
    rng = StepRandom(5, iteration, range(BATCH), "cpu")
    fields = VelocityFields(student, teacher, teacher)
    sigma = 0.1 + 0.85 * rng.uniform("sigma")
    x = rng.normal("x", SHAPE)
    point = TrajectoryPoint(x, student(x, sigma), sigma)
    latents = WIDTH * rng.normal("latents", SHAPE)
    return RolledOutSample(
        ["a"] * BATCH, fields, rng, torch.clone, torch.clone, SHAPE, iteration, latents, point=point, steps=3
    )


@pytest.mark.parametrize("derivative", ["exact", "finite"])
def test_the_tangent_of_a_consistent_student_is_zero(derivative) -> None:
    objective = ContinuousConsistencyObjective(warmup=0, derivative=derivative)
    (loss,) = objective.student_losses(sample_of(consistent))
    assert loss.logs["tangent_rms"] < 2e-3
    (wrong,) = objective.student_losses(sample_of(teacher))
    assert wrong.logs["tangent_rms"] > 0.1


@pytest.mark.parametrize("derivative", ["exact", "finite"])
def test_the_tangent_is_that_of_the_closed_form(derivative) -> None:
    """For a student that is the teacher, df/ds = -s du/ds along its path; both derivatives follow from the closed form."""
    sample = sample_of(teacher)
    x, sigma = sample.point.x, sample.point.sigma
    d = torch.func.jvp(lambda x, s: teacher(x, s), (x, sigma), (teacher(x, sigma), torch.ones_like(sigma)))[1]
    tangent = -per_sample(sigma, x) * d
    size = tangent.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    expected = (tangent / (size + 0.1)).square().mean()
    (loss,) = ContinuousConsistencyObjective(warmup=0, derivative=derivative).student_losses(sample)
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-2 if derivative == "finite" else 1e-5)


def test_the_gradient_of_scm_moves_the_prediction_against_its_tangent() -> None:
    scale = torch.ones((), requires_grad=True)
    student = FunctionField(lambda x, sigma: scale * teacher(x, sigma))
    sample = sample_of(student)
    (loss,) = ContinuousConsistencyObjective(warmup=0, derivative="exact").student_losses(sample)
    (gradient,) = torch.autograd.grad(loss.total, scale)
    with torch.no_grad():
        x, sigma = sample.point.x, sample.point.sigma
        u = teacher(x, sigma)
        tangent = -per_sample(sigma, x) * torch.func.jvp(teacher, (x, sigma), (u, torch.ones_like(sigma)))[1]
        goal = tangent / (tangent.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.1)
        expected = (-2 * goal * u).mean()  # the derivative of |v - (v + goal)|^2 by a factor of v
    assert float(gradient) == pytest.approx(float(expected), rel=1e-4)


def test_the_tangents_last_part_warms_up() -> None:
    losses = [
        float(
            next(ContinuousConsistencyObjective(warmup=10).student_losses(sample_of(teacher, at))).logs["tangent_rms"]
        )
        for at in (0, 5, 10, 20)
    ]
    assert losses[0] == pytest.approx(0, abs=1e-6)  # a student that is the teacher has only that part
    full = [
        float(next(ContinuousConsistencyObjective(warmup=0).student_losses(sample_of(teacher, at))).logs["tangent_rms"])
        for at in (0, 5, 10, 20)
    ]
    assert losses[1:] == pytest.approx([0.5 * full[1], full[2], full[3]], rel=1e-4)


def test_a_consistent_student_is_off_by_the_euler_step_alone() -> None:
    losses = [
        float(next(ConsistencyObjective(step=step).student_losses(sample_of(consistent))).total)
        for step in (0.08, 0.04, 0.02)
    ]
    assert losses[0] > 3 * losses[1] > 9 * losses[2] > 0  # an Euler step is wrong by about step^2
    (wrong,) = ConsistencyObjective(step=0.02).student_losses(sample_of(teacher))
    assert wrong.total > 10 * losses[2]


def test_real_latents_are_noised_where_rollouts_are_not_asked_for() -> None:
    objective = ContinuousConsistencyObjective(start="data", warmup=0)
    assert objective.rollout == "none"
    assert objective.needs_latents
    sample = sample_of(consistent)
    plain = Sample(**{name: getattr(sample, name) for name in Sample.__dataclass_fields__})
    x, sigma = objective._point(plain)
    assert torch.equal(sigma, sample.rng.uniform("consistency.sigma").clamp(0.02, 0.98))
    assert torch.equal(x, interpolate(sample.latents, sample.rng.normal("consistency.noise", SHAPE), sigma))
    (loss,) = objective.student_losses(plain)
    assert loss.logs["tangent_rms"] < 5e-3


def test_the_target_is_the_ema_if_that_is_asked_for() -> None:
    sample = sample_of(consistent)
    average = FunctionField(lambda x, sigma: 0.3 * x)
    sample = replace(sample, fields=replace(sample.fields, by_role={"student_ema": average}))
    student, ema = (
        float(next(ConsistencyObjective(step=0.02, target=target).student_losses(sample)).total)
        for target in ("student", "student_ema")
    )
    assert ema > 10 * student


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ConsistencyObjective, {"step": 0}),
        (ConsistencyObjective, {"target": "teacher"}),
        (ConsistencyObjective, {"start": "noise"}),
        (ContinuousConsistencyObjective, {"derivative": "none"}),
        (ContinuousConsistencyObjective, {"tangent_floor": 0}),
        (DMD2Objective, {"feature_blocks": ()}),
        (DMD2Objective, {"generator_weight": -1}),
    ],
)
def test_arguments_out_of_range(kind, wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)


# ---- DMD2


class Featured(VelocityField):
    """A field with hidden states: the input, as one token for each position."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return 0.2 * x

    def with_features(self, x: Tensor, sigma: Tensor, blocks) -> tuple[Tensor, list[Tensor]]:
        return self(x, sigma), [x.flatten(2).transpose(1, 2) for _ in blocks]


def test_the_adversarial_terms_are_logistic_losses_of_noised_latents() -> None:
    head = RealHead(3, 1)
    sample = sample_of(teacher)
    fields = replace(sample.fields, by_role={"fake_score": Featured()}, heads={"head": head})
    sample = replace(sample, fields=fields)
    objective = DMD2Objective(cdm_weight=0.0)
    sigma = sample.rng.uniform("gan.sigma").clamp(0.02, 0.98)

    def logits(x0: Tensor, name: str) -> Tensor:
        return head(
            Featured().with_features(interpolate(x0, sample.rng.normal(f"gan.{name}", SHAPE), sigma), sigma, [0])[1]
        )

    real, fake = F.softplus(-logits(sample.latents, "real")).mean(), F.softplus(logits(sample.point.x0, "fake")).mean()
    losses = [float(part.total) for part in objective.head_losses(sample)]
    assert losses == pytest.approx([float(real), float(fake)])
    _, *of_fake_score = objective.fake_score_losses(sample)
    assert [float(part.total) for part in of_fake_score] == pytest.approx([1e-2 * float(real), 1e-2 * float(fake)])
    *_, of_student = objective.student_losses(sample)
    x0 = predict_x0(teacher, sample.point.x, sample.point.sigma)
    assert float(of_student.total) == pytest.approx(5e-3 * float(F.softplus(-logits(x0, "fake")).mean()))
    assert [update.role for update in objective.updates(0)] == ["fake_score", "head"]
