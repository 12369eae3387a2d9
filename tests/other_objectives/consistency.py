"""Consistency distillation (arXiv:2303.01469, arXiv:2310.04378) on the student's own path: no network but student and teacher.

Shapes: B samples of shape * = (C, H, W).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_lightning.core.flow import GuidedField, move, predict_x0
from cdm_lightning.objectives.base import Objective, RolledOutSample, TermLosses, Update


@dataclass(frozen=True)
class ConsistencyObjective(Objective):
    """The student's clean prediction shall be the same all along the teacher's probability-flow ODE.

    The ODE starts at the point x_s that the student's rollout reached, so that no image is needed. One Euler step of the
    teacher, guided by `guidance_scale` (1 is none), goes to t = max(s - `step`, 0). The prediction f(x_s, s) learns
    f(x_t, t), taken without gradient (algorithm 2 of arXiv:2303.01469 with mu = 0, as arXiv:2310.14189 argues for). That
    f(x, 0) = x, the boundary condition, holds by construction: f(x, s) = x - s v(x, s).
    """

    step: float = 0.25
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step must lie in (0, 1], got {self.step}")

    @property
    def student_period(self) -> int:
        """The student learns in every iteration."""
        return 1

    def updates(self, iteration: int) -> list[Update]:
        """One update of the student."""
        return [Update("student", self.student_losses)]

    def student_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """The distance of two clean predictions on one path of the teacher."""
        fields, x, sigma = sample.fields, sample.point.x, sample.point.sigma
        with torch.no_grad():
            teacher = GuidedField(fields.teacher, fields.teacher_uncond, self.guidance_scale)
            earlier = (sigma - self.step).clamp(min=0)
            target = predict_x0(fields.student, move(x, teacher(x, sigma), sigma, earlier), earlier)
        predicted = predict_x0(fields.student, x, sigma)
        loss = pseudo_huber(predicted, target)
        yield TermLosses(loss, {"consistency": loss}, {"x0_std": predicted.detach().std()})


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """Mean over samples of sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(d), d numbers a sample (arXiv:2310.14189).

    a, b: (B, *); the result is 0-d.
    """
    c = 0.00054 * a[0].numel() ** 0.5
    return ((a.float() - b.float()).flatten(1).square().sum(dim=1) + c**2).sqrt().sub(c).mean()
