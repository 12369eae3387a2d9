"""Feature extractors for metrics.

Every `nn.Module` that maps images (B, 3, H, W) in [0, 1] to features (B, D) can serve as a feature extractor.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.kinds import FileToRead, Model, Weights
from cdm_lightning.metrics.open_clip_model import OpenClipModel


class OpenClipFeatures(nn.Module):
    """A feature extractor that embeds images and prompts by a CLIP model. The embeddings are not normalized.

    `OpenClipModel` describes the arguments. Raises `UserError` if the model or its weights are missing or cannot be
    loaded.
    """

    def __init__(self, model: Model, pretrained: Weights | None = None) -> None:
        super().__init__()
        self.model = OpenClipModel(model, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, D) of images (B, 3, H, W) in [0, 1], not normalized."""
        return self.model.encode_images(images)

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, D) of B prompts, not normalized."""
        return self.model.encode_texts(prompts)


class InceptionFeatures(nn.Module):
    """The feature extractor of the standard FID (Heusel et al., arXiv:1706.08500): Inception v3 with 2048 features.

    The network is that of the package torch-fidelity. `weights` is the path of the file
    weights-inception-2015-12-05-6726825d.pth. Raises `UserError` if the file is missing or cannot be used, or if
    torch-fidelity is not installed.
    """

    def __init__(self, weights: FileToRead) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise UserError(
                f"the Inception weights {weights} do not exist; download weights-inception-2015-12-05-6726825d.pth"
                " from torch-fidelity's releases to this path"
            )
        if importlib.util.find_spec("torch_fidelity") is None:
            raise UserError("the Inception network needs the package torch-fidelity: pip install torch-fidelity")
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            torch.load(weights, weights_only=True)  # checked first: torch-fidelity would run code in an unsafe file
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except Exception as error:  # torch.load and load_state_dict raise many kinds of errors
            reason = first_line(error)
            raise UserError(f"{weights} cannot be used as Inception weights ({reason}); download them again") from error
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, 2048) of images (B, 3, H, W) in [0, 1].

        The images are first rounded to 8 bits per channel, as they would be in an image file.
        """
        return self.network((images * 255).round().to(torch.uint8))
