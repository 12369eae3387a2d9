"""CDM whose fake score is told at which sigma the student made the prediction that it judges. Shapes: B samples, width D."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdm_lightning.core.flow import VelocityField
from cdm_lightning.objectives.base import Role, RolledOutSample
from cdm_lightning.objectives.cdm import CDMObjective

FREQUENCIES = 128  # sines, and as many cosines


class SigmaEmbedding(nn.Module):
    """Sines and cosines of 1000 sigma, as diffusion networks are told the time, and an MLP that starts as zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), last)

    def forward(self, sigma: Tensor) -> Tensor:
        """Sigma (B,) -> (B, D)."""
        rates = torch.exp(-math.log(10_000) / FREQUENCIES * torch.arange(FREQUENCIES, device=sigma.device))
        angles = 1000 * sigma.float()[:, None] * rates
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


@dataclass(frozen=True)
class LevelAwareObjective(CDMObjective):
    """CDM with one fake score for each sigma that the student saw, in one network.

    As published, one distribution of clean predictions is fitted, whatever the sigma that they were made at. Here the fake
    score sees that sigma too: the anchor's where it learns and for DM, the s' of the off-trajectory point for CDM.
    """

    @property
    def roles(self) -> tuple[Role, ...]:
        """The fake score with its further input, which has no effect at the start."""
        return (Role("fake_score", inputs={"seen_sigma": SigmaEmbedding}),)

    def fake_score(self, sample: RolledOutSample, seen: Tensor) -> VelocityField:
        """The fake score for predictions made at sigma `seen` (B,)."""
        return sample.fields["fake_score"].given(seen_sigma=seen)
