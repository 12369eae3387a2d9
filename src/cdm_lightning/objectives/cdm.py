"""The CDM objective (arXiv:2605.06376): the losses of the fake score and of the student.

The fake score learns the distribution of the student's x0 predictions by flow matching. For the student's loss, the
student's x0 prediction is noised again, and teacher and fake score predict x0 from the noised sample. The teacher's
prediction is T(c) with the prompt and T(0) without it, and the fake score's prediction is F(c). The loss moves the
student's prediction along the sum of up to three directions:
  ca   guidance augmentation: guidance_scale (T(c) - T(0));
  dm   distribution matching: T(c) - F(c);
  cdm  distribution matching off the trajectory: also T(c) - F(c), at a point that the student's rollout did not visit.
Shapes: B samples of shape * = (C, H, W).
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from cdm_lightning.core.flow import VelocityField, interpolate, predict_x0
from cdm_lightning.core.levels import CappedUniformLevels, SigmaLevels, UniformLevels
from cdm_lightning.core.losses import directed_loss, flow_matching_loss
from cdm_lightning.core.ramps import LinearRamp, weight_at
from cdm_lightning.core.rollout import FullTrajectoryPoint
from cdm_lightning.kinds import Count, Guidance, Iterations, Positive, Share, Weight
from cdm_lightning.objectives.base import Merge, Objective, Role, RolledOutSample, RolloutKind, TermLosses, Update
from cdm_lightning.objectives.first_step import FirstStepAnchor
from cdm_lightning.objectives.looks import Judged, Look, health, predict_together
from cdm_lightning.objectives.reward import Reward

CDMInput = Literal["extrapolated", "trajectory", "renoised"]
TeacherBase = Literal["online", "next", "final"]
TermWeight = Weight | LinearRamp


@dataclass(frozen=True)
class CDMObjective(Objective):
    """The CDM objective (arXiv:2605.06376). The defaults are the settings of the paper; other values are its ablations.

    The fake score is updated `fake_score_steps` times in each iteration. Each of these updates uses the same x0
    predictions of the student with new noise and a new sigma. After each update the fake score becomes (1 -
    `fake_score_merge`) times itself plus `fake_score_merge` times the student. The student is updated in the last of
    every `student_every` iterations.

    The student's loss has three terms: CA (guidance augmentation), DM (distribution matching) and CDM (distribution
    matching off the trajectory), with the weights `ca_weight`, `dm_weight` and `cdm_weight`. A weight is a number, or a
    `LinearRamp` over the iterations. A term of weight 0 costs nothing. Each term moves the student's x0 prediction in a
    direction. For CA, the direction is `guidance_scale` times the difference of the teacher's x0 predictions with and
    without the prompt; for DM and CDM, it is the teacher's x0 prediction minus the fake score's. The direction of each
    term is divided by the mean distance between the teacher's and the student's x0 predictions, or by `norm_floor` if
    that is larger. The input of teacher and fake score is the student's x0 prediction after new noise was added to it.
    `ca_levels`, `dm_levels` and `cdm_levels` draw the sigma of this input for each term, and `fake_score_levels` draws
    it for the fake score's own loss.

    The CDM term calls the student at a point off its rollout. The rollout's *anchor* is the step that is drawn at
    random for each sample, and `target_levels` draws the sigma s' of the new point. `cdm_input` says how the point is
    made:
      "extrapolated"  the state at the anchor, moved along its velocity to s';
      "renoised"      the x0 prediction at the anchor, noised to s';
      "trajectory"    the state at the anchor itself, at its own sigma.
    `teacher_base` says which clean sample the CDM term noises for teacher and fake score:
      "online"  the x0 prediction that the student makes at this point;
      "next"    the x0 prediction that the rollout made at the anchor;
      "final"   the end of the rollout.

    `first_step` adds a loss that makes the student's first step follow the teacher, for diversity. `reward` adds a loss
    from a scorer of images. A loss is not added if its argument is None. Raises ValueError for an unknown choice, for a
    number out of its range, and if `ca_weight`, `dm_weight` and `cdm_weight` are all 0 in iteration 0.
    """

    ca_weight: TermWeight = 1.0
    dm_weight: TermWeight = 1.0
    cdm_weight: TermWeight = 1.0
    guidance_scale: Guidance = 7.0
    norm_floor: Positive = 0.1
    fake_score_levels: SigmaLevels = field(default_factory=UniformLevels)
    ca_levels: SigmaLevels = field(default_factory=CappedUniformLevels)
    dm_levels: SigmaLevels = field(default_factory=UniformLevels)
    cdm_levels: SigmaLevels = field(default_factory=UniformLevels)
    target_levels: SigmaLevels = field(default_factory=UniformLevels)
    cdm_input: CDMInput = "extrapolated"
    teacher_base: TeacherBase = "online"
    student_every: Iterations = 2
    fake_score_steps: Count = 1
    fake_score_merge: Share = 1e-3
    first_step: FirstStepAnchor | None = None
    reward: Reward | None = None

    def __post_init__(self) -> None:
        for name, kind in (("cdm_input", CDMInput), ("teacher_base", TeacherBase)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kind))}")
        if not self._weights(0):
            raise ValueError("ca_weight, dm_weight and cdm_weight are all 0 in iteration 0; set one of them above 0")
        if self.norm_floor <= 0:
            raise ValueError(f"norm_floor={self.norm_floor} must be positive")
        if self.student_every < 1 or self.fake_score_steps < 1 or not 0 <= self.fake_score_merge <= 1:
            raise ValueError(
                f"student_every={self.student_every} and fake_score_steps={self.fake_score_steps} must be at least 1, and "
                f"fake_score_merge={self.fake_score_merge} must be in [0, 1]"
            )

    # ---- roles, rollout and updates

    @property
    def roles(self) -> tuple[Role, ...]:
        """The fake score, which starts from the pretrained weights and learns the distribution of the student's images."""
        return (Role("fake_score"),)

    @property
    def rollout(self) -> RolloutKind:
        """How far rollouts go.

        With `teacher_base="final"` they go to the clean image ("full"), otherwise to a random step ("to_anchor").
        """
        return "full" if self.teacher_base == "final" else "to_anchor"

    @property
    def student_period(self) -> int:
        """The number of iterations from one student update to the next: `student_every`."""
        return self.student_every

    def updates(self, iteration: int) -> list[Update]:
        """Return the update of the fake score.

        In the last of every `student_every` iterations, the update of the student follows.
        """
        merge = Merge("student", self.fake_score_merge, "fake_score_merge") if self.fake_score_merge else None
        updates = [Update("fake_score", self.fake_score_losses, self.fake_score_steps, merge)]
        if iteration % self.student_every == self.student_every - 1:
            updates.append(Update("student", self.student_losses))
        return updates

    # ---- losses

    def fake_score_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the flow matching loss of the fake score on the student's x0 prediction at a random step of its rollout."""
        yield TermLosses(self._fit(sample, sample.point.x0, sample.point.sigma, "fake_score"))

    def student_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the student's loss in up to three parts. The computation of each part calls the student once.

        The first part holds the CA and DM terms and the reward, at the rollout's anchor (a randomly drawn step). The
        second part is the CDM term off the trajectory; with `cdm_input="trajectory"` the first part holds this term
        too. The third part is the loss of `first_step`. Terms of weight 0 are left out.
        """
        weights = self._weights(sample.iteration)
        at_anchor = [term for term in weights if term != "cdm" or self.cdm_input == "trajectory"]
        if at_anchor or self.reward is not None:
            point = sample.point
            x0 = predict_x0(sample.fields.student, point.x, point.sigma)
            looks = {term: self._look(term, x0, point.sigma, sample) for term in at_anchor}
            parts = [self._term_losses(sample, looks, weights, x0)] if at_anchor else []
            parts += [self.reward.loss(sample, x0)] if self.reward is not None else []
            yield reduce(operator.add, parts)
        if "cdm" in weights and "cdm" not in at_anchor:
            x, seen = self._off_trajectory(sample)
            x0 = predict_x0(sample.fields.student, x, seen)
            looks = {"cdm": self._look("cdm", x0, seen, sample)}
            yield self._term_losses(sample, looks, weights, None if at_anchor else x0)
        if self.first_step is not None:
            yield self.first_step.loss(sample)

    def fake_score(self, sample: RolledOutSample, seen: Tensor) -> VelocityField:
        """Return the fake score's velocity field for x0 predictions that the student made at sigma `seen` (B,).

        In this class the field does not depend on `seen`. A subclass can override this method to make `seen` an input
        of the fake score (see `objectives.level_aware`).
        """
        return sample.fields["fake_score"]

    def guidance(self, term: str) -> float:
        """Return the guidance scale of a loss term: `guidance_scale` for "ca", and 0 for "dm" and "cdm".

        The direction of the term contains this scale times T(c) - T(0), where T(c) and T(0) are the teacher's x0
        predictions with and without the prompt.
        """
        return self.guidance_scale if term == "ca" else 0.0

    def _fit(self, sample: RolledOutSample, x0: Tensor, seen: Tensor, purpose: str) -> Tensor:
        """Return the flow matching loss (0-d) of the fake score on x0 (B, *), which the student predicted at sigma `seen` (B,).

        The names of its random draws begin with `purpose`.
        """
        sigma = self.fake_score_levels.sample(sample.rng, f"{purpose}.sigma", seen, sample.shift)
        noise = sample.rng.normal(f"{purpose}.noise", x0.shape[1:])
        velocity = self.fake_score(sample, seen)(interpolate(x0, noise, sigma), sigma)
        return flow_matching_loss(velocity, x0, noise)

    def _weights(self, iteration: int) -> dict[str, float]:
        """Return the weight of each term in this iteration, without the terms of weight 0."""
        weights = {"ca": self.ca_weight, "dm": self.dm_weight, "cdm": self.cdm_weight}
        now = {term: weight_at(weight, iteration) for term, weight in weights.items()}
        return {term: weight for term, weight in now.items() if weight != 0}

    def _look(self, term: str, x0: Tensor, seen: Tensor, sample: RolledOutSample) -> Look:
        """Return the inputs of a loss term for `x0` (B, *), which the student predicted at sigma `seen` (B,)."""
        levels = {"ca": self.ca_levels, "dm": self.dm_levels, "cdm": self.cdm_levels}[term]
        base = self._base(x0, sample) if term == "cdm" else x0.detach()
        sigma = levels.sample(sample.rng, f"{term}.sigma", seen, sample.shift)
        noise = sample.rng.normal(f"{term}.noise", base.shape[1:])
        return Look(x0, seen, interpolate(base, noise, sigma), sigma)

    def _term_losses(
        self, sample: RolledOutSample, looks: dict[str, Look], weights: dict[str, float], predicted: Tensor | None
    ) -> TermLosses:
        """Return the weighted sum of some loss terms. `looks` holds their inputs.

        `predicted` (B, *) is the student's x0, which is used for the logs only.
        """
        judged = self._judge(sample, looks)
        teacher, deltas = judged.teacher, dict(judged.directions)
        for term, uncond in judged.without_text.items():
            guidance = self.guidance(term) * (teacher[term] - uncond)
            deltas[term] = deltas[term] + guidance if term in deltas else guidance
        if self.first_step is not None:
            deltas = {term: self.first_step.kept(sample, looks[term].seen, delta) for term, delta in deltas.items()}
        terms = {
            term: weights[term] * directed_loss(look.x0, deltas[term], teacher[term], self.norm_floor)
            for term, look in looks.items()
        }
        logs = health(deltas, predicted) | judged.figures
        matched = sum(weight for term, weight in weights.items() if term != "ca")
        if predicted is not None and matched:  # once in an update
            guidance = sum(weight * self.guidance(term) for term, weight in weights.items())
            logs["effective_guidance"] = torch.full((), 1 + guidance / matched, device=predicted.device)
        return TermLosses(cast(Tensor, sum(terms.values())), terms, logs)

    def _base(self, x0: Tensor, sample: RolledOutSample) -> Tensor:
        """Return the clean sample (B, *) that the CDM term noises for teacher and fake score.

        The choice "next" is `x0_next` in the authors' code: the rollout's x0 prediction at its randomly drawn step.
        """
        point = sample.point
        if self.teacher_base == "online":
            return x0.detach()
        if self.teacher_base == "next":
            return point.x0
        if not isinstance(point, FullTrajectoryPoint):
            raise ValueError(
                f"teacher_base={self.teacher_base!r} needs rollouts to their end (clean images); return 'full' from Objective.rollout"
            )
        return point.x0_final

    def _off_trajectory(self, sample: RolledOutSample, purpose: str = "cdm") -> tuple[Tensor, Tensor]:
        """Return the student's input off its rollout (B, *) and the sigma of that input (B,).

        The names of the random draws begin with `purpose`.
        """
        point, rng = sample.point, sample.rng
        sigma = self.target_levels.sample(rng, f"{purpose}.target", point.sigma, sample.shift)
        if self.cdm_input == "extrapolated":
            return point.move_to(sigma), sigma
        return interpolate(point.x0, rng.normal(f"{purpose}.target_noise", point.x.shape[1:]), sigma), sigma

    @torch.no_grad()
    def _judge(self, sample: RolledOutSample, looks: dict[str, Look]) -> Judged:
        """Call teacher and fake score on the noised sample of each loss term, and return their results.

        For terms with guidance, the teacher is also called with the empty prompt.
        """
        fields = sample.fields
        without_text = [term for term in looks if term == "ca" or self.guidance(term)]
        teacher_calls = [(fields.teacher, looks[term]) for term in looks]
        judged = predict_together(teacher_calls + [(fields.teacher_uncond, looks[term]) for term in without_text])
        teacher = dict(zip(looks, judged))
        directions, figures = self._differences(
            sample, {term: look for term, look in looks.items() if term != "ca"}, teacher
        )
        return Judged(teacher, dict(zip(without_text, judged[len(looks) :])), directions, figures)

    def _differences(
        self, sample: RolledOutSample, looks: dict[str, Look], teacher: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the teacher's x0 minus the fake score's, T(c) - F(c) (B, *), for each loss term, and figures for the log.

        `teacher` holds T(c) by term. A subclass may weight the differences (`objectives.f_distill`).
        """
        fake = predict_together([(self.fake_score(sample, look.seen), look) for look in looks.values()])
        return {term: teacher[term] - of_term for term, of_term in zip(looks, fake)}, {}
