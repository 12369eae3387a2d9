"""First steps that follow the teacher (DP-DMD): the loss by the authors' loop, a closed form, and what the other terms leave alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import FunctionField, per_sample
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.core.schedules import inference_sigmas
from cdm_lightning.objectives.base import RolledOutSample, VelocityFields
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.objectives.first_step import FirstStepAnchor

SHAPE, BATCH = (2, 2, 2), 4


@FunctionField
def student(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.cos(x) * per_sample(sigma, x)


@FunctionField
def teacher(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(x) + per_sample(sigma, x)


@FunctionField
def untold(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.3 * x


def shift(sigmas: Tensor) -> Tensor:
    return 3 * sigmas / (1 + 2 * sigmas)


def sample_of(steps: int = 4, **fields) -> RolledOutSample:
    rng = StepRandom(5, 0, range(BATCH), "cpu")
    made = {"student": student, "teacher": teacher, "teacher_uncond": untold, **fields}
    x, sigma = rng.normal("x", SHAPE), torch.tensor([1.0, 0.8, 1.0, 0.3])
    point = TrajectoryPoint(x, student(x, sigma), sigma)
    networks = VelocityFields(**made, by_role={"fake_score": FunctionField(lambda x, sigma: 0.1 * x)})
    return RolledOutSample(["a"] * BATCH, networks, rng, shift, shift, SHAPE, 0, point=point, steps=steps)


@pytest.mark.parametrize("followed", [2, 5])
def test_the_loss_is_that_of_the_authors_loop(followed) -> None:
    sample = sample_of()
    noise = sample.rng.normal("rollout.noise", SHAPE)
    sigmas = inference_sigmas(5, shift)
    x = noise
    for n in range(followed):
        at = sigmas[n].expand(BATCH)
        v_u, v_c = untold(x, at), teacher(x, at)
        x = x + (sigmas[n + 1] - sigmas[n]) * (v_u + 3.5 * (v_c - v_u))
    target = (noise - x) / (1.0 - sigmas[followed])
    expected = 0.05 * F.mse_loss(student(noise, torch.ones(BATCH)), target)
    loss = FirstStepAnchor(teacher_steps=5, followed=followed).loss(sample)
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-6)
    assert list(loss.terms) == ["first_step"]


def test_where_the_teachers_paths_are_straight_it_is_followed_exactly_by_the_teacher() -> None:
    """Data that are one point m: the velocity (x - m) / sigma is the same all along a path."""
    straight = FunctionField(lambda x, sigma: (x - 0.7) / per_sample(sigma, x))
    anchor = FirstStepAnchor(guidance_scale=1.0)
    assert float(anchor.loss(sample_of(student=straight, teacher=straight)).total) < 1e-10
    assert float(anchor.loss(sample_of(teacher=straight)).total) > 1e-2


def gradient(sample: RolledOutSample, **options) -> Tensor:
    """The gradient of the terms at the anchor by the student's velocity, in each sample: (B,), its largest element."""
    velocity = torch.zeros(BATCH, *SHAPE, requires_grad=True)
    sample = replace(sample, fields=replace(sample.fields, student=FunctionField(lambda x, sigma: velocity)))
    loss = next(iter(CDMObjective(cdm_weight=0.0, **options).student_losses(sample)))
    return torch.autograd.grad(loss.total, velocity)[0].abs().flatten(1).amax(dim=1)


def test_other_terms_leave_first_steps_alone_unless_there_is_no_other_step() -> None:
    anchor = FirstStepAnchor()
    plain = gradient(sample_of())
    assert (plain > 0).all()
    alone = gradient(sample_of(), first_step=anchor)
    assert torch.equal(alone, plain * torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(gradient(sample_of(steps=1), first_step=anchor), plain)
    assert torch.equal(gradient(sample_of(), first_step=replace(anchor, alone=False)), plain)


def test_it_is_a_part_of_the_students_loss() -> None:
    *_, last = CDMObjective(first_step=FirstStepAnchor()).student_losses(sample_of())
    assert float(last.total) == float(FirstStepAnchor().loss(sample_of()).total)
    assert all("first_step" not in part.terms for part in CDMObjective().student_losses(sample_of()))


def test_more_steps_than_the_teacher_makes_are_refused() -> None:
    with pytest.raises(ValueError, match="followed=31"):
        FirstStepAnchor(followed=31)
