"""f-distill (arXiv:2502.15681): distribution matching that minimizes any f-divergence, not only the reverse KL divergence.

The gradient of an f-divergence equals the gradient of the reverse KL divergence with each sample weighted by h(r) = r^2 f''(r).
Here r = p / q is the density ratio of the data p and the student q at the noised sample. DMD2's classifier head estimates r,
because its optimal logit is log r. Shapes: B samples of shape * = (C, H, W).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cdm_lightning.core.flow import denoise, per_sample
from cdm_lightning.core.transfer import Fetched, send
from cdm_lightning.kinds import Count, Positive, ShareBelowOne
from cdm_lightning.objectives.base import RolledOutSample
from cdm_lightning.objectives.dmd2 import DMD2Objective
from cdm_lightning.objectives.looks import Look

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "squared_hellinger", "jeffreys", "neyman"
]


def divergence_weight(divergence: Divergence, ratio: Tensor) -> Tensor:
    """Return the weight h(r) = r^2 f''(r) of samples with the density ratio r, up to a constant factor.

    `ratio` holds density ratios, in any shape; the result has the same shape. `divergence` names the f-divergence.
    Table 1 of arXiv:2502.15681 gives h for most of these divergences.
    """
    match divergence:
        case "reverse_kl":
            return torch.ones_like(ratio)
        case "forward_kl":
            return ratio
        case "jensen_shannon":
            return ratio / (1 + ratio)
        case "softened_reverse_kl":
            return 1 / (1 + ratio)
        case "squared_hellinger":
            return ratio.sqrt()
        case "jeffreys":
            return 1 + ratio
        case _:
            return 1 / ratio


class _Means:
    """Running means of the density ratio r in each band of sigma, and of the weight h(r).

    An update counts when the means are next read, so that the host need not wait for the GPU when it is made.
    """

    def __init__(self, ratios: list[float], weight: float) -> None:
        self._ratios, self._weight = ratios, weight
        self._update: tuple[Fetched, float, float] | None = None

    def update(self, values: Tensor, rate: float, decay: float) -> None:
        """Move each mean of r by `rate` x its value in `values`; the last value is h(r), whose mean decays by `decay`."""
        self._settle()
        self._update = (Fetched(values), rate, decay)

    def _settle(self) -> None:
        if self._update is not None:
            (fetched, rate, decay), self._update = self._update, None
            *off, new = fetched.values.tolist()
            self._ratios = [mean + rate * each for mean, each in zip(self._ratios, off, strict=True)]
            self._weight = decay * self._weight + (1 - decay) * new

    @property
    def ratios(self) -> list[float]:
        """The running means of r, one for each band of sigma."""
        self._settle()
        return self._ratios

    @property
    def weight(self) -> float:
        """The running mean of h(r)."""
        self._settle()
        return self._weight


@dataclass(frozen=True)
class FDistillObjective(DMD2Objective):
    """DMD2 whose DM term minimizes the f-divergence `divergence`; with "reverse_kl" it equals DMD2.

    Each sample of the DM term is weighted by h(r), a function of the density ratio r of data and student at the noised
    sample. The classifier head estimates r as exp(logit), which is clamped to [`ratio_low`, `ratio_high`]. The mean of
    the true r = p / q over samples of q, the student, is 1 at every sigma. The estimate of r is therefore divided by a
    running mean of r. The range [0, 1] of sigma is divided into `ratio_bands` bands of equal width, and each band has a
    running mean of its own. h(r) is also divided by its running mean, so that the strength of the term does not depend
    on the divergence. At each student update, a running mean keeps the share `ratio_decay` of its old value and takes
    the rest from the new samples. The running means are the same in all processes, and checkpoints hold them.

    The CDM term is not weighted, because the head is not trained on the samples of that term. The other arguments are
    those of `DMD2Objective`. Raises ValueError for an argument out of its range.
    """

    divergence: Divergence = "jensen_shannon"
    ratio_low: Positive = 0.1
    ratio_high: Positive = 20.0
    ratio_bands: Count = 10
    ratio_decay: ShareBelowOne = 0.9
    means: _Means = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence={self.divergence!r} must be one of {', '.join(get_args(Divergence))}")
        if not 0 < self.ratio_low < self.ratio_high or self.ratio_bands < 1 or not 0 <= self.ratio_decay < 1:
            raise ValueError(
                f"ratio_low={self.ratio_low} must be above 0 and below ratio_high={self.ratio_high}, ratio_bands="
                f"{self.ratio_bands} must be at least 1, and ratio_decay={self.ratio_decay} must be at least 0 and below 1"
            )
        typical = float(divergence_weight(self.divergence, torch.ones((), device="cpu")))
        object.__setattr__(self, "means", _Means([1.0] * self.ratio_bands, typical))

    def _differences(
        self, sample: RolledOutSample, looks: dict[str, Look], teacher: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the teacher's x0 minus the fake score's (B, *) for each loss term, and figures for `observe`.

        In the DM term the difference is multiplied by h(r).
        """
        if "dm" not in looks or self.divergence == "reverse_kl":
            return super()._differences(sample, looks, teacher)
        others = {term: look for term, look in looks.items() if term != "dm"}
        directions, figures = super()._differences(sample, others, teacher) if others else ({}, {})
        look = looks["dm"]
        fake_score = self.fake_score(sample, look.seen)
        velocity, features = fake_score.with_features(look.x, look.sigma, self.feature_blocks)
        weight, of_ratio = self._weight(sample.fields.heads["head"](features), look.sigma)
        fake = denoise(look.x, velocity.float(), look.sigma)
        return directions | {"dm": per_sample(weight, fake) * (teacher["dm"] - fake)}, figures | of_ratio

    def _weight(self, logits: Tensor, sigma: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return h(r) (B,) divided by its running mean, and figures for `observe`.

        `logits` (B,) are those of the classifier head at sigma (B,). The figure `ratio_N` is the mean of the ratio minus its
        running mean; samples outside band N of sigma count as 0.
        """
        bands = (sigma * self.ratio_bands).long().clamp(0, self.ratio_bands - 1)
        means = send(torch.tensor(self.means.ratios, dtype=torch.float32, device="cpu"), sigma.device)[bands]
        ratio = logits.float().exp().clamp(self.ratio_low, self.ratio_high)
        weight = divergence_weight(self.divergence, ratio / means)
        off = ratio - means
        figures = {f"ratio_{band}": torch.where(bands == band, off, 0.0).mean() for band in range(self.ratio_bands)}
        return weight / self.means.weight, {**figures, "divergence_weight": weight.mean()}

    def observe(self, role: str, figures: Mapping[str, Tensor], made: bool) -> None:
        """Update the running means of r and h(r) from `figures` if `role` is "student" and `made` is True."""
        if role != "student" or not made or "divergence_weight" not in figures:
            return
        rate = min(
            1.0, (1 - self.ratio_decay) * self.ratio_bands
        )  # a band holds one of `ratio_bands` samples on average
        names = [*(f"ratio_{band}" for band in range(self.ratio_bands)), "divergence_weight"]
        self.means.update(torch.stack([figures[name] for name in names]).detach(), rate, self.ratio_decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the running means of the density ratio r (one for each band of sigma) and of the weight h(r)."""
        return {"ratios": list(self.means.ratios), "weight": self.means.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the running means that `state_dict` returned.

        They are ignored if they are for another number of bands of sigma.
        """
        if len(state["ratios"]) == self.ratio_bands:
            object.__setattr__(self, "means", _Means(list(state["ratios"]), float(state["weight"])))
