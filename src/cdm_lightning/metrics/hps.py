"""HPSv2 and HPSv2.1 (Wu et al., arXiv:2306.09341): a CLIP model that learned which images people prefer for a prompt."""

from typing import Any

from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pad, resize

from cdm_lightning.kinds import Choice, FeatureName, Weights
from cdm_lightning.metrics.clip_score import CLIPScore
from cdm_lightning.metrics.extractors import OpenClipFeatures
from cdm_lightning.metrics.weights_file import load_tensors, locate_weights


class WholeImage(nn.Module):
    """Resizes images (B, 3, H, W) so that the longer side has `size` pixels, and pads the shorter one with black."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return images (B, 3, size, size)."""
        scale = self.size / max(images.shape[-2:])
        height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
        images = resize(images, [height, width], InterpolationMode.BICUBIC, antialias=True)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return pad(images, [left, top, self.size - width - left, self.size - height - top])


class HPSFeatures(OpenClipFeatures):
    """A feature extractor that embeds images and prompts by HPSv2 or HPSv2.1. The embeddings are not normalized.

    `weights` is the authors' file, such as HPS_v2.1_compressed.pt, or OWNER/NAME/FILE on the Hugging Face hub. `model` is
    the architecture, as open_clip calls it. As in the authors' code, images that are not square are padded and not
    cropped. Raises `UserError` if the weights are missing, or are not those of the model.
    """

    def __init__(self, weights: Weights, model: Choice = "ViT-H-14") -> None:
        path = locate_weights(weights, "feature.hps.weights")
        load_tensors(path, "feature.hps.weights")  # checked first, for a message that names the option
        super().__init__(model, str(path))
        size: Any = self.model.clip.visual.image_size  # one number or two
        self.model.geometry = [WholeImage(size[0] if isinstance(size, tuple) else size)]


class HPS(CLIPScore):
    """The mean HPS of a sampler's images and their prompts: 100 x the cosine similarity of their embeddings.

    The authors' code gives the similarity itself; their tables give 100 x it. `feature` is the name of an `HPSFeatures`.
    """

    def __init__(self, feature: FeatureName = "hps") -> None:
        super().__init__(feature)
        self.features, self.score_features = (), (feature,)  # the features of all images are not kept
