"""An open_clip model that embeds images and prompts for metrics.

If weights are missing, an error is raised; open_clip itself would go on with random weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

if TYPE_CHECKING:
    from open_clip import CLIP
    from torchvision.transforms import Compose

LOCAL_DIR = "local-dir:"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # the weight files that open_clip looks for in a local folder


class OpenClipModel(nn.Module):
    """The image and text encoders of a CLIP model, frozen, in float32 and in eval mode.

    `model` is either a model name that open_clip knows, or `local-dir:FOLDER` for a folder that has
    open_clip_config.json and weights. With a model name, `pretrained` must be given. It is either the path of a file of
    weights, or one of open_clip's tags for this model. The weights of a tag are downloaded.

    Raises `UserError` if the model or its weights are missing or cannot be loaded.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        super().__init__()
        import open_clip  # takes seconds to import, so only where it is used

        _check_source(model, pretrained, open_clip.list_models(), open_clip.list_pretrained_tags_by_model)
        try:
            clip, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained)
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip passes on any error of json, torch, safetensors and the network
            reason = first_line(error)
            raise UserError(
                f"cannot load the CLIP model {model} with pretrained={pretrained} ({reason}); set pretrained to weights of this model"
            ) from error
        self.clip = cast("CLIP", clip.float().eval().requires_grad_(False))
        *self.geometry, self.normalise = cast("Compose", transform).transforms

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.clip.parameters()).device

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, D) of images (B, 3, H, W) in [0, 1], not normalized and without gradients.

        The images first get open_clip's preprocessing for this model: they are brought to the model's image size, and
        their pixels are normalized.
        """
        return self.embed_images(images)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return the same embeddings (B, D) as `encode_images`, but with gradients with respect to the images."""
        images = images.to(self.device, torch.float32)
        for transform in self.geometry:
            images = transform(images)
        return self.clip.encode_image(self.normalise(images.clamp(0, 1)))  # bicubic resizing can leave [0, 1]

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, D) of B prompts, not normalized."""
        return self.clip.encode_text(self.tokenizer(list(prompts)).to(self.device))


def _check_source(model: str, pretrained: str | None, known: Sequence[str], tags_of) -> None:
    """Raise `UserError` for mistakes that open_clip would answer with random weights or with an error of several lines."""
    if model.startswith(LOCAL_DIR):
        folder = Path(model.removeprefix(LOCAL_DIR))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(
                f"{folder} is not an open_clip folder, because it has no open_clip_config.json; pass a folder with this file"
            )
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            raise UserError(f"{folder} has no CLIP weights; copy open_clip_model.safetensors into it")
        return
    if model not in known:
        raise UserError(f"open_clip has no model {model!r}; use one of its model names or {LOCAL_DIR}FOLDER")
    if pretrained is None:
        raise UserError(
            f"the CLIP model {model} has no weights; set pretrained to a file or a tag of open_clip, in the part of the "
            f"configuration that sets model={model}"
        )
    if not Path(pretrained).is_file() and pretrained not in tags_of(model):
        tags = ", ".join(tags_of(model))
        raise UserError(
            f"the CLIP weights pretrained={pretrained} do not exist; set pretrained to a file or to a tag of {model} ({tags})"
        )
