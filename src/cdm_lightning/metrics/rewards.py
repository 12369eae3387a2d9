"""Differentiable scorers of images, for the reward loss of objectives (see `objectives.reward`)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.kinds import Model, Weights
from cdm_lightning.metrics.open_clip_model import OpenClipModel


class CLIPReward:
    """A scorer of images: the cosine similarity between the CLIP embeddings of an image and of its prompt.

    `OpenClipModel` describes the arguments. Raises `UserError` if the model or its weights are missing or cannot be
    loaded.
    """

    def __init__(self, model: Model, pretrained: Weights | None = None) -> None:
        self.model = OpenClipModel(model, pretrained)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the similarities (B,) in [-1, 1] of images (B, 3, H, W) in [0, 1] and their prompts.

        Gradients flow back to the images.
        """
        if self.model.device != images.device:
            self.model.to(images.device)
        return F.cosine_similarity(self.model.embed_images(images), self.model.encode_texts(prompts))
