"""The Fréchet distance between the features of generated images and of reference images, computed by torchmetrics.

For two sets of features with means m1 and m2 and covariances C1 and C2, the distance is |m1 - m2|^2 + tr(C1 + C2 - 2
(C1 C2)^(1/2)) (Heusel et al., arXiv:1706.08500). With the features of Inception, the distance is called FID. The
distance decreases with the number of images, so compare only figures that are measured with equal numbers of images.
Shapes: images (B, 3, H, W) in [0, 1], features (N, D).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, replacing
from cdm_lightning.kinds import FeatureName, Name
from cdm_lightning.metrics.base import Figures, MeasuredImages, Metric, extract


@dataclass(frozen=True)
class FeatureStatistics:
    """The mean and the covariance of a set of features, from which Fréchet distances are computed.

    `mean` (D,) and `covariance` (D, D) are float64. `count` is the number of features.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of_features(cls, batches: Iterable[Tensor]) -> "FeatureStatistics":
        """Return the statistics of all features in `batches`, which yields tensors (B, D).

        Raises ValueError for fewer than 2 features in total.
        """
        count, total, outer = 0, torch.zeros(()), torch.zeros(())
        for features in batches:
            features = features.cpu().double()  # not all devices have float64
            count, total, outer = count + len(features), total + features.sum(0), outer + features.T @ features
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        mean = total / count
        return cls(mean, (outer - count * torch.outer(mean, mean)) / (count - 1), count)

    @classmethod
    def of_images(cls, extractor: nn.Module, batches: Iterable[Tensor]) -> "FeatureStatistics":
        """Return the statistics of the features that `extractor` computes of all images in `batches`.

        `batches` yields images (B, 3, H, W) in [0, 1]. Raises ValueError for fewer than 2 images in total.
        """
        return cls.of_features(extract(extractor, images) for images in batches)

    def save(self, path: str | Path) -> None:
        """Write the statistics to the safetensors file `path`, completely or not at all."""
        state = {"mean": self.mean, "covariance": self.covariance.contiguous(), "count": torch.tensor(self.count)}
        with replacing(path) as temporary:
            save_file(state, temporary)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Return the statistics that `save` wrote to `path`.

        Raises `UserError` if the file is missing or holds no such statistics.
        """
        try:
            state = load_file(path)
            return cls(state["mean"].double(), state["covariance"].double(), int(state["count"]))
        except (OSError, SafetensorError, KeyError) as error:
            reason = first_line(error)
            raise UserError(
                f"{path}: the statistics of reference images cannot be read ({reason}); pass a safetensors file with mean, "
                "covariance and count"
            ) from None


class _GivenFeatures(nn.Module):
    """A `feature` module for torchmetrics that returns its input, because the features are already computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` (B, D) unchanged."""
        return features


def frechet_distance(reference: FeatureStatistics, features: Tensor) -> float | None:
    """Return the Fréchet distance between `features` (N, D) and the features whose statistics are `reference`.

    torchmetrics computes the distance in float64. Returns None for N < 2. Returns NaN if a feature is not finite, as
    happens if the student has diverged.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import, so only where it is used

    if len(features) < 2:
        return None
    if not torch.isfinite(features).all():
        return float("nan")
    dim, n = len(reference.mean), reference.count
    metric = FrechetInceptionDistance(_GivenFeatures(dim), normalize=True, sync_on_compute=False)
    metric.real_features_sum = n * reference.mean
    metric.real_features_cov_sum = (n - 1) * reference.covariance + n * torch.outer(reference.mean, reference.mean)
    metric.real_features_num_samples = torch.tensor(n)
    metric.update(features.double(), real=False)  # the result has the dtype of the features
    return float(metric.compute())


def too_few(features: Tensor) -> str | None:
    """Return a warning if `features` (N, D) are those of too few images for a Fréchet distance, otherwise None.

    If N is at most D, the covariance of the features is singular, and the distance depends mostly on N.
    """
    count, width = features.shape
    if count > width:
        return None
    return (
        f"{count} images are too few for {width} features, so the distance depends mostly on their number; "
        "compare only figures for this number, or use more images"
    )


class Frechet(Metric):
    """The Fréchet distance between the features of a sampler's images and the features of reference images.

    `reference` is either the `FeatureStatistics` of the reference images, or an iterable of their batches (B, 3, H, W)
    in [0, 1], which is iterated over once. `feature` is the name of the feature extractor. The distance depends on the
    extractor, so name the metric `fid` only with `InceptionFeatures`.
    """

    least_images = 2  # for a covariance

    def __init__(self, reference: Iterable[Tensor] | FeatureStatistics, feature: FeatureName = "clip") -> None:
        self.reference, self.feature, self.features = reference, feature, (feature,)

    def prepare(self, extractors: Mapping[str, nn.Module]) -> None:
        """Compute the statistics of the reference images, unless the metric already has them.

        `extractors` holds all feature extractors by name. The metric uses the extractor that its argument `feature`
        names. Raises `UserError` for fewer than 2 reference images.
        """
        if not isinstance(self.reference, FeatureStatistics):
            try:
                self.reference = FeatureStatistics.of_images(extractors[self.feature], self.reference)
            except ValueError as error:
                raise UserError(
                    f"there are too few reference images for a Fréchet distance ({error}); set a reference with more images"
                ) from error

    def check_features(self, features: Mapping[str, Tensor]) -> None:
        """Raise `UserError` if the statistics in `reference` have another width than the extractor's features.

        `features` maps an extractor's name to the features (B, D) of B made-up images. D is the width. Nothing is
        checked while `reference` is an iterable of images.
        """
        if isinstance(self.reference, FeatureStatistics):
            width, own = len(self.reference.mean), features[self.feature].shape[1]
            if width != own:
                raise UserError(
                    f"the reference has statistics of {width} features, but feature.{self.feature} gives {own}; set a reference that "
                    "was measured with this extractor"
                )

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the Fréchet distance of the images in `measured` to the reference images.

        Returns None for fewer than 2 images.
        """
        return frechet_distance(cast(FeatureStatistics, self.reference), measured.features[self.feature])

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has too few images for a Fréchet distance, otherwise None (see `too_few`)."""
        return too_few(measured.features[self.feature])

    def facts(self) -> dict[str, float]:
        """Return the number of reference images as "reference_images", because the distance depends on this number."""
        return {"reference_images": cast(FeatureStatistics, self.reference).count}


class FrechetToSampler(Metric):
    """The Fréchet distance of a sampler's images to the images of a reference sampler, such as the teacher in 50 steps.

    A sampler is a way to make images. `sampler` is the name of the reference sampler, and `feature` is the name of the
    feature extractor.
    """

    least_images = 2  # for a covariance

    def __init__(self, sampler: Name, feature: FeatureName = "clip") -> None:
        self.sampler, self.feature, self.features = sampler, feature, (feature,)
        self.other_noise = True
        self._reference: tuple[MeasuredImages, FeatureStatistics] | None = None  # of the latest measurement

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> Figures:
        """Return up to two Fréchet distances of the images in `measured` to the reference sampler's images, by name.

        For generated images, "same_noise" is the distance of the images that start from the same noise as the reference
        sampler's images. Images from the same noise resemble each other, so this distance is small. "other_noise" is
        the distance of the images in `measured.other_noise`, which start from different noise. This distance is missing
        if `measured.other_noise` is empty. For real images, which start from no noise, the only distance is
        "other_noise".

        Returns None if `measured` are the reference sampler's own images, if the reference sampler is not in `others`,
        or if one of the two samplers has fewer than 2 images.
        """
        reference = others.get(self.sampler or "")
        if reference is None or reference is measured or min(len(reference), len(measured)) < 2:
            return None
        if self._reference is None or self._reference[0] is not reference:
            self._reference = reference, FeatureStatistics.of_features([reference.features[self.feature]])
        is_paired = measured.has_noise and reference.has_noise
        sets = {"same_noise" if is_paired else "other_noise": measured.features[self.feature]}
        if self.feature in measured.other_noise and measured.has_noise:
            sets["other_noise"] = measured.other_noise[self.feature]
        found = {name: frechet_distance(self._reference[1], features) for name, features in sets.items()}
        return {name: value for name, value in found.items() if value is not None}

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has too few images for a Fréchet distance, otherwise None (see `too_few`)."""
        return too_few(measured.features[self.feature])
