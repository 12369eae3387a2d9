"""A reward: the student's clean predictions are decoded, and a differentiable scorer says how good the images are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cdm_lightning.kinds import Weight
from cdm_lightning.objectives.base import RolledOutSample, TermLosses


class Scorer(Protocol):
    """The interface of a scorer, such as `metrics.rewards.CLIPReward`."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,), higher for better images, of images (B, 3, H, W) in [0, 1] of B prompts; with gradients."""


@dataclass(frozen=True)
class Reward:
    """Minus the mean score of the student's predictions at the anchors, times `weight`.

    The predictions are decoded one by one, and the activations of the image codec and of the scorer are computed again in the
    backward pass, so that the memory is that of one image whatever the batch.
    """

    scorer: Scorer
    weight: Weight = 1.0

    def loss(self, sample: RolledOutSample, x0: Tensor) -> TermLosses:
        """Return the weighted loss for the student's predictions x0 (B, *), and the mean score as a figure."""
        decode = sample.decode

        def score(latent: Tensor, prompt: str) -> Tensor:
            return self.scorer(decode(latent[None]), [prompt])[0].float()

        scores = [checkpoint(score, *of_sample, use_reentrant=False) for of_sample in zip(x0, sample.prompts)]
        mean = torch.stack(scores).mean()
        return TermLosses(-self.weight * mean, {"reward": -self.weight * mean}, {"score": mean.detach()})
