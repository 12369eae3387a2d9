"""TDM (arXiv:2503.06674): the states of the student's path learn the teacher's distribution at each sigma of the path.

A step of the rollout leads from a state at sigma s to a state at s', by the student's x0 prediction. Distribution
matching (DMD) adds noise to this x0 prediction. TDM adds noise to the state at s' instead, until its sigma is between
s' and s, and compares teacher and fake score there. Each step is thus trained at its own sigmas, and one fake score is
enough for all steps of a fixed schedule. Shapes: B samples of shape * = (C, H, W).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cdm_lightning.core.flow import interpolate, per_sample
from cdm_lightning.core.losses import flow_matching_loss
from cdm_lightning.kinds import ShareBelowOne
from cdm_lightning.objectives.base import RolledOutSample
from cdm_lightning.objectives.cdm import TermWeight
from cdm_lightning.objectives.level_aware import FakeScoreConditioning, LevelAwareObjective
from cdm_lightning.objectives.looks import Look

Segments = Literal["own", "to_noise"]
FakeScoreTarget = Literal["prediction", "state"]
LOWEST = 0.02  # sigma; as in CDM


@dataclass(frozen=True)
class _Noised:
    """The state at the end of a step after further noising: x = kept * state + added * noise, at `sigma`."""

    x: Tensor  # (B, *)
    noise: Tensor  # (B, *)
    sigma: Tensor  # (B,)
    kept: Tensor  # (B,)
    added: Tensor  # (B,)


@dataclass(frozen=True)
class TDMObjective(LevelAwareObjective):
    """Trajectory distribution matching (TDM), with the teacher's guidance in the DM term.

    The guidance is `guidance_scale` times the difference of the teacher's x0 predictions with and without the prompt.
    TDM adds noise to the state at the end of a rollout's step. `segments` says to which sigma the state is noised:
      "own"       a uniform sigma between the end and the start of the step;
      "to_noise"  a uniform sigma between the end of the step and 1. With this choice, the paper also makes the number
                  of steps an input of the fake score (see `fake_score_conditioning`).

    `fake_score_target` says what the fake score learns from the noised state:
      "prediction"  the student's x0 prediction, as in the code of TDM's authors. Each sample has the weight
                    exp((|n|^2 - |e|^2) / 2), where n is the noise that was added, e is the noise in the noised state
                    according to the x0 prediction, and |.|^2 is the mean square over elements;
      "state"       the score of the noised states, by denoising score matching. The score grows without bound as less
                    noise is added, so each sample has a weight that keeps its loss bounded.

    `cdm_weight` and `off_trajectory_share` must be 0. The other arguments are those of `LevelAwareObjective`, but
    `dm_levels`, `cdm_levels`, `target_levels` and `fake_score_levels` have no effect, and `ca_levels` has an effect
    only if `ca_weight` is above 0. Raises ValueError for an argument out of its range.
    """

    ca_weight: TermWeight = 0.0
    cdm_weight: TermWeight = 0.0
    fake_score_conditioning: FakeScoreConditioning = "none"
    off_trajectory_share: ShareBelowOne = 0.0
    segments: Segments = "own"
    fake_score_target: FakeScoreTarget = "prediction"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("segments", Segments), ("fake_score_target", FakeScoreTarget)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kind))}")
        for name in ("cdm_weight", "off_trajectory_share"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must be 0, because TDM has no term off the trajectory")

    def guidance(self, term: str) -> float:
        """Return the guidance scale of a loss term: `guidance_scale` for all terms."""
        return self.guidance_scale

    def _look(self, term: str, x0: Tensor, seen: Tensor, sample: RolledOutSample) -> Look:
        """Return the inputs of a loss term. The DM term noises the state that the student's step reaches with the prediction x0."""
        if term != "dm":
            return super()._look(term, x0, seen, sample)
        noised = self._noised(sample, x0.detach(), "dm")
        return Look(x0, seen, noised.x, noised.sigma)

    def _fit(self, sample: RolledOutSample, x0: Tensor, seen: Tensor, purpose: str) -> Tensor:
        """Return the fake score's loss (0-d) at the state that the student's step reaches with the prediction x0, after noising."""
        noised = self._noised(sample, x0, purpose)
        velocity = self.fake_score(sample, seen)(noised.x, noised.sigma).float()
        if self.fake_score_target == "state":
            return _score_matching(velocity, noised, _end(sample, x0), sample)
        sigma = per_sample(noised.sigma, x0)
        implied = (noised.x - (1 - sigma) * x0) / sigma
        weight = (0.5 * (_mean_square(noised.noise) - _mean_square(implied))).exp()
        return flow_matching_loss(*(per_sample(weight.sqrt(), x0) * each for each in (velocity, x0, implied)))

    def _noised(self, sample: RolledOutSample, x0: Tensor, purpose: str) -> _Noised:
        """Return the state that each sample's step reaches with the prediction x0 (B, *), noised to a sigma of its segment."""
        end, start = _end_sigma(sample), sample.point.sigma
        above = start if self.segments == "own" else torch.ones_like(start)
        draw = sample.rng.place(sample.rng.uniform(f"{purpose}.sigma"))
        sigma = torch.maximum((end + draw * (above - end)).clamp(min=LOWEST), end)
        kept = (1 - sigma) / (1 - end)
        added = (sigma.square() - (kept * end).square()).clamp(min=0).sqrt()
        noise = sample.rng.normal(f"{purpose}.noise", x0.shape[1:])
        x = per_sample(kept, x0) * _end(sample, x0) + per_sample(added, x0) * noise
        return _Noised(x, noise, sigma, kept, added)


def _end_sigma(sample: RolledOutSample) -> Tensor:
    """Return the sigma (B,) at the end of the rollout's randomly drawn step."""
    assert sample.point.next_sigma is not None  # rollouts set it
    return sample.point.next_sigma


def _end(sample: RolledOutSample, x0: Tensor) -> Tensor:
    """Return the state (B, *) that the rollout's randomly drawn step reaches with the prediction x0 (B, *)."""
    return interpolate(x0, sample.point.x, _end_sigma(sample) / sample.point.sigma)


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().flatten(1).mean(dim=1)


def _score_matching(velocity: Tensor, noised: _Noised, state: Tensor, sample: RolledOutSample) -> Tensor:
    """Return the loss (0-d) whose optimum is the velocity that belongs to the score of the noised states.

    The score of x given the state is -noise / added. A score g belongs to the velocity -(sigma g + x) / (1 - sigma). Both sides
    are multiplied by (1 - s') added / sigma, where s' is the sigma at the end of the step, so that no factor grows without bound.
    """
    end = _end_sigma(sample)
    odds = (1 - noised.sigma) / noised.sigma * (end / (1 - end)).square()
    share = noised.added / noised.sigma
    of_noise, of_velocity = (per_sample(factor, state) for factor in ((1 - end) * (1 + odds), (1 - end) * share))
    target = of_noise * noised.noise - per_sample(share, state) * state
    return (of_velocity * velocity - target).square().mean()
