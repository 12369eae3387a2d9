"""The feature extractor DINOv2.

Fréchet distances between its features agree better with people than those of Inception (Stein et al., arXiv:2306.04675).
"""

import torch
from torch import Tensor, nn

from cdm_lightning.kinds import Model


class Dinov2Features(nn.Module):
    """A feature extractor that embeds images by the DINOv2 model `pretrained` (see `backbones.dinov2.load_dinov2`)."""

    def __init__(self, pretrained: Model) -> None:
        super().__init__()
        from cdm_lightning.backbones.dinov2 import load_dinov2  # takes seconds to import, so only where it is used

        self.network, self.processor = load_dinov2(pretrained)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, 3, H, W) in [0, 1]: the class token after the last normalisation.

        The images are first rounded to 8 bits per channel, as they would be in an image file. Then they are resized,
        cropped and normalised as preprocessor_config.json says.
        """
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        prepared = self.processor(images=list(pixels), return_tensors="pt")["pixel_values"]
        device = next(self.network.parameters()).device
        return self.network(pixel_values=prepared.to(device)).pooler_output
