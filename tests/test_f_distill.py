"""f-distill against closed forms: h of each divergence, and the student's gradient for Gaussians, whose ratio is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cdm_lightning.core.flow import FunctionField, VelocityField, interpolate, per_sample
from cdm_lightning.core.levels import UniformLevels
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.objectives.base import RolledOutSample, VelocityFields
from cdm_lightning.objectives.dmd2 import DMD2Objective
from cdm_lightning.objectives.f_distill import FDistillObjective, divergence_weight

SHAPE, BATCH = (1, 1, 1), 40_000
DATA = (0.3, 0.6)  # mean and standard deviation of the data
STUDENT = (-0.1, 0.75)  # and of the student's predictions
SIGMA = 0.5
CONVEX = {  # f of each divergence, scaled so that r^2 f''(r) is h itself
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "squared_hellinger": lambda r: 4 * (1 - r.sqrt()),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 0.5 / r,
}
each_divergence = pytest.mark.parametrize("divergence", CONVEX)


def noised(mean: Tensor | float, deviation: float, sigma: Tensor | float):
    """Mean and standard deviation of a noised Gaussian."""
    return (1 - sigma) * mean, ((1 - sigma) ** 2 * deviation**2 + sigma**2) ** 0.5


def log_density(x: Tensor, mean: Tensor | float, deviation: Tensor | float) -> Tensor:
    return -(((x - mean) / deviation) ** 2) / 2 - torch.as_tensor(deviation).log() - 0.5 * math.log(2 * math.pi)


def divergence_and_slope(divergence: str, sigma: float) -> float:
    """The derivative of D_f(data, student) at noise sigma by the student's mean, by quadrature and autograd."""
    grid = torch.linspace(-12, 12, 60_001, dtype=torch.float64)
    mean = torch.tensor(STUDENT[0], dtype=torch.float64, requires_grad=True)
    p = log_density(grid, *noised(*DATA, sigma))
    q = log_density(grid, *noised(mean, STUDENT[1], sigma))
    value = torch.trapezoid(q.exp() * CONVEX[divergence]((p - q).exp()), grid)
    return float(torch.autograd.grad(value, mean)[0])


@each_divergence
def test_h_weights_the_scores_so_that_they_are_the_gradient_of_the_divergence(divergence) -> None:
    """d/dm D_f = E_q[h(p / q) (score of q - score of p)], for samples that move with m."""
    grid = torch.linspace(-12, 12, 60_001, dtype=torch.float64)
    (pm, pd), (qm, qd) = noised(*DATA, 0.0), noised(*STUDENT, 0.0)
    p, q = log_density(grid, pm, pd), log_density(grid, qm, qd)
    scores = (pm - grid) / pd**2, (qm - grid) / qd**2
    h = divergence_weight(divergence, (p - q).exp())
    by_h = float(torch.trapezoid(q.exp() * h * (scores[1] - scores[0]), grid))
    assert by_h == pytest.approx(divergence_and_slope(divergence, 0.0), rel=1e-5)


# ---- the objective


def optimal(mean: Tensor | float, deviation: float):
    """The velocity E[noise - x0 | x] of a Gaussian."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = per_sample(sigma, x)
        of_x = ((1 - sigma) ** 2 * deviation**2 + sigma**2) ** -1 * (x - (1 - sigma) * mean)
        return sigma * of_x - (mean + (1 - sigma) * deviation**2 * of_x)

    return velocity


class ExactFakeScore(VelocityField):
    """The velocity of the student's distribution; its hidden states are x and sigma."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return optimal(*STUDENT)(x, sigma)

    def with_features(self, x: Tensor, sigma: Tensor, blocks) -> tuple[Tensor, list[Tensor]]:
        return self(x, sigma), [x.flatten(), sigma]


def exact_head(features: list[Tensor]) -> Tensor:
    """The logit of the optimal classifier: the log of the density ratio."""
    x, sigma = features
    return log_density(x, *noised(*DATA, sigma)) - log_density(x, *noised(*STUDENT, sigma))


def sample_of(mean: Tensor) -> RolledOutSample:
    """A student whose predictions are exactly N(mean, STUDENT[1]^2)."""
    rng = StepRandom(5, 0, range(BATCH), "cpu")
    x, sigma = rng.normal("x", SHAPE), torch.full((BATCH,), 0.7)
    student = FunctionField(lambda x, s: (x - mean - STUDENT[1] * x) / per_sample(s, x))
    fields = VelocityFields(
        student,
        FunctionField(optimal(*DATA)),
        FunctionField(optimal(*DATA)),
        by_role={"fake_score": ExactFakeScore()},
        heads={"head": exact_head},
    )
    point = TrajectoryPoint(x, student(x, sigma).detach(), sigma)
    return RolledOutSample(["a"] * BATCH, fields, rng, torch.clone, torch.clone, SHAPE, 0, point.x0, point=point)


def objective(divergence: str, **options) -> FDistillObjective:
    levels = UniformLevels(SIGMA, SIGMA + 1e-5)
    options = {"ca_weight": 0.0, "cdm_weight": 0.0, "generator_weight": 0.0, "norm_floor": 1e3, **options}
    return FDistillObjective(divergence=divergence, dm_levels=levels, ratio_low=1e-4, ratio_high=1e4, **options)


@each_divergence
def test_the_students_gradient_is_that_of_the_divergence(divergence) -> None:
    mean = torch.tensor(STUDENT[0], requires_grad=True)
    (loss,) = objective(divergence).student_losses(sample_of(mean))
    (gradient,) = torch.autograd.grad(loss.total, mean)
    slope = divergence_and_slope(divergence, SIGMA)
    # T - F is sigma^2 / (1 - sigma) times the difference of the scores, and the noised samples move with (1 - sigma) m
    at_one = float(divergence_weight(divergence, torch.ones(())))
    expected = 2 / 1e3 * SIGMA**2 / (1 - SIGMA) ** 2 * slope / at_one
    assert float(gradient) == pytest.approx(expected, rel=0.04)


def test_the_divergences_differ_where_the_ratio_is_not_one() -> None:
    slopes = [divergence_and_slope(name, SIGMA) for name in ("reverse_kl", "forward_kl", "jensen_shannon")]
    assert min(abs(a / b - 1) for a in slopes for b in slopes if a is not b) > 0.1


def test_reverse_kl_is_dmd2() -> None:
    sample = sample_of(torch.tensor(STUDENT[0]))
    options = {"ca_weight": 0.0, "cdm_weight": 0.0, "generator_weight": 0.0}
    ours, theirs = (
        [(float(part.total), part.logs.keys()) for part in made.student_losses(sample)]
        for made in (FDistillObjective(divergence="reverse_kl", **options), DMD2Objective(**options))
    )
    assert ours == theirs


def test_the_running_means_find_the_mean_ratio_of_each_band_and_the_mean_weight() -> None:
    made = FDistillObjective(divergence="forward_kl", ratio_bands=2, ratio_decay=0.8)
    sigma = torch.tensor([0.1, 0.2, 0.3, 0.9])
    ratio = torch.tensor([2.0, 4.0, 6.0, 0.5])
    for _ in range(200):
        weight, figures = made._weight(ratio.log(), sigma)
        made.observe("student", figures, made=True)
        made.observe("fake_score", {name: torch.tensor(9.0) for name in figures}, made=True)
        made.observe("student", {name: torch.tensor(math.nan) for name in figures}, made=False)
    assert made.means.ratios == pytest.approx([4.0, 0.5], rel=1e-4)
    assert weight.tolist() == pytest.approx([0.5, 1.0, 1.5, 1.0], rel=1e-3)  # ratio / mean, whose mean is 1
    other = FDistillObjective(divergence="forward_kl", ratio_bands=2)
    other.load_state_dict(made.state_dict())
    assert other.state_dict() == made.state_dict()
    clamped, _ = replace(made, ratio_high=3.0)._weight(ratio.log(), sigma)
    assert clamped.tolist() == pytest.approx([2.0, 3.0, 3.0, 0.5])


def test_the_head_judges_the_point_at_which_teacher_and_fake_score_are_compared() -> None:
    sample, seen = sample_of(torch.tensor(STUDENT[0])), []
    heads = {"head": lambda features: seen.append(features) or torch.zeros(BATCH)}
    made = objective("jensen_shannon", dm_weight=1.0)
    list(made.student_losses(replace(sample, fields=replace(sample.fields, heads=heads))))
    sigma = sample.rng.uniform("dm.sigma").clamp(SIGMA, SIGMA + 1e-5)
    x = interpolate(sample.point.x0, sample.rng.normal("dm.noise", SHAPE), sigma)
    torch.testing.assert_close(seen[0][0], x.flatten())
    assert torch.equal(seen[0][1], sigma)


@pytest.mark.parametrize(
    "wrong", [{"divergence": "total_variation"}, {"ratio_low": 30.0}, {"ratio_bands": 0}, {"ratio_decay": 1.0}]
)
def test_arguments_out_of_range(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FDistillObjective(**wrong)
