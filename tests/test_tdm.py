"""TDM: its noised states and losses by the authors' formulas, and its exact fake score on a Gaussian."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cdm_lightning.core.flow import FunctionField, interpolate, per_sample, predict_x0
from cdm_lightning.core.losses import directed_loss
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import Rollout, TrajectoryPoint, simulate
from cdm_lightning.objectives.base import RolledOutSample, VelocityFields
from cdm_lightning.objectives.tdm import TDMObjective

SHAPE, BATCH = (2, 2, 2), 6
START, END = 0.75, 0.5  # sigmas of the step


@FunctionField
def student(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(x) + per_sample(sigma, x)


@FunctionField
def teacher(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * x - per_sample(sigma, x)


@FunctionField
def untold(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.2 * x


@FunctionField
def fake_score(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.cos(x) * per_sample(sigma, x)


def sample_of(batch: int = BATCH, shape: tuple = SHAPE, end: float = END, **roles) -> RolledOutSample:
    rng = StepRandom(5, 0, range(batch), "cpu")
    fields = VelocityFields(student, teacher, untold, by_role={"fake_score": fake_score, **roles})
    x, sigma = rng.normal("x", shape), torch.full((batch,), START)
    point = TrajectoryPoint(x, student(x, sigma), sigma, torch.full((batch,), end))
    return RolledOutSample(["a"] * batch, fields, rng, torch.clone, torch.clone, shape, 0, point=point, steps=4)


def by_the_authors(sample: RolledOutSample, x0: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Their add_noise and obtain_mixed_noise, with alpha = 1 - sigma, from the ODE step to END: the state and its noise."""
    end = torch.full_like(sigma, END)
    alpha, alpha_end, at, end = (per_sample(each, x0) for each in (1 - sigma, 1 - end, sigma, end))
    implied = (sample.point.x - (1 - START) * x0) / START
    at_end = alpha_end * x0 + end * implied
    beta = (at**2 - (alpha / alpha_end * end) ** 2) ** 0.5
    return at_end / alpha_end * alpha + beta * noise, (implied / alpha_end * alpha * end + beta * noise) / at


def drawn(sample: RolledOutSample, purpose: str, top: float = START) -> tuple[Tensor, Tensor]:
    return END + (top - END) * sample.rng.uniform(f"{purpose}.sigma"), sample.rng.normal(f"{purpose}.noise", SHAPE)


@pytest.mark.parametrize(("segments", "top"), [("own", START), ("to_noise", 1.0)])
def test_the_students_loss_is_the_authors(segments, top) -> None:
    sample = sample_of()
    (loss,) = TDMObjective(segments=segments, guidance_scale=3.5, norm_floor=1e-6).student_losses(sample)
    sigma, noise = drawn(sample, "dm", top)
    x0 = predict_x0(student, sample.point.x, sample.point.sigma)
    x, _ = by_the_authors(sample, x0, sigma, noise)
    real, unguided, fake = (predict_x0(field, x, sigma) for field in (teacher, untold, fake_score))
    expected = directed_loss(x0, real - fake + 3.5 * (real - unguided), real, 1e-6)
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-5)


def test_the_fake_scores_loss_is_the_authors_in_units_of_the_velocity() -> None:
    sample = sample_of()
    (loss,) = TDMObjective().fake_score_losses(sample)
    sigma, noise = drawn(sample, "fake_score")
    x0 = sample.point.x0
    x, mixed = by_the_authors(sample, x0, sigma, noise)
    weight = torch.exp(-0.5 * mixed.flatten(1).square().mean(dim=1)) / torch.exp(
        -0.5 * noise.flatten(1).square().mean(dim=1)
    )
    of_x0 = (
        (predict_x0(fake_score, x, sigma) - x0).square().flatten(1).mean(dim=1)
    )  # sigma^2 times that of the velocity
    assert float(loss.total) == pytest.approx(float((weight * of_x0 / sigma**2).mean()), rel=1e-5)


def test_a_step_to_the_end_is_noised_as_in_dmd() -> None:
    sample = sample_of(end=0.0)
    noised = TDMObjective(segments="to_noise")._noised(sample, sample.point.x0, "dm")
    assert torch.equal(noised.sigma, sample.rng.uniform("dm.sigma").clamp(min=0.02))
    torch.testing.assert_close(noised.x, interpolate(sample.point.x0, noised.noise, noised.sigma))


# ---- the exact fake score

MANY = 60_000


def gaussian_velocity(of_state: float, scale: float):
    """The velocity of states N(0, of_state^2) at END that are noised further, times `scale`."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        kept = (1 - sigma) / (1 - END)
        variance = (kept * of_state) ** 2 + sigma**2 - (kept * END) ** 2
        # the score is -x / variance, and a score g belongs to the velocity -(sigma g + x) / (1 - sigma)
        return scale * per_sample((sigma / variance - 1) / (1 - sigma), x) * x

    return FunctionField(velocity)


@pytest.mark.parametrize(("target", "is_exact"), [("state", True), ("prediction", False)])
def test_the_fake_score_of_states_is_exact_where_the_prediction_depends_on_its_noise(target, is_exact) -> None:
    """The student predicts x0 = .4 x from x of N(0, 1), so the state at END is a Gaussian, and x0 is a function of it."""
    scale = torch.ones((), requires_grad=True)
    state = END / START + (1 - END / START) * 0.4  # of x
    sample = sample_of(MANY, (1, 1, 1), fake_score=gaussian_velocity(state, scale))
    x, sigma = sample.point.x, sample.point.sigma
    sample = replace(sample, point=replace(sample.point, v=(x - 0.4 * x) / per_sample(sigma, x)))
    (loss,) = TDMObjective(fake_score_target=target).fake_score_losses(sample)
    slope = float(torch.autograd.grad(loss.total, scale)[0])
    assert (abs(slope) < 4e-3) == is_exact, slope


def test_where_prediction_and_noise_are_independent_the_fake_score_is_that_of_flow_matching() -> None:
    sample = sample_of(end=0.0)
    losses = [
        float(next(iter(TDMObjective(fake_score_target=target, segments="to_noise").fake_score_losses(sample))).total)
        for target in ("state", "prediction")
    ]
    assert losses[0] == pytest.approx(
        losses[1], rel=1e-5
    )  # a state at sigma 0 is the prediction; implied noise is the drawn


# ---- where the steps end


def test_points_of_rollouts_know_where_their_step_ends() -> None:
    sigmas = torch.tensor([[1.0, 0.6, 0.3, 0.0], [1.0, 0.7, 0.2, 0.0]])
    noise, anchor = torch.randn(2, *SHAPE), torch.tensor([2, 0])
    rollout = Rollout(student, noise, sigmas, anchor)
    for point in (rollout.point(noise), simulate(student, noise, sigmas).at(anchor)):
        assert point.sigma.tolist() == pytest.approx([0.3, 1.0])
        assert point.next_sigma.tolist() == pytest.approx([0.0, 0.7])


@pytest.mark.parametrize(
    "wrong",
    [{"segments": "all"}, {"fake_score_target": "noise"}, {"cdm_weight": 1.0}, {"off_trajectory_share": 0.5}],
)
def test_arguments_out_of_range(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TDMObjective(**wrong)
