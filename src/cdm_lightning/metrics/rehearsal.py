"""Try the metrics of a run before its first step, so that a mistake does not show up only when images are measured."""

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.metrics.base import ImageBatch, Metric
from cdm_lightning.metrics.suite import MetricSuite


@torch.no_grad()
def rehearse(
    suite: MetricSuite, sizes: Iterable[tuple[int, int]], prompts: Sequence[str], device: torch.device
) -> None:
    """Let all extractors and metrics measure made-up images: for each size (height, width), one image per prompt.

    Extractors and metrics run on `device` and then return to the CPU. If a metric overrides `prepare`, as metrics with
    reference images do, its `check_features` is called but its `score` is not, because `score` needs `prepare`, which
    may take minutes. If the suite is already prepared, the function does nothing.

    Raises `UserError`, with the name of the extractor or metric, for the first one that fails.
    `torch.OutOfMemoryError` passes unchanged. If the extractor or metric is not part of this package, all errors except
    `UserError` pass unchanged, because they may be bugs in it.
    """
    if suite.is_prepared or not suite.metrics:
        return
    suite.move(device)
    for height, width in sizes:
        shape = (len(prompts), 3, height, width)
        images = torch.linspace(0, 1, math.prod(shape), device=device).reshape(shape)
        batch = ImageBatch(images, prompts, range(len(prompts)), suite.extractors)
        what = f"images of {width} x {height} pixels"
        features = {}
        for name in suite.needed:
            with _explained(f"feature.{name} cannot read {what}", suite.extractors[name]):
                features[name] = batch.features(name)
        for name, metric in suite.metrics.items():
            with _explained(f"metric.{name} cannot measure {what}", metric):
                metric.check_features(features)
                for feature in metric.text_features:
                    batch.text_features(feature)
                if type(metric).prepare is Metric.prepare:
                    metric.score(batch)
    suite.move("cpu")


@contextmanager
def _explained(what: str, part: object) -> Generator[None]:
    """Turn an error inside the block into a `UserError` that begins with `what`, if `part` is a class of this package."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not isinstance(error, UserError) and not type(part).__module__.startswith("cdm_lightning."):
            raise
        raise UserError(f"{what}: {first_line(error)}") from error
