"""CDM whose fake score is told at which sigma the student made the prediction that it judges.

A student with several steps makes a prediction of the clean image at each sigma of its path. As published, one fake score
is trained on all of these predictions and is told only the sigma to which they were noised again. Its optimum is therefore
the score of their mixture, and the student stops changing as soon as the mixture is right, even if the predictions of each
single sigma are not. Here the fake score is also told the sigma that the student saw, and it learns on predictions off the
trajectory too, which the CDM term makes it judge. Shapes: B samples of shape * = (C, H, W), D the width of the time embedding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cdm_lightning.core.flow import VelocityField, predict_x0
from cdm_lightning.kinds import Count, Guidance, ShareBelowOne
from cdm_lightning.objectives.base import Role, RolledOutSample, TermLosses
from cdm_lightning.objectives.cdm import CDMObjective

FakeScoreConditioning = Literal["none", "sigma", "sigma_and_steps"]
FREQUENCIES = 128  # sines, and as many cosines: 256 values, as diffusion transformers embed their timestep


class LevelEmbedding(nn.Module):
    """An embedding of a number in [0, 1] by sines and cosines of 1000 times the number, and an MLP whose last layer starts as zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), last)

    def forward(self, level: Tensor) -> Tensor:
        """Return the embeddings (B, D) of numbers (B,) in [0, 1]."""
        rates = torch.exp(-math.log(10_000) / FREQUENCIES * torch.arange(FREQUENCIES, device=level.device))
        angles = 1000 * level.float()[:, None] * rates
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


@dataclass(frozen=True)
class LevelAwareObjective(CDMObjective):
    """CDM with a fake score that knows at which sigma the student made a prediction.

    `fake_score_conditioning` says what the fake score is told: "none" (as published), "sigma" (the sigma at which the student made the
    prediction), or "sigma_and_steps" (also 1 / K, where K is the number of steps of the rollout). Each is an input of the fake
    score alone, which has no effect at the start and is learnt beside its weights or its adapter.

    The loss of the fake score is (1 - `off_trajectory_share`) times that of the prediction at the anchor, plus
    `off_trajectory_share` times that of the student's prediction off the trajectory, at the point that the CDM term would
    use (`cdm_input`, `target_levels`). The second part costs one call of the student without gradient and one more forward and
    backward pass of the fake score; only every `off_trajectory_every`-th update of the fake score has it.

    `cdm_guidance_scale` adds guidance to the direction of the CDM term, which has none as published.
    The other arguments are those of `CDMObjective`. Raises ValueError for an argument out of its range.
    """

    fake_score_conditioning: FakeScoreConditioning = "sigma"
    off_trajectory_share: ShareBelowOne = 0.5
    off_trajectory_every: Count = 1
    cdm_guidance_scale: Guidance = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = get_args(FakeScoreConditioning)
        if self.fake_score_conditioning not in choices:
            got = self.fake_score_conditioning
            raise ValueError(f"fake_score_conditioning={got!r} must be one of {', '.join(choices)}")
        if not 0 <= self.off_trajectory_share < 1 or self.off_trajectory_every < 1:
            raise ValueError(
                f"off_trajectory_share={self.off_trajectory_share} must be at least 0 and below 1, and "
                f"off_trajectory_every={self.off_trajectory_every} at least 1"
            )
        if self.off_trajectory_share and self.cdm_input == "trajectory":
            raise ValueError(
                "cdm_input=trajectory has no point off the trajectory; set off_trajectory_share=0 or another cdm_input"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The fake score, with the additional inputs that `fake_score_conditioning` asks for."""
        names = {"none": (), "sigma": ("seen_sigma",), "sigma_and_steps": ("seen_sigma", "seen_steps")}[
            self.fake_score_conditioning
        ]
        return (Role("fake_score", inputs=dict.fromkeys(names, LevelEmbedding)),)

    def fake_score_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the flow matching losses on the prediction at the anchor and, where it is due, on one off the trajectory."""
        update = sample.iteration * self.fake_score_steps + sample.rng.repeat
        share = 0.0 if update % self.off_trajectory_every else self.off_trajectory_share
        for part in super().fake_score_losses(sample):
            yield TermLosses((1 - share) * part.total, {"anchor": (1 - share) * part.total} if share else {})
        if share:
            x, seen = self._off_trajectory(sample, "fake_score")
            with torch.no_grad():
                x0 = predict_x0(sample.fields.student, x, seen)
            loss = share * self._fit(sample, x0, seen, "fake_score.off_trajectory")
            yield TermLosses(loss, {"off_trajectory": loss})

    def fake_score(self, sample: RolledOutSample, seen: Tensor) -> VelocityField:
        """Return the field of the fake score, which is told that the student made its predictions at sigma `seen` (B,)."""
        fake_score = super().fake_score(sample, seen)
        if self.fake_score_conditioning == "none":
            return fake_score
        if self.fake_score_conditioning == "sigma":
            return fake_score.given(seen_sigma=seen)
        return fake_score.given(seen_sigma=seen, seen_steps=torch.full_like(seen, 1 / sample.steps))

    def guidance(self, term: str) -> float:
        """Return the factor of T(c) - T(0) in the direction of the term: `cdm_guidance_scale` for "cdm", else as in CDM."""
        return self.cdm_guidance_scale if term == "cdm" else super().guidance(term)
