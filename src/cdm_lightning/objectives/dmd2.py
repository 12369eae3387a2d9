"""DMD2 (arXiv:2405.14867): distribution matching with an adversarial term on real images.

A classifier head reads hidden states of the fake score. It distinguishes noised real latents from noised predictions of
the student. The fake score is updated more often than the student. The losses of the CDM objective are used too; in
`conf/objective/dmd2.yaml`, the CDM term (off the trajectory) has the weight 0. Shapes: B samples of shape * = (C, H,
W), N tokens of width D.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_lightning.core.flow import interpolate, predict_x0
from cdm_lightning.core.levels import SigmaLevels, UniformLevels
from cdm_lightning.kinds import BlockIndex, NotEmpty, Weight
from cdm_lightning.objectives.base import Role, RolledOutSample, TermLosses, Update
from cdm_lightning.objectives.cdm import CDMObjective


class RealHead(nn.Module):
    """A classifier that says whether a noised latent comes from a real image.

    The classifier reads hidden states of transformer blocks. It has one branch for each block, and the classifier's
    logit is the sum of the branches' logits.
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
            for _ in range(branches)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B,), high for real images. `features` holds the hidden states (B, N, D) for each branch."""
        logits = [branch(states).mean(dim=(1, 2)) for branch, states in zip(self.branches, features, strict=True)]
        return torch.stack(logits).sum(dim=0)


@dataclass(frozen=True)
class DMD2Objective(CDMObjective):
    """DMD2: distribution matching plus an adversarial term that compares predictions with real images.

    A classifier head says whether noised latents are real or predicted. It reads the hidden states of the fake score
    after the blocks `feature_blocks` (negative numbers count from the last block). The head's loss is -log of the
    probability of the right answer (non-saturating GAN). The head is updated in every iteration, after the fake score.
    The head's loss, times `classifier_weight`, is also added to the fake score's loss, so that the fake score learns
    features that help the head. The student's loss gets one more term: `generator_weight` times -log of the probability
    that the head classifies the student's prediction as real. `gan_levels` draws the sigma to which real and predicted
    latents are noised.

    The paper has `classifier_weight` 1e-2 and `generator_weight` 5e-3, with five fake-score updates per student update
    (`student_every=5`). The other arguments are those of `CDMObjective`. Raises ValueError for an argument out of its
    range.
    """

    classifier_weight: Weight = 1e-2
    generator_weight: Weight = 5e-3
    feature_blocks: Annotated[Sequence[BlockIndex], NotEmpty] = (-1,)
    gan_levels: SigmaLevels = field(default_factory=UniformLevels)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.feature_blocks or min(self.classifier_weight, self.generator_weight) < 0:
            raise ValueError(
                f"feature_blocks={self.feature_blocks} must name at least one block, and classifier_weight="
                f"{self.classifier_weight} and generator_weight={self.generator_weight} must be at least 0"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The fake score, and the classifier head that reads its hidden states."""
        return (*super().roles, Role("head", build=partial(RealHead, branches=len(self.feature_blocks))))

    @property
    def needs_latents(self) -> bool:
        """True, because the adversarial term compares predictions with real images."""
        return True

    def updates(self, iteration: int) -> list[Update]:
        """Return the updates of the fake score and of the classifier head.

        In the last of every `student_every` iterations, the update of the student follows.
        """
        fake_score, *student = super().updates(iteration)
        return [fake_score, Update("head", self.head_losses), *student]

    def fake_score_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the flow matching loss of the fake score, and `classifier_weight` times the losses of the head.

        The head has a loss on real latents and a loss on predicted latents.
        """
        yield from super().fake_score_losses(sample)
        for name, latents in self._compared(sample) if self.classifier_weight else []:
            weighted = self.classifier_weight * self._loss(sample, name, self._features(sample, latents, name))
            yield TermLosses(weighted, {name: weighted})

    def head_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the classifier head's loss on real and on predicted latents. No gradient reaches the fake score."""
        for name, latents in self._compared(sample):
            with torch.no_grad():
                features = self._features(sample, latents, name)
            loss = self._loss(sample, name, features)
            yield TermLosses(loss, {name: loss})

    def student_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Yield the losses that `CDMObjective` yields, and the adversarial loss of the student's x0 prediction."""
        yield from super().student_losses(sample)
        if self.generator_weight:
            x0 = predict_x0(sample.fields.student, sample.point.x, sample.point.sigma)
            loss = self.generator_weight * self._loss(sample, "real", self._features(sample, x0, "fake"))
            yield TermLosses(loss, {"gan": loss})

    def _compared(self, sample: RolledOutSample) -> list[tuple[str, Tensor]]:
        assert sample.latents is not None  # `needs_latents`
        return [("real", sample.latents), ("fake", sample.point.x0)]

    def _features(self, sample: RolledOutSample, x0: Tensor, name: str) -> list[Tensor]:
        """Return the fake score's hidden states (B, N, D) after each block of `feature_blocks`.

        Its input is the latents `x0` (B, *), noised to a drawn sigma.

        The random draw of the noise is named by `name`.
        """
        sigma = self.gan_levels.sample(sample.rng, "gan.sigma", sample.point.sigma, sample.shift)
        x = interpolate(x0, sample.rng.normal(f"gan.{name}", x0.shape[1:]), sigma)
        return self.fake_score(sample, sample.point.sigma).with_features(x, sigma, self.feature_blocks)[1]

    def _loss(self, sample: RolledOutSample, answer: str, features: list[Tensor]) -> Tensor:
        """Return the mean over samples (0-d) of -log of the probability that the classifier head gives to `answer`.

        `answer` is "real" or "fake".
        """
        logits = sample.fields.heads["head"](features)
        return F.softplus(-logits if answer == "real" else logits).mean()
