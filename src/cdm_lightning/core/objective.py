"""The CDM objective (arXiv:2605.06376): what the fake score and the student learn from one point of a rollout.

Both losses see velocity fields only. Shapes: B samples of shape * = (C, H, W). Terms of the student's loss:
  ca   guidance augmentation: along guidance_scale (T(c) - T(0)), T the teacher's clean prediction, c the text, 0 none;
  dm   distribution matching: along T(c) - F(c), F the fake score's clean prediction;
  cdm  the same off the trajectory, at a point that the student's rollout did not visit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import Rows, VelocityField, denoise, evaluate_together, interpolate, predict_x0
from cdm_lightning.core.levels import CappedUniformLevels, SigmaLevels, UniformLevels
from cdm_lightning.core.losses import directed_loss, flow_matching_loss
from cdm_lightning.core.ramps import LinearRamp, weight_at
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.core.schedules import Shift

CDMInput = Literal["extrapolated", "trajectory", "renoised"]
TeacherBase = Literal["online", "next", "final"]
Weight = float | LinearRamp


@dataclass(frozen=True)
class VelocityFields:
    """The networks of one batch as velocity fields; all but `teacher_uncond` see the batch's text."""

    student: VelocityField
    fake_score: VelocityField
    teacher: VelocityField
    teacher_uncond: VelocityField

    def select(self, rows: Rows) -> "VelocityFields":
        """The networks of some samples."""
        networks = (self.student, self.fake_score, self.teacher, self.teacher_uncond)
        return VelocityFields(*(network.select(rows) for network in networks))


@dataclass(frozen=True)
class TermLosses:
    """A loss, its weighted terms and detached health figures by name: all 0-d."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)


def summed(losses: Iterable[TermLosses]) -> TermLosses:
    """All of them as one loss, for one backward pass; figures of the same name are added."""
    total, terms, logs = 0.0, {}, {}
    for one in losses:
        total = total + one.total
        terms |= one.terms
        logs |= {name: logs.get(name, 0.0) + value for name, value in one.logs.items()}
    return TermLosses(total, terms, logs)


class Objective(Protocol):
    """What a student and a fake score learn from a point of a rollout; `CDMObjective` is one, baselines are others."""

    @property
    def needs_full_rollout(self) -> bool:
        """Whether points must come from full rollouts, since what follows the anchor is used."""

    def trains_at_anchor(self, iteration: int) -> bool:
        """Whether the student is trained on its own call at the anchor: then the rollout makes it with gradient."""

    def fake_score_loss(
        self, fields: VelocityFields, point: TrajectoryPoint, rng: StepRandom, shift: Shift
    ) -> TermLosses:
        """The fake score's loss, at every iteration."""

    def student_losses(
        self, fields: VelocityFields, point: TrajectoryPoint, rng: StepRandom, shift: Shift, iteration: int
    ) -> Iterator[TermLosses]:
        """The student's loss in its turns, as summands; `iteration` counts from 0."""


@dataclass(frozen=True)
class _Look:
    """One term's view: the student's prediction (with gradient) and the re-noised sample that it is judged by."""

    x0: Tensor  # (B, *)
    x: Tensor  # (B, *)
    sigma: Tensor  # (B,)


@dataclass(frozen=True)
class CDMObjective:
    """The three terms with their weights and ablations; a term of weight 0 costs no network call.

    `guidance_scale` is the factor of the CA direction, `norm_floor` the least n that directions are divided by.
    The `*_levels` draw the sigma at which a term (or the fake score) looks at a re-noised sample; `target_levels` draws
    the sigma s' at which the student is asked by CDM. `cdm_input` is what it sees there: the anchor point extrapolated
    along its velocity, the anchor point itself (then s' is its sigma), or its clean prediction with fresh noise.
    `teacher_base` is what is re-noised for the scores: the student's own new prediction, or the next or the last clean
    prediction of the rollout. Each level is told as ceiling the sigma that the student saw. Raises ValueError for an
    unknown choice and where every weight is 0 at the start.
    """

    ca_weight: Weight = 1.0
    dm_weight: Weight = 1.0
    cdm_weight: Weight = 1.0
    guidance_scale: float = 7.0
    norm_floor: float = 0.1
    fake_score_levels: SigmaLevels = field(default_factory=UniformLevels)
    ca_levels: SigmaLevels = field(default_factory=CappedUniformLevels)
    dm_levels: SigmaLevels = field(default_factory=UniformLevels)
    cdm_levels: SigmaLevels = field(default_factory=UniformLevels)
    target_levels: SigmaLevels = field(default_factory=UniformLevels)
    cdm_input: CDMInput = "extrapolated"
    teacher_base: TeacherBase = "online"

    def __post_init__(self) -> None:
        for name, kind in (("cdm_input", CDMInput), ("teacher_base", TeacherBase)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if not self._weights(0):
            raise ValueError("at least one of ca_weight, dm_weight and cdm_weight must be above 0 from the start")
        if self.norm_floor <= 0:
            raise ValueError(f"norm_floor must be positive, got {self.norm_floor}")

    @property
    def needs_full_rollout(self) -> bool:
        """Whether points must come from full rollouts, since what follows the anchor is used."""
        return self.teacher_base != "online"

    def trains_at_anchor(self, iteration: int) -> bool:
        """Whether a term that is on at this iteration (counted from 0) asks the student at the anchor."""
        return bool(self._at_anchor(self._weights(iteration)))

    def fake_score_loss(
        self, fields: VelocityFields, point: TrajectoryPoint, rng: StepRandom, shift: Shift
    ) -> TermLosses:
        """Flow matching of the fake score on the student's clean prediction at the point."""
        x0 = point.x0
        sigma = self.fake_score_levels.sample(rng, "fake_score.sigma", point.sigma, shift)
        noise = rng.normal("fake_score.noise", x0.shape[1:])
        loss = flow_matching_loss(fields.fake_score(interpolate(x0, noise, sigma), sigma), x0, noise)
        return TermLosses(loss)

    def student_losses(
        self, fields: VelocityFields, point: TrajectoryPoint, rng: StepRandom, shift: Shift, iteration: int
    ) -> Iterator[TermLosses]:
        """The weighted terms that are on at this iteration (counted from 0): first those at the anchor, then CDM.

        Each summand has one student's call. With its backward pass run before the next is asked for, there is one graph in
        memory at a time.
        """
        weights = self._weights(iteration)
        at_anchor = self._at_anchor(weights)
        if at_anchor:
            v = fields.student(point.x, point.sigma) if point.v_with_grad is None else point.v_with_grad
            x0 = denoise(point.x.float(), v.float(), point.sigma)
            looks = {term: self._look(term, x0, point.sigma, point, rng, shift) for term in at_anchor}
            yield self._term_losses(fields, looks, weights, x0)
        if "cdm" in weights and "cdm" not in at_anchor:
            x, seen = self._off_trajectory(point, rng, shift)
            x0 = predict_x0(fields.student, x, seen)
            look = self._look("cdm", x0, seen, point, rng, shift)
            yield self._term_losses(fields, {"cdm": look}, weights, None if at_anchor else x0)

    def _weights(self, iteration: int) -> dict[str, float]:
        """The terms that are on, with their weights."""
        weights = {"ca": self.ca_weight, "dm": self.dm_weight, "cdm": self.cdm_weight}
        now = {term: weight_at(weight, iteration) for term, weight in weights.items()}
        return {term: weight for term, weight in now.items() if weight != 0}

    def _at_anchor(self, terms: Iterable[str]) -> list[str]:
        """Those of the terms that ask the student at the anchor."""
        return [term for term in terms if term != "cdm" or self.cdm_input == "trajectory"]

    def _look(
        self, term: str, x0: Tensor, seen: Tensor, point: TrajectoryPoint, rng: StepRandom, shift: Shift
    ) -> _Look:
        """What a term looks at, where the student predicted x0 (B, *) at sigma `seen` (B,)."""
        levels = {"ca": self.ca_levels, "dm": self.dm_levels, "cdm": self.cdm_levels}[term]
        base = self._base(x0, point)
        sigma = levels.sample(rng, f"{term}.sigma", seen, shift)
        return _Look(x0, interpolate(base, rng.normal(f"{term}.noise", base.shape[1:]), sigma), sigma)

    def _term_losses(
        self, fields: VelocityFields, looks: dict[str, _Look], weights: dict[str, float], predicted: Tensor | None
    ) -> TermLosses:
        """The weighted sum of the terms that look, with figures of the student's `predicted` x0 (B, *)."""
        teacher, fake, uncond = self._judge(fields, looks)
        deltas = {term: teacher[term] - fake[term] for term in fake}
        if "ca" in looks:
            deltas["ca"] = self.guidance_scale * (teacher["ca"] - uncond)
        terms = {
            term: weights[term] * directed_loss(look.x0, deltas[term], teacher[term], self.norm_floor)
            for term, look in looks.items()
        }
        return TermLosses(sum(terms.values()), terms, _health(deltas, predicted))

    def _base(self, x0: Tensor, point: TrajectoryPoint) -> Tensor:
        """The clean sample (B, *) that is re-noised for the scores."""
        base = {"online": x0.detach(), "next": point.x0_next, "final": point.x0_final}[self.teacher_base]
        if base is None:
            raise ValueError(f"teacher_base {self.teacher_base!r} needs a point of a full rollout")
        return base

    def _off_trajectory(self, point: TrajectoryPoint, rng: StepRandom, shift: Shift) -> tuple[Tensor, Tensor]:
        """The student's input of the CDM term and its sigma s': (B, *), (B,)."""
        sigma = self.target_levels.sample(rng, "cdm.target", point.sigma, shift)
        if self.cdm_input == "extrapolated":
            return point.move_to(sigma), sigma
        return interpolate(point.x0, rng.normal("cdm.target_noise", point.x.shape[1:]), sigma), sigma

    @torch.no_grad()
    def _judge(
        self, fields: VelocityFields, looks: dict[str, _Look]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Clean predictions of the teacher and the fake score by term, and the teacher's without text for CA."""
        teacher_calls = [(fields.teacher, look) for look in looks.values()]
        if "ca" in looks:
            teacher_calls.append((fields.teacher_uncond, looks["ca"]))
        judged = _predict_together(teacher_calls)
        matched = [term for term in looks if term != "ca"]
        fake = _predict_together([(fields.fake_score, looks[term]) for term in matched])
        return dict(zip(looks, judged)), dict(zip(matched, fake)), judged[-1] if "ca" in looks else None


def _predict_together(calls: Sequence[tuple[VelocityField, _Look]]) -> list[Tensor]:
    """float32 clean predictions (B, *) of each field for its look, in as few network calls as the fields allow."""
    velocities = evaluate_together([(velocity_field, look.x, look.sigma) for velocity_field, look in calls])
    return [denoise(look.x, v.float(), look.sigma) for v, (_, look) in zip(velocities, calls)]


@torch.no_grad()
def _health(deltas: dict[str, Tensor], x0: Tensor | None) -> dict[str, Tensor]:
    """Figures that tell a run going wrong before its pictures do: the losses themselves do not."""
    logs = {f"{term}_delta_rms": delta.square().mean().sqrt() for term, delta in deltas.items()}
    if "ca" in deltas and "dm" in deltas:
        logs["ca_dm_cosine"] = F.cosine_similarity(deltas["ca"].flatten(1), deltas["dm"].flatten(1)).mean()
    if x0 is not None:
        logs |= {"x0_mean": x0.mean(), "x0_std": x0.std()}
    logs["nonfinite_deltas"] = sum((~delta.isfinite()).sum() for delta in deltas.values()).float()
    return logs
