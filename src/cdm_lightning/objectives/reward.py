"""A reward loss: a differentiable scorer rates the student's images, and the student learns to raise the score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cdm_lightning.kinds import Weight
from cdm_lightning.objectives.base import RolledOutSample, TermLosses


class Scorer(Protocol):
    """A differentiable function that scores images for their prompts, such as `metrics.rewards.CLIPReward`."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) of images (B, 3, H, W) in [0, 1] for B prompts; higher scores mean better images.

        The scores have gradients with respect to the images.
        """


@dataclass(frozen=True)
class Reward:
    """A loss that is minus the mean score of the student's x0 predictions, times `weight`. `scorer` gives the scores.

    The predictions are those at a random step of each rollout. They are decoded and scored one by one. The backward
    pass recomputes the activations of the image codec and the scorer, so that memory holds the activations of one image
    only.
    """

    scorer: Scorer
    weight: Weight = 1.0

    def loss(self, sample: RolledOutSample, x0: Tensor) -> TermLosses:
        """Return minus `weight` times the mean score of the student's predictions `x0` (B, *).

        The mean score itself is in `TermLosses.logs` of the result.
        """
        decode = sample.decode

        def score(latent: Tensor, prompt: str) -> Tensor:
            return self.scorer(decode(latent[None]), [prompt])[0].float()

        scores = [checkpoint(score, *of_sample, use_reentrant=False) for of_sample in zip(x0, sample.prompts)]
        mean = torch.stack(scores).mean()
        return TermLosses(-self.weight * mean, {"reward": -self.weight * mean}, {"score": mean.detach()})
