"""Fréchet distance between the features of generated and of reference images, computed by torchmetrics.

Shapes: images (B, 3, H, W) in [0, 1], features (N, D). The distance of the Gaussians with the features' means m and
covariances C is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al., arXiv:1706.08500). It falls with the number
of samples: compare figures of equal counts only. Metrics are held by callbacks, never by the LightningModule, whose
checkpoints would take up the extractor's weights.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdm_lightning.errors import UserError


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor) -> Tensor:
    """Features (B, D) of images (B, 3, H, W) in [0, 1], on the extractor's device."""
    state = next(itertools.chain(extractor.parameters(), extractor.buffers()), images)
    return extractor(images.to(state.device)).flatten(1)


@dataclass(frozen=True)
class FeatureStatistics:
    """What a Fréchet distance needs of one side: mean (D,), covariance (D, D), both float64, and number of samples."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of_features(cls, batches: Iterable[Tensor]) -> "FeatureStatistics":
        """Statistics of features (B, D) that come in batches; ValueError with fewer than 2 samples in all."""
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
        """Statistics of the features of images (B, 3, H, W) that come in batches."""
        return cls.of_features(extract(extractor, images) for images in batches)

    def save(self, path: str | Path) -> None:
        """Write `path` (safetensors) in one rename."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        state = {"mean": self.mean, "covariance": self.covariance.contiguous(), "count": torch.tensor(self.count)}
        save_file(state, temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Statistics written by `save`; UserError where the file is missing or holds something else."""
        try:
            state = load_file(path)
            return cls(state["mean"].double(), state["covariance"].double(), int(state["count"]))
        except (OSError, SafetensorError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot read reference statistics from {path} ({reason}); it must hold mean, covariance and count"
            ) from None


class _GivenFeatures(nn.Module):
    """The `feature` module that torchmetrics asks for, fed with features: one extraction then serves all metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) as they are."""
        return features


class FrechetDistance:
    """Distance of features (N, D) to the `reference`; with `sync` all processes add to it, and all must compute."""

    def __init__(self, reference: FeatureStatistics, device: torch.device | str = "cpu", sync: bool = True) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance  # seconds to import: paid where it is used

        dim, n = len(reference.mean), reference.count
        self.device = torch.device(device)
        self.metric = FrechetInceptionDistance(_GivenFeatures(dim), normalize=True, sync_on_compute=sync)
        self.metric.to(self.device)
        self._synced = sync and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if self._synced and torch.distributed.get_rank():
            return  # states are summed over the processes: the reference counts once
        outer = (n - 1) * reference.covariance + n * torch.outer(reference.mean, reference.mean)
        self.metric.real_features_sum = (n * reference.mean).to(self.device)
        self.metric.real_features_cov_sum = outer.to(self.device)
        self.metric.real_features_num_samples = torch.tensor(n, device=self.device)

    def update(self, features: Tensor) -> None:
        """Add generated features (B, D)."""
        self.metric.update(features.to(self.device).double(), real=False)  # the result has the dtype of the features

    def compute(self) -> float:
        """The distance; nan while there are fewer than 2 generated samples (of several processes each must have one)."""
        enough = self._synced or self.metric.fake_features_num_samples >= 2
        return float(self.metric.compute()) if enough else float("nan")
