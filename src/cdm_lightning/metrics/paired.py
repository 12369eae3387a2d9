"""The distance of each image to the image that another sampler, such as the teacher, makes for the same prompt."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from cdm_lightning.kinds import FeatureName, Name, Pixels
from cdm_lightning.metrics.base import MeasuredImages, Metric


class PixelFeatures(nn.Module):
    """A feature extractor whose features are the images themselves, averaged to `size` x `size` pixels.

    The features are divided by the square root of their number. Their distance is therefore the root mean square
    difference of the pixels, in [0, 1].
    """

    def __init__(self, size: Pixels = 16) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, 3 * size * size) of images (B, 3, H, W) in [0, 1]."""
        small = F.adaptive_avg_pool2d(images.float().clamp(0, 1), self.size).flatten(1)
        return small / small.shape[1] ** 0.5


class PairedDistance(Metric):
    """The mean distance of an image's features to those of the image that `sampler` makes for the same prompt.

    `sampler` is the name of another sampler, and `feature` that of the feature extractor. "same_noise" is the distance
    of images that start from the same noise. It is small for a student that follows its teacher's paths. "other_noise"
    is the distance if the images of `sampler` stay the same, and the measured ones start from other noise. For `sampler`
    itself, it is the distance of two of its images of a prompt, with which the others can be compared.
    """

    def __init__(self, sampler: Name, feature: FeatureName = "pixels") -> None:
        self.sampler, self.feature, self.features = sampler, feature, (feature,)
        self.other_noise = True

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> dict[str, float] | None:
        """Return {"same_noise": ..., "other_noise": ...}, without those that are unknown, or None.

        There is no "same_noise" of `sampler` itself, nor of images that start from other noise or from none. There is no
        figure if `sampler` is not in `others`.
        """
        reference = others.get(self.sampler or "")
        if reference is None:
            return None
        target, own, found = reference.features[self.feature], measured.features[self.feature], {}
        if len(target) != len(own):
            return None
        is_paired = measured.has_noise and reference.has_noise
        if reference is not measured:
            found["same_noise" if is_paired else "other_noise"] = mean_distance(own, target)
        if self.feature in measured.other_noise and measured.has_noise:
            found["other_noise"] = mean_distance(measured.other_noise[self.feature], target)
        return found or None

    def work(self, images: int, width: int) -> float:
        """Return about how many multiplications and additions `figures` takes (see `Metric.work`)."""
        return 6.0 * images * width


def mean_distance(a: Tensor, b: Tensor) -> float:
    """Return the mean Euclidean distance of the rows of `a` (N, D) and `b` (N, D), in the units of the features."""
    return float((a.double() - b.double()).norm(dim=1).mean())
