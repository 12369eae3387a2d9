"""The aesthetic score of LAION (improved aesthetic predictor, V2): how much people like an image, from 1 to 10.

A few linear layers predict the score from the normalized embedding of the image by CLIP ViT-L/14. The prompt plays no part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.kinds import FeatureName, Weights
from cdm_lightning.metrics.base import ImageBatch, Metric
from cdm_lightning.metrics.weights_file import load_tensors, locate_weights

LAYERS = (1024, 128, 64, 16, 1)  # output widths
PLACES = (0, 2, 4, 6, 7)  # of these layers in the published file; between them are dropouts, which do nothing here
OPTION = "metric.aesthetic.weights"


class Aesthetic(Metric):
    """The mean aesthetic score of a sampler's images.

    `weights` is the file sac+logos+ava1-l14-linearMSE.pth, or OWNER/NAME/FILE on the Hugging Face hub. `feature` is the
    name of a feature extractor that must be the CLIP model with which the file was trained, ViT-L/14 of OpenAI. Raises
    `UserError` if the file is missing or holds something else.
    """

    def __init__(self, weights: Weights, feature: FeatureName = "clip_l") -> None:
        self.feature, self.score_features = feature, (feature,)
        path = locate_weights(weights, OPTION)
        tensors = {name.removeprefix("layers."): value for name, value in load_tensors(path, OPTION).items()}
        first = tensors.get("0.weight", torch.empty(0))
        if first.ndim != 2:
            raise UserError(f"{path} has no aesthetic predictor; set {OPTION} to sac+logos+ava1-l14-linearMSE.pth")
        self.width = first.shape[1]
        widths = zip((self.width, *LAYERS), LAYERS)
        self.head = nn.ModuleDict(
            {str(place): nn.Linear(wide, narrow) for place, (wide, narrow) in zip(PLACES, widths)}
        )
        try:
            self.head.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(
                f"{path} is another aesthetic predictor than V2 ({first_line(error)}); set {OPTION} to "
                "sac+logos+ava1-l14-linearMSE.pth"
            ) from error
        self.head.float().requires_grad_(False)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return the scores (B,) of the images in `batch`. Raises `UserError` if the embeddings have another width."""
        found = F.normalize(batch.features(self.feature).float(), dim=1)
        if found.shape[1] != self.width:
            raise UserError(
                f"the embeddings of feature.{self.feature} have {found.shape[1]} dimensions, but the aesthetic predictor needs "
                f"{self.width}; set feature.{self.feature}.model to the CLIP model that it was trained with (ViT-L-14-quickgelu)"
            )
        for layer in self.head.values():
            found = layer(found)
        return found.squeeze(1)
