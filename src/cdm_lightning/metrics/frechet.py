"""The Fréchet distance between the features of generated images and of reference images, computed by torchmetrics.

It is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) for features with means m and covariances C (Heusel et al., arXiv:1706.08500).
With the features of Inception it is called FID. It decreases with the number of images, so compare only figures for equal
numbers. Shapes: images (B, 3, H, W) in [0, 1], features (N, D).
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
    """The statistics of a set of features for a Fréchet distance: mean (D,), covariance (D, D) and number of features.

    Mean and covariance are float64.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of_features(cls, batches: Iterable[Tensor]) -> "FeatureStatistics":
        """Return the statistics of batches of features (B, D). Raises ValueError for fewer than 2 features in total."""
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
        """Return the statistics of the features of images, given in batches (B, 3, H, W) in [0, 1].

        Raises ValueError for fewer than 2 images.
        """
        return cls.of_features(extract(extractor, images) for images in batches)

    def save(self, path: str | Path) -> None:
        """Write the statistics to the safetensors file `path`, completely or not at all."""
        state = {"mean": self.mean, "covariance": self.covariance.contiguous(), "count": torch.tensor(self.count)}
        with replacing(path) as temporary:
            save_file(state, temporary)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read statistics that `save` wrote. Raises `UserError` if the file is missing or has other contents."""
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
        """Return features (B, D) unchanged."""
        return features


def frechet_distance(reference: FeatureStatistics, features: Tensor) -> float | None:
    """Return the Fréchet distance of features (N, D) to `reference`, computed in float64 by torchmetrics.

    Returns None for N < 2, and NaN for features that are not finite, such as those of a student that has diverged.
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


class Frechet(Metric):
    """The Fréchet distance of the images to the images in `reference`.

    `reference` yields batches of images (B, 3, H, W) in [0, 1] and is read once, or it is the `FeatureStatistics` of such images.
    `feature` is the name of the feature extractor. Name the metric `fid` only with `InceptionFeatures`, because the distance
    depends on the features.
    """

    def __init__(self, reference: Iterable[Tensor] | FeatureStatistics, feature: FeatureName = "clip") -> None:
        self.reference, self.feature, self.features = reference, feature, (feature,)

    def prepare(self, extractors: Mapping[str, nn.Module]) -> None:
        """Compute the statistics of the reference images, unless they are given. Raises `UserError` for fewer than 2 images."""
        if not isinstance(self.reference, FeatureStatistics):
            try:
                self.reference = FeatureStatistics.of_images(extractors[self.feature], self.reference)
            except ValueError as error:
                raise UserError(
                    f"there are too few reference images for a Fréchet distance ({error}); set a reference with more images"
                ) from error

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> float | None:
        """Return the distance, or None for fewer than 2 images."""
        return frechet_distance(cast(FeatureStatistics, self.reference), measured.features[self.feature])

    def facts(self) -> dict[str, float]:
        """Return the number of reference images, because the distance depends on it."""
        return {"reference_images": cast(FeatureStatistics, self.reference).count}


class FrechetToSampler(Metric):
    """The Fréchet distance of the images to those of another sampler, such as the teacher in 50 steps.

    A sampler is a way to make images. `sampler` is the name of the other sampler, and `feature` is the name of the feature
    extractor.
    """

    def __init__(self, sampler: Name, feature: FeatureName = "clip") -> None:
        self.sampler, self.feature, self.features = sampler, feature, (feature,)
        self.other_noise = True
        self._reference: tuple[MeasuredImages, FeatureStatistics] | None = None  # of the latest measurement

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> Figures:
        """Return {"same_noise": distance, "other_noise": distance}.

        "same_noise" compares images that start from the same noise as the other sampler's images. This distance is small, because
        such images resemble each other. "other_noise" compares images that start from different noise; it is left out if the
        evaluation makes no such images.

        Returns None if `measured` are the other sampler's own images, if the other sampler is not run, and for fewer than 2
        images.
        """
        reference = others.get(self.sampler or "")
        if reference is None or reference is measured or min(len(reference), len(measured)) < 2:
            return None
        if self._reference is None or self._reference[0] is not reference:
            self._reference = reference, FeatureStatistics.of_features([reference.features[self.feature]])
        sets = {"same_noise" if measured.has_noise else "other_noise": measured.features[self.feature]}
        if self.feature in measured.other_noise:
            sets["other_noise"] = measured.other_noise[self.feature]
        found = {name: frechet_distance(self._reference[1], features) for name, features in sets.items()}
        return {name: value for name, value in found.items() if value is not None}
