"""How well images fit their prompts by CLIP: 100 x cosine similarity (arXiv:2104.08718, without its clamp at 0)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.metrics.open_clip_model import OpenClipModel


class CLIPScorer(OpenClipModel):
    """An open_clip model as a scorer; arguments and errors as of `OpenClipModel`."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) in [-100, 100] of images (B, 3, H, W) in [0, 1] for their prompts."""
        return 100 * F.cosine_similarity(self.encode_images(images), self.encode_texts(prompts))
