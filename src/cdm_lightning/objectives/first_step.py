"""A loss that makes the student's first step follow the teacher, to keep the teacher's diversity (DP-DMD, arXiv:2602.03139).

With distribution matching, different noises may lead to the same image. A student's first step decides what an image will show.
This loss trains that step to move from the noise straight towards the point that the teacher reaches from it in several steps.
Shapes: B samples of shape * = (C, H, W).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import GuidedField, per_sample
from cdm_lightning.core.rollout import sample as make_steps
from cdm_lightning.core.schedules import inference_sigmas
from cdm_lightning.kinds import Guidance, Steps, Weight
from cdm_lightning.objectives.base import RolledOutSample, TermLosses


@dataclass(frozen=True)
class FirstStepAnchor:
    """The loss of DP-DMD (arXiv:2602.03139): it ties the student's first velocity to the teacher's first steps from the same noise.

    The teacher starts from the noise of each sample's rollout and makes the first `followed` steps of a path of
    `teacher_steps` steps. They lead to a state z at sigma s. The teacher's guidance scale is `guidance_scale`; 1 means
    no guidance. The loss is `weight` times the mean squared error of the velocity that the student predicts from the
    noise at sigma 1, against (noise - z) / (1 - s). If `alone` is True, as in DP-DMD, the CA, DM and CDM terms do not
    act at the first step of a rollout, except in rollouts of a single step.

    This loss costs, for each student update, `followed` calls of the teacher (twice as many with guidance), and a
    forward and a backward pass of the student. The defaults are those of the DP-DMD authors' code for SD3.5-Medium. Raises
    ValueError if `followed` is above `teacher_steps`.
    """

    weight: Weight = 0.05
    teacher_steps: Steps = 30
    followed: Steps = 5
    guidance_scale: Guidance = 3.5
    alone: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.followed <= self.teacher_steps:
            raise ValueError(
                f"followed={self.followed} must be at least 1 and at most teacher_steps={self.teacher_steps}"
            )

    def loss(self, sample: RolledOutSample) -> TermLosses:
        """Return `weight` times the mean squared error of the velocity that the student predicts from the noise.

        The target of the velocity is the direction in which the teacher's first steps lead.
        """
        fields = sample.fields
        noise = sample.rng.normal("rollout.noise", sample.latent_shape)
        target = self._target(sample, noise)
        one = torch.ones(len(sample), device=noise.device)
        loss = self.weight * F.mse_loss(fields.student(noise, one).float(), target)
        return TermLosses(loss, {"first_step": loss})

    @torch.no_grad()
    def _target(self, sample: RolledOutSample, noise: Tensor) -> Tensor:
        """Return the velocity (B, *) of the straight line from the noise to the state that the teacher reaches."""
        fields = sample.fields
        teacher = GuidedField(fields.teacher, fields.teacher_uncond, self.guidance_scale)
        sigmas = sample.rng.place(inference_sigmas(self.teacher_steps, sample.shift_steps)[: self.followed + 1])
        state = make_steps(teacher, noise, sigmas)
        return (noise - state).float() / (1 - sigmas[-1])

    def kept(self, sample: RolledOutSample, seen: Tensor, direction: Tensor) -> Tensor:
        """Return a loss term's `direction` (B, *), with 0 for the samples on which the term must not act.

        If `alone` is True, the term must not act on samples at the first step of their rollout, unless the rollout has
        only this step. `seen` (B,) is the sigma at which the student made its predictions; it is 1 at the first step.
        """
        if not self.alone or sample.steps == 1:
            return direction
        return direction * per_sample((seen < 1).to(direction.dtype), direction)
