"""The CDM objective (arXiv:2605.06376): what the fake score and the student learn from one point of each rollout.

The fake score learns the distribution of the student's x0 predictions by flow matching. The student's x0 prediction is noised
again, and teacher and fake score predict x0 from it: T and F, with the text c or with no text 0. The student's loss moves its
prediction in the direction of up to three terms:
  ca   guidance augmentation, in the direction guidance_scale (T(c) - T(0));
  dm   distribution matching, in the direction T(c) - F(c);
  cdm  distribution matching off the trajectory, where the student predicts from a point that its rollout did not visit.
Shapes: B samples of shape * = (C, H, W).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import VelocityField, denoise, evaluate_together, interpolate, predict_x0
from cdm_lightning.core.levels import CappedUniformLevels, SigmaLevels, UniformLevels
from cdm_lightning.core.losses import directed_loss, flow_matching_loss
from cdm_lightning.core.ramps import LinearRamp, weight_at
from cdm_lightning.core.rollout import FullTrajectoryPoint
from cdm_lightning.kinds import Count, Guidance, Iterations, Positive, Share, Weight
from cdm_lightning.objectives.base import Merge, Objective, Role, RolledOutSample, RolloutKind, TermLosses, Update

CDMInput = Literal["extrapolated", "trajectory", "renoised"]
TeacherBase = Literal["online", "next", "final"]
TermWeight = Weight | LinearRamp


@dataclass(frozen=True)
class _Look:
    """The inputs of one term: the student's prediction, and the re-noised sample on which teacher and fake score are called."""

    x0: Tensor  # (B, *), the student's prediction, with gradient
    seen: Tensor  # (B,), the sigma at which the student made the prediction
    x: Tensor  # (B, *), the re-noised sample
    sigma: Tensor  # (B,), the sigma of the re-noised sample


@dataclass(frozen=True)
class CDMObjective(Objective):
    """CDM as published (the defaults), with the options of the paper's ablations; a term of weight 0 costs no network call.

    The fake score is updated `fake_score_steps` times in each iteration (published: once), on the same x0 predictions with
    fresh noise and sigma. After each update it becomes (1 - `fake_score_merge`) times itself plus `fake_score_merge` times the
    student (0: no averaging). The student is updated in the last of every `student_every` iterations.

    `guidance_scale` is the factor of the CA direction. A direction is divided by the mean distance of T and the student's x0
    prediction, but at least by `norm_floor`. `ca_levels`, `dm_levels`, `cdm_levels` and `fake_score_levels` draw the sigma to
    which a clean sample is noised again for each term and for the fake score.

    For the CDM term the student is called at a sigma s' that `target_levels` draws, on the input `cdm_input`: "extrapolated"
    is the anchor point (`core.rollout`) moved along its velocity to s', "renoised" is its x0 prediction with fresh noise, and
    "trajectory" is the point itself, at its own sigma. `teacher_base` is the clean sample that is noised again for
    teacher and fake score in the CDM term: "online" is the student's new x0 prediction, "next" is that of the rollout at the
    anchor, and "final" is the end of the rollout. Raises ValueError for an unknown choice, for a number out of its range, and
    if every weight is 0 at the start.
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

    def __post_init__(self) -> None:
        for name, kind in (("cdm_input", CDMInput), ("teacher_base", TeacherBase)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kind))}")
        if not self._weights(0):
            raise ValueError("ca_weight, dm_weight and cdm_weight are all 0 in iteration 0; set at least one above 0")
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
        """The fake score, which starts from the pretrained weights and follows the student's distribution."""
        return (Role("fake_score"),)

    @property
    def rollout(self) -> RolloutKind:
        """Rollouts run to their end ("full") only if `teacher_base` is "final"; otherwise they stop at the anchor."""
        return "full" if self.teacher_base == "final" else "to_anchor"

    @property
    def student_period(self) -> int:
        """The number of iterations from one student update to the next: `student_every`."""
        return self.student_every

    def updates(self, iteration: int) -> list[Update]:
        """Return the update of the fake score and, in the last of every `student_every` iterations, that of the student."""
        merge = Merge("student", self.fake_score_merge, "fake_score_merge") if self.fake_score_merge else None
        updates = [Update("fake_score", self.fake_score_losses, self.fake_score_steps, merge)]
        if iteration % self.student_every == self.student_every - 1:
            updates.append(Update("student", self.student_losses))
        return updates

    # ---- losses

    def fake_score_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the flow matching loss of the fake score on the student's x0 prediction at the anchor."""
        yield TermLosses(self._fit(sample, sample.point.x0, sample.point.sigma, "fake_score"))

    def student_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the loss in two parts, each with one student call: the terms at the anchor, and the CDM term off the trajectory.

        Terms of weight 0 are left out. With `cdm_input="trajectory"`, the CDM term is at the anchor too.
        """
        weights = self._weights(sample.iteration)
        at_anchor = [term for term in weights if term != "cdm" or self.cdm_input == "trajectory"]
        if at_anchor:
            point = sample.point
            x0 = predict_x0(sample.fields.student, point.x, point.sigma)
            looks = {term: self._look(term, x0, point.sigma, sample) for term in at_anchor}
            yield self._term_losses(sample, looks, weights, x0)
        if "cdm" in weights and "cdm" not in at_anchor:
            x, seen = self._off_trajectory(sample)
            x0 = predict_x0(sample.fields.student, x, seen)
            looks = {"cdm": self._look("cdm", x0, seen, sample)}
            yield self._term_losses(sample, looks, weights, None if at_anchor else x0)

    def fake_score(self, sample: RolledOutSample, seen: Tensor) -> VelocityField:
        """Return the field of the fake score for predictions that the student made at sigma `seen` (B,).

        Here it does not depend on `seen`; a subclass may override this (`objectives.level_aware`).
        """
        return sample.fields["fake_score"]

    def guidance(self, term: str) -> float:
        """Return the factor by which a loss term adds the teacher's guidance: its x0 with the prompt minus that without.

        It is `guidance_scale` for "ca" (guidance augmentation), and 0 for "dm" and "cdm" (distribution matching on and off the
        trajectory).
        """
        return self.guidance_scale if term == "ca" else 0.0

    def _fit(self, sample: RolledOutSample, x0: Tensor, seen: Tensor, purpose: str) -> Tensor:
        """Return the flow matching loss (0-d) of the fake score on x0 (B, *), which the student predicted at sigma `seen` (B,).

        `purpose` names the random draws of the sigma and the noise.
        """
        sigma = self.fake_score_levels.sample(sample.rng, f"{purpose}.sigma", seen, sample.shift)
        noise = sample.rng.normal(f"{purpose}.noise", x0.shape[1:])
        velocity = self.fake_score(sample, seen)(interpolate(x0, noise, sigma), sigma)
        return flow_matching_loss(velocity, x0, noise)

    def _weights(self, iteration: int) -> dict[str, float]:
        """Return the terms whose weight is not 0 in this iteration, with their weights."""
        weights = {"ca": self.ca_weight, "dm": self.dm_weight, "cdm": self.cdm_weight}
        now = {term: weight_at(weight, iteration) for term, weight in weights.items()}
        return {term: weight for term, weight in now.items() if weight != 0}

    def _look(self, term: str, x0: Tensor, seen: Tensor, sample: RolledOutSample) -> _Look:
        """Return the inputs of a term, given the student's prediction x0 (B, *) at sigma `seen` (B,)."""
        levels = {"ca": self.ca_levels, "dm": self.dm_levels, "cdm": self.cdm_levels}[term]
        base = self._base(x0, sample) if term == "cdm" else x0.detach()
        sigma = levels.sample(sample.rng, f"{term}.sigma", seen, sample.shift)
        noise = sample.rng.normal(f"{term}.noise", base.shape[1:])
        return _Look(x0, seen, interpolate(base, noise, sigma), sigma)

    def _term_losses(
        self, sample: RolledOutSample, looks: dict[str, _Look], weights: dict[str, float], predicted: Tensor | None
    ) -> TermLosses:
        """Return the weighted sum of the terms in `looks`, with figures of the student's `predicted` x0 (B, *)."""
        teacher, fake, uncond = self._judge(sample, looks)
        deltas = {term: teacher[term] - fake[term] for term in fake}
        for term in uncond:
            guidance = self.guidance(term) * (teacher[term] - uncond[term])
            deltas[term] = deltas[term] + guidance if term in deltas else guidance
        terms = {
            term: weights[term] * directed_loss(look.x0, deltas[term], teacher[term], self.norm_floor)
            for term, look in looks.items()
        }
        return TermLosses(cast(Tensor, sum(terms.values())), terms, _health(deltas, predicted))

    def _base(self, x0: Tensor, sample: RolledOutSample) -> Tensor:
        """Return the clean sample (B, *) that is noised again for teacher and fake score in the CDM term.

        "next" is what the authors' code calls x0_next: the prediction from which the rollout's step at the anchor is made.
        """
        point = sample.point
        if self.teacher_base == "online":
            return x0.detach()
        if self.teacher_base == "next":
            return point.x0
        if not isinstance(point, FullTrajectoryPoint):
            raise ValueError(f"teacher_base {self.teacher_base!r} needs a sample of a full rollout")
        return point.x0_final

    def _off_trajectory(self, sample: RolledOutSample, purpose: str = "cdm") -> tuple[Tensor, Tensor]:
        """Return the student's input off the trajectory (B, *), and its sigma s' (B,); `purpose` names the random draws."""
        point, rng = sample.point, sample.rng
        sigma = self.target_levels.sample(rng, f"{purpose}.target", point.sigma, sample.shift)
        if self.cdm_input == "extrapolated":
            return point.move_to(sigma), sigma
        return interpolate(point.x0, rng.normal(f"{purpose}.target_noise", point.x.shape[1:]), sigma), sigma

    @torch.no_grad()
    def _judge(
        self, sample: RolledOutSample, looks: dict[str, _Look]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return x0 predictions by term: of the teacher, of the fake score (all terms but CA), of the teacher without text.

        The last is computed for CA and for other terms with guidance.
        """
        fields = sample.fields
        without_text = [term for term in looks if term == "ca" or self.guidance(term)]
        matched = [term for term in looks if term != "ca"]
        teacher_calls = [(fields.teacher, looks[term]) for term in looks]
        judged = _predict_together(teacher_calls + [(fields.teacher_uncond, looks[term]) for term in without_text])
        fake = _predict_together([(self.fake_score(sample, looks[term].seen), looks[term]) for term in matched])
        return dict(zip(looks, judged)), dict(zip(matched, fake)), dict(zip(without_text, judged[len(looks) :]))


def _predict_together(calls: Sequence[tuple[VelocityField, _Look]]) -> list[Tensor]:
    """Return the float32 x0 predictions (B, *) of each field for its look, in as few network calls as the fields allow."""
    velocities = evaluate_together([(velocity_field, look.x, look.sigma) for velocity_field, look in calls])
    return [denoise(look.x, v.float(), look.sigma) for v, (_, look) in zip(velocities, calls)]


@torch.no_grad()
def _health(deltas: dict[str, Tensor], x0: Tensor | None) -> dict[str, Tensor]:
    """Return figures that show that a run goes wrong before its images show it; the losses do not show this."""
    logs = {f"{term}_delta_rms": delta.square().mean().sqrt() for term, delta in deltas.items()}
    if "ca" in deltas and "dm" in deltas:
        logs["ca_dm_cosine"] = F.cosine_similarity(deltas["ca"].flatten(1), deltas["dm"].flatten(1)).mean()
    if x0 is not None:
        logs |= {"x0_mean": x0.mean(), "x0_std": x0.std()}
    logs["nonfinite_deltas"] = cast(Tensor, sum((~delta.isfinite()).sum() for delta in deltas.values())).float()
    return logs
