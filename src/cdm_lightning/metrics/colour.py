"""Colour statistics of images: brightness, saturation, contrast and the visibility of the patch grid.

Students that are trained by distribution matching tend to get darker, more saturated or higher in contrast than their
teacher, or to show the grid of the transformer's patches, while Fréchet distances and losses hardly change. Shapes:
images (B, 3, H, W) in [0, 1].
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import FeatureName, Name, Several
from cdm_lightning.metrics.base import MeasuredImages, Metric

FIGURES = ("brightness", "saturation", "contrast", "patch_grid")
LUMA = (0.2126, 0.7152, 0.0722)  # the weights of red, green and blue in ITU-R BT.709


class ColourStatistics(nn.Module):
    """A feature extractor for the metric `Colour`: it maps images (B, 3, H, W) in [0, 1] to features (B, 5).

    The five features of an image are:
    - its brightness: the mean luma (ITU-R BT.709) of its pixels, in [0, 1];
    - its saturation: the mean saturation of its pixels, in [0, 1]. As in HSV, the saturation of a pixel is
      (max - min) / max, where max and min are the largest and the smallest of its three channels;
    - its contrast: the standard deviation of the luma over the pixels;
    - the mean absolute difference of the luma of neighbouring pixels that are in different patches;
    - the mean absolute difference of the luma of neighbouring pixels that are in the same patch.

    `patch` is the side of a patch in pixels of the image. For SD3 it is 16, because a patch of the transformer has 2 x
    2 latent pixels, and the VAE decodes each of them into 8 x 8 pixels of the image. For images that are not larger
    than a patch, the fourth feature is NaN.
    """

    def __init__(self, patch: Several = 16) -> None:
        super().__init__()
        if patch < 2:
            raise UserError(f"ColourStatistics: patch={patch} must be at least 2 pixels")
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, 5) of images (B, 3, H, W) in [0, 1]."""
        images = images.float().clamp(0, 1)
        luma = torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))
        largest, smallest = images.amax(1), images.amin(1)
        saturation = (largest - smallest) / largest.clamp(min=1e-6)
        means = [luma.mean((1, 2)), saturation.mean((1, 2)), luma.std((1, 2), correction=0)]
        return torch.stack([*means, *self._differences(luma)], dim=1)

    def _differences(self, luma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean differences (B,) of luma (B, H, W) between neighbours in different patches and in the same patch."""
        across, within = [], []
        for differences in (luma.diff(dim=2).abs(), luma.diff(dim=1).abs().transpose(1, 2)):  # (B, lines, border)
            borders = torch.arange(1, differences.shape[2] + 1, device=luma.device) % self.patch == 0
            across.append(differences[:, :, borders].flatten(1))
            within.append(differences[:, :, ~borders].flatten(1))
        return torch.cat(across, dim=1).mean(1), torch.cat(within, dim=1).mean(1)


class Colour(Metric):
    """The colour statistics of the images of a sampler (a way to make images): brightness, saturation, contrast and patch_grid.

    Brightness, saturation and contrast are means over the images. patch_grid is the mean luma difference of
    neighbouring pixels in different patches, divided by the mean luma difference of neighbouring pixels in the same
    patch. It is near 1 if the grid of patches is invisible.

    `sampler` is the name of another sampler, such as the teacher in 50 steps. If it is given, each figure is divided by the
    figure of that sampler, so 1 means equal. `feature` is the name of a feature extractor that is a `ColourStatistics`.
    """

    def __init__(self, sampler: Name | None = None, feature: FeatureName = "colour") -> None:
        self.sampler, self.feature, self.features = sampler, feature, (feature,)

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> dict[str, float] | None:
        """Return {"brightness": ..., "saturation": ..., "contrast": ..., "patch_grid": ...}.

        `others` holds the measurements of all samplers by name. A figure that cannot be computed is left out, such as
        patch_grid for images that are not larger than a patch. Returns None if `measured` has no images.

        If the metric divides its figures by those of a `sampler`, a figure that would be divided by 0 is left out too.
        Then the result is also None if that sampler is not in `others` or has no images there.
        """
        reference = measured if self.sampler is None else others.get(self.sampler)
        if reference is None or not len(measured) or not len(reference):
            return None
        found = colour_figures(measured.features[self.feature])
        if self.sampler is None:
            return found
        base = colour_figures(reference.features[self.feature])
        return {name: value / base[name] for name, value in found.items() if base.get(name)}


def colour_figures(features: Tensor) -> dict[str, float]:
    """Return the figures of N images by name, from the features (N, 5) that `ColourStatistics` computes of them.

    patch_grid is left out if it cannot be computed, as for images that are not larger than a patch.
    """
    brightness, saturation, contrast, across, within = features.double().mean(0).tolist()
    found = {"brightness": brightness, "saturation": saturation, "contrast": contrast}
    if math.isfinite(across) and within:
        found["patch_grid"] = across / within
    return found
