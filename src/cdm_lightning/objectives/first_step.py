"""A first step that follows the teacher, so that students keep the teacher's diversity (DP-DMD, arXiv:2602.03139).

Distribution matching lets different noises lead to the same image. The first step of a student decides what an image will show;
here it learns to lead where some steps of the teacher lead from the same noise. Shapes: B samples of shape * = (C, H, W).
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
    """The squared distance of the student's first velocity to the straight line to where the teacher gets, times `weight`.

    The teacher makes the first `followed` of `teacher_steps` steps from the noise of each sample's rollout, with its guidance
    `guidance_scale` (1: none), to a state z at sigma s. The student's velocity at the noise learns (noise - z) / (1 - s). With
    `alone`, as in DP-DMD, the terms CA and DM do not act on first steps, except in rollouts of a single step. It costs `followed`
    calls of the teacher, twice as many with guidance, and a forward and backward pass of the student in each update of the student.
    The defaults are those of the authors' code for SD3.5-Medium. Raises ValueError for more steps followed than made.
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
        """Return the weighted loss of the student's first steps."""
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
        """Return a term's direction (B, *) for predictions made at sigma `seen` (B,): 0 for first steps if they are `alone`."""
        if not self.alone or sample.steps == 1:
            return direction
        return direction * per_sample((seen < 1).to(direction.dtype), direction)
