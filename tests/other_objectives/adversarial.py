"""CDM with an adversarial term on real images, as DMD2 has it (arXiv:2405.14867): a head on features of the fake score.

Shapes: B samples of shape * = (C, H, W), N tokens of width D.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.core.flow import interpolate, predict_x0
from cdm_lightning.core.levels import SigmaLevels, UniformLevels
from cdm_lightning.core.rng import stream
from cdm_lightning.data.prompts import PromptFile
from cdm_lightning.objectives.base import Role, RolledOutSample, TermLosses, Update
from cdm_lightning.objectives.cdm import CDMObjective


class Head(nn.Module):
    """Says whether a noised latent is a real image's, from hidden states of the fake score: one branch for each block."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
            for _ in range(branches)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features (B, N, D) of each block -> logits (B,), high for real."""
        return sum(branch(states).mean(dim=(1, 2)) for branch, states in zip(self.branches, features, strict=True))


@dataclass(frozen=True)
class AdversarialObjective(CDMObjective):
    """CDM's losses, and a head that tells noised real latents from noised predictions of the student.

    The head learns in every iteration, after the fake score. The fake score, whose hidden states after `feature_blocks` the
    head sees, helps it with `classifier_weight`, as in DMD2, where both are one optimizer's; the student learns with
    `generator_weight` to be taken for real. `gan_levels` draws the sigma at which all are noised. The losses are those of
    the non-saturating GAN.
    """

    classifier_weight: float = 1e-2
    generator_weight: float = 5e-3
    feature_blocks: Sequence[int] = (-1,)
    gan_levels: SigmaLevels = field(default_factory=UniformLevels)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The fake score and the head on its hidden states."""
        return (*super().roles, Role("head", build=partial(Head, branches=len(self.feature_blocks))))

    @property
    def needs_latents(self) -> bool:
        """Real images are what the head compares with."""
        return True

    def updates(self, iteration: int) -> list[Update]:
        """The fake score, the head, and in its turn the student."""
        fake_score, *student = super().updates(iteration)
        return [fake_score, Update("head", self.head_losses), *student]

    def fake_score_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """Flow matching, and features by which the head can tell."""
        yield from super().fake_score_losses(sample)
        for name, latents in self._compared(sample):
            weighted = self.classifier_weight * self._told(sample, name, self._features(sample, latents, name))
            yield TermLosses(weighted, {name: weighted})

    def head_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """The logistic loss of the head, on features that are given."""
        for name, latents in self._compared(sample):
            with torch.no_grad():
                features = self._features(sample, latents, name)
            loss = self._told(sample, name, features)
            yield TermLosses(loss, {name: loss})

    def student_losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        """CDM's terms, and the wish that the prediction at the anchor be taken for real."""
        yield from super().student_losses(sample)
        x0 = predict_x0(sample.fields.student, sample.point.x, sample.point.sigma)
        loss = self.generator_weight * self._told(sample, "real", self._features(sample, x0, "fake"))
        yield TermLosses(loss, {"gan": loss})

    def _compared(self, sample: RolledOutSample) -> list[tuple[str, Tensor]]:
        return [("real", sample.latents), ("fake", sample.point.x0)]

    def _features(self, sample: RolledOutSample, x0: Tensor, name: str) -> list[Tensor]:
        """What the fake score makes of clean latents (B, *) once they are noised: (B, N, D) for each block."""
        sigma = self.gan_levels.sample(sample.rng, "gan.sigma", sample.point.sigma, sample.shift)
        x = interpolate(x0, sample.rng.normal(f"gan.{name}", x0.shape[1:]), sigma)
        return sample.fields["fake_score"].with_features(x, sigma, self.feature_blocks)[1]

    def _told(self, sample: RolledOutSample, name: str, features: list[Tensor]) -> Tensor:
        """How far the head is from saying that these are "real" or "fake": the mean of -log of its probability, 0-d."""
        logits = sample.fields.heads["head"](features)
        return F.softplus(-logits if name == "real" else logits).mean()


class Dots(PromptFile):
    """Prompts of the plane, each with a picture of a point of its own distribution: a function of (`seed`, its number)."""

    has_images = True

    def __init__(self, path: str | Path, seed: int = 0) -> None:
        super().__init__(path)
        self.seed, self._plane = seed, Toy2DBackbone()

    def image(self, index: int) -> Tensor:
        """A dark square (3, 32, 32) with a dot."""
        with torch.device("cpu"):
            point = self._plane.exact_samples([self[index]], stream(self.seed, "dot", index).initial_seed())
            return self._plane.decode_latents(point)[0]
