"""Level-aware CDM: the sigma at which the student made its prediction is an additional input of the fake score.

A student with several steps predicts the clean image at each sigma of its path. In published CDM, one fake score learns
from all of these predictions. The only sigma that it gets as an input is the one to which a prediction was noised
again. It therefore learns the score of the mixture of all predictions. The student stops changing when the mixture is
right, even if the predictions at single sigmas are wrong. Here the fake score gets both sigmas as inputs. It also
learns from the student's predictions off the trajectory, which the CDM term uses. Shapes: B samples of shape * = (C, H,
W), D the width of the time embedding.
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
FREQUENCIES = 128  # 128 sines and 128 cosines: 256 values, as in the timestep embedding of diffusion transformers


class LevelEmbedding(nn.Module):
    """An embedding of a number in [0, 1], built like the timestep embedding of a diffusion transformer.

    The number is multiplied by 1000, and an MLP maps sines and cosines of the result to the embedding. The last layer
    of the MLP starts at zero, so the embedding of every number is 0 at the start.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), last)

    def forward(self, level: Tensor) -> Tensor:
        """Return the embeddings (B, D) of the numbers `level` (B,), which lie in [0, 1]."""
        rates = torch.exp(-math.log(10_000) / FREQUENCIES * torch.arange(FREQUENCIES, device=level.device))
        angles = 1000 * level.float()[:, None] * rates
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


@dataclass(frozen=True)
class LevelAwareObjective(CDMObjective):
    """CDM whose fake score has an additional input: the sigma at which the student made its prediction.

    `fake_score_conditioning` says which inputs the fake score has besides the noised sample, the sigma of the noised
    sample and the text:
      "none"             no additional inputs, as published;
      "sigma"            the sigma at which the student made the prediction;
      "sigma_and_steps"  that sigma, and 1 / K for a rollout of K steps.
    The additional inputs have no effect at the start of training. The layers that read them are trained together with
    the fake score's weights or LoRA.

    The fake score has two losses. The first is on x0 predictions at the rollout's anchor (its randomly drawn step),
    with the weight 1 - `off_trajectory_share`. The second has the weight `off_trajectory_share`. It is on x0
    predictions at a point off the trajectory, which is made like the point of the CDM term (see `cdm_input` and
    `target_levels`). The second loss costs a call of the student without gradient, and a forward and a backward pass of
    the fake score. Every `off_trajectory_every`-th update of the fake score uses both losses; the other updates use
    only the first, with the weight 1.

    `cdm_guidance_scale` adds guidance to the direction of the CDM term; published CDM has no guidance in this term. The
    other arguments are those of `CDMObjective`. Raises ValueError for an argument out of its range.
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
                f"off_trajectory_every={self.off_trajectory_every} must be at least 1"
            )
        if self.off_trajectory_share and self.cdm_input == "trajectory":
            raise ValueError(
                "cdm_input=trajectory gives no point off the trajectory, but off_trajectory_share is above 0; set "
                "off_trajectory_share=0, or cdm_input=extrapolated"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The fake score, with the additional inputs that `fake_score_conditioning` names."""
        names = {"none": (), "sigma": ("seen_sigma",), "sigma_and_steps": ("seen_sigma", "seen_steps")}[
            self.fake_score_conditioning
        ]
        return (Role("fake_score", inputs=dict.fromkeys(names, LevelEmbedding)),)

    def fake_score_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the flow matching loss of the fake score on x0 predictions at a random step of the rollout.

        Every `off_trajectory_every`-th update of the fake score adds a second loss, on x0 predictions off the
        trajectory.
        """
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
        """Return the fake score's velocity field for x0 predictions that the student made at sigma `seen` (B,).

        `fake_score_conditioning` says whether `seen` and the number of steps of the rollout are inputs of the field.
        """
        fake_score = super().fake_score(sample, seen)
        if self.fake_score_conditioning == "none":
            return fake_score
        if self.fake_score_conditioning == "sigma":
            return fake_score.given(seen_sigma=seen)
        return fake_score.given(seen_sigma=seen, seen_steps=torch.full_like(seen, 1 / sample.steps))

    def guidance(self, term: str) -> float:
        """Return the guidance scale of a loss term: `cdm_guidance_scale` for "cdm", and that of `CDMObjective` for the others."""
        return self.cdm_guidance_scale if term == "cdm" else super().guidance(term)
