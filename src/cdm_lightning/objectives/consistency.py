"""Consistency distillation: the student learns to predict one clean image everywhere on a path of the teacher's ODE.

`ConsistencyObjective` compares the predictions at two points that are a finite step apart, as in consistency models
(arXiv:2303.01469). With guidance and real images it is the method of latent consistency models (arXiv:2310.04378).
`ContinuousConsistencyObjective` takes the limit of an infinitely small step (sCM, arXiv:2410.11081). For rectified
flow, a network with the velocity v predicts the clean image f(x, s) = x - s v(x, s) at state x and sigma s, so f(x, 0)
= x always holds. No fake score is trained. Shapes: B samples of shape * = (C, H, W).
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from cdm_lightning.core.flow import GuidedField, VelocityField, interpolate, move, per_sample, predict_x0
from cdm_lightning.core.levels import SigmaLevels, UniformLevels
from cdm_lightning.kinds import Guidance, Iteration, Positive, Sigma
from cdm_lightning.objectives.base import Objective, RolledOutSample, RolloutKind, Sample, TermLosses, Update

Start = Literal["student", "data"]


@dataclass(frozen=True)
class _AlongTheODE(Objective):
    """The base class of both forms of consistency distillation: the points on the teacher's ODE, and the teacher's guidance.

    With `start="student"` the points are states of the student's rollouts, so no images are needed. With `start="data"`, as
    published, they are real latents noised to a sigma that `levels` draws. `guidance_scale` is that of the teacher; 1
    means no guidance. The student is updated in each iteration.
    """

    start: Start = "student"
    guidance_scale: Guidance = 1.0
    levels: SigmaLevels = field(default_factory=UniformLevels)

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise ValueError(f"start={self.start!r} must be one of {', '.join(get_args(Start))}")

    @property
    def rollout(self) -> RolloutKind:
        """How far rollouts go.

        With `start="student"` they go to a random step ("to_anchor"); with `start="data"` there are none ("none").
        """
        return "to_anchor" if self.start == "student" else "none"

    @property
    def needs_latents(self) -> bool:
        """Whether the loss uses latents of real images: only with `start="data"`."""
        return self.start == "data"

    @property
    def student_period(self) -> int:
        """The number of iterations from one student update to the next: 1."""
        return 1

    def updates(self, iteration: int) -> list[Update]:
        """Return the student's update, which is made in every iteration."""
        return [Update("student", self.student_losses)]

    @abstractmethod
    def student_losses(self, sample: Sample) -> Iterator[TermLosses]:
        """Yield the parts of the student's loss."""

    def _point(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return the states x (B, *) at which the loss is computed, and their sigmas (B,)."""
        if isinstance(sample, RolledOutSample):
            return sample.point.x, sample.point.sigma
        latents = sample.latents
        assert latents is not None  # `needs_latents`
        sigma = self.levels.sample(sample.rng, "consistency.sigma", torch.ones(len(sample)), sample.shift)
        return interpolate(latents, sample.rng.normal("consistency.noise", latents.shape[1:]), sigma), sigma

    def _teacher(self, sample: Sample) -> VelocityField:
        return GuidedField(sample.fields.teacher, sample.fields.teacher_uncond, self.guidance_scale)


@dataclass(frozen=True)
class ConsistencyObjective(_AlongTheODE):
    """Consistency distillation with a finite step.

    One Euler step of the teacher leads from a state at sigma s to a state at sigma t = max(s - `step`, 0). The
    student's x0 prediction at s is trained to equal the x0 prediction at t, which carries no gradient. `target` says
    which network predicts at t: "student" (arXiv:2310.14189), or "student_ema", the student's EMA (arXiv:2303.01469).
    The loss is the distance between the two predictions (see `pseudo_huber`).

    `start` says what the states at s are. With "student" they are states of the student's rollouts, and no images are
    needed. With "data", as in the published methods, they are latents of real images, noised to a sigma that `levels`
    draws. `guidance_scale` is the guidance scale of the teacher; 1 means no guidance. Raises ValueError for an argument
    out of its range.
    """

    step: Sigma = 0.05
    target: Literal["student", "student_ema"] = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step <= 1:
            raise ValueError(f"step={self.step} must be above 0 and at most 1")
        if self.target not in ("student", "student_ema"):
            raise ValueError(f"target={self.target!r} must be student or student_ema")

    def student_losses(self, sample: Sample) -> Iterator[TermLosses]:
        """Yield the `pseudo_huber` distance between the x0 predictions at two points of one path of the teacher."""
        x, sigma = self._point(sample)
        with torch.no_grad():
            earlier = (sigma - self.step).clamp(min=0)
            moved = move(x, self._teacher(sample)(x, sigma), sigma, earlier)
            target = predict_x0(sample.fields[self.target].precise(), moved, earlier)
        predicted = predict_x0(sample.fields.student, x, sigma)
        loss = pseudo_huber(predicted, target)
        yield TermLosses(loss, {"consistency": loss}, {"x0_std": predicted.detach().std()})


@dataclass(frozen=True)
class ContinuousConsistencyObjective(_AlongTheODE):
    """Continuous-time consistency distillation (sCM, arXiv:2410.11081), for rectified flow.

    Let u be the teacher's velocity and v the student's. On a path of the teacher's ODE, dx/ds = u, and the student's
    prediction f = x - s v changes at the rate g = u - v - s (dv/dx u + dv/ds). A consistent student has g = 0. The
    student's velocity is therefore trained to equal v + g / (|g| + `tangent_floor`), which carries no gradient. Here
    |g| is the root mean square of g in a sample; the division is the paper's tangent normalization. The part s (dv/dx u
    + dv/ds) of g is multiplied by a factor that grows linearly from 0 to 1 over the first `warmup` iterations. The
    defaults of `tangent_floor` and `warmup` are the paper's.

    `derivative` says how dv/dx u + dv/ds is computed. "exact" is a Jacobian-vector product by forward-mode
    differentiation, which the network's attention must support. "finite" is a central difference, which works for every
    network: v is computed at two points of the path, whose sigmas are `finite_step` below and above s.
    `ConsistencyObjective` describes `start`, `guidance_scale` and `levels`. Raises ValueError for an argument out of
    its range.
    """

    tangent_floor: Positive = 0.1
    warmup: Iteration = 10_000
    derivative: Literal["exact", "finite"] = "finite"
    finite_step: Annotated[float, Gt(0), Lt(0.1)] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.derivative not in ("exact", "finite"):
            raise ValueError(f"derivative={self.derivative!r} must be exact or finite")
        if self.tangent_floor <= 0 or self.warmup < 0 or not 0 < self.finite_step < 0.1:
            raise ValueError(
                f"tangent_floor={self.tangent_floor} must be above 0, warmup={self.warmup} must be at least 0, and "
                f"finite_step={self.finite_step} must be above 0 and below 0.1"
            )

    def student_losses(self, sample: Sample) -> Iterator[TermLosses]:
        """Yield the mean squared error (0-d) between the student's velocity and v + g / (|g| + `tangent_floor`).

        `ContinuousConsistencyObjective` describes v and g.
        """
        x, sigma = self._point(sample)
        student = sample.fields.student
        velocity = student(x, sigma)
        with torch.no_grad():
            u, v = self._teacher(sample)(x, sigma), velocity.detach()
            share = min(1.0, sample.iteration / self.warmup) if self.warmup else 1.0
            tangent = u - v - share * per_sample(sigma, x) * self._derivative(student.precise(), x, sigma, u)
            size = tangent.square().mean(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt()
            target = v + tangent / (size + self.tangent_floor)
        loss = (velocity - target).square().mean()
        x0 = x - per_sample(sigma, x) * v
        yield TermLosses(loss, {"consistency": loss}, {"tangent_rms": size.mean(), "x0_std": x0.std()})

    def _derivative(self, student: VelocityField, x: Tensor, sigma: Tensor, u: Tensor) -> Tensor:
        """Return dv/dx u + dv/ds (B, *), the derivative of the student's velocity v along the teacher's path."""
        if self.derivative == "exact":
            return torch.func.jvp(lambda x, sigma: student(x, sigma), (x, sigma), (u, torch.ones_like(sigma)))[1]
        low, high = (sigma - self.finite_step).clamp(min=0), (sigma + self.finite_step).clamp(max=1)
        ahead = student(move(x, u, sigma, high), high)
        return (ahead - student(move(x, u, sigma, low), low)) / per_sample(high - low, x)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """Return the pseudo-Huber distance (0-d) of a and b (B, *), averaged over the B samples.

    For samples of d numbers it is sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(d), as in arXiv:2310.14189.
    """
    c = 0.00054 * a[0].numel() ** 0.5
    return ((a.float() - b.float()).flatten(1).square().sum(dim=1) + c**2).sqrt().sub(c).mean()
