"""PickScore (Kirstain et al., arXiv:2305.01569): a CLIP model that learned which of two images people prefer for a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import FeatureName, Model
from cdm_lightning.metrics.base import ImageBatch, Metric


class PickScoreFeatures(nn.Module):
    """A feature extractor that embeds images and prompts by a CLIP model of transformers. The embeddings are not normalized.

    `pretrained` is the model and `processor` its preprocessing (see `backbones.clip_scorer.load_clip`). Raises
    `UserError` if one of them is missing or cannot be used.
    """

    def __init__(self, pretrained: Model, processor: Model) -> None:
        super().__init__()
        from cdm_lightning.backbones.clip_scorer import load_clip  # takes seconds to import, so only where it is used

        self.network: Any
        self.network, self.processor = load_clip(pretrained, processor, "feature.pickscore")

    @property
    def scale(self) -> Tensor:
        """The factor of the cosine similarity, which the model has learned: about 100 for PickScore v1."""
        return self.network.logit_scale.exp()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, D) of images (B, 3, H, W) in [0, 1].

        The images are first rounded to 8 bits per channel, as they would be in an image file. Then they are resized,
        cropped and normalised as preprocessor_config.json says.
        """
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        prepared = self.processor.image_processor(images=list(pixels), return_tensors="pt")["pixel_values"]
        return self.network.get_image_features(pixel_values=prepared.to(self.scale.device)).pooler_output

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, D) of B prompts. Longer prompts than the model can read are cut."""
        longest = self.network.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return self.network.get_text_features(**tokens.to(self.scale.device)).pooler_output


class PickScore(Metric):
    """The mean PickScore of a sampler's images and their prompts: the scaled cosine similarity of their embeddings.

    For PickScore v1, images of current models have about 20 to 23. `feature` is the name of a `PickScoreFeatures`.
    """

    def __init__(self, feature: FeatureName = "pickscore") -> None:
        self.feature = feature
        self.score_features = self.text_features = (feature,)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return the scores (B,) of the images in `batch` and their prompts. Raises `UserError` for another extractor."""
        extractor = batch.extractors[self.feature]
        if not isinstance(extractor, PickScoreFeatures):
            raise UserError(f"feature.{self.feature} must be a PickScoreFeatures, not a {type(extractor).__name__}")
        images, texts = batch.features(self.feature), batch.text_features(self.feature)
        return extractor.scale * F.cosine_similarity(images, texts)
