"""Confidence intervals of figures, and of the difference of two samplers, by resampling the prompts (bootstrap).

A *sampler* is a way to make images. Two samplers are compared on the same prompts and the same noise. A resample draws the
prompts with replacement, and takes the same prompts from both samplers. Some prompts are harder than others for both
samplers, so the difference varies less than the two figures (Efron and Tibshirani, 1993, chapters 8 and 13).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cdm_lightning.core.rng import stream
from cdm_lightning.metrics.base import MeasuredImages, Metric
from cdm_lightning.metrics.suite import Collected, MetricSuite, Row, as_row

WIDEST = 1024  # dimensions of features; one Fréchet distance of wider ones takes many seconds
MOST_WORK = 1e14  # multiplications and additions for all resamples of a metric: half an hour on one core
FEWEST = 20  # resamples; with fewer, the ends of an interval say little
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % confidence interval from `low` to `high`."""

    value: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Return whether `value` lies in the interval."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def interval(value: float, resampled: Sequence[float], is_biased: bool = False) -> Interval:
    """Return the 95 % interval of the figure `value`. Its ends are percentiles of `resampled`, the resamples' figures.

    With `is_biased`, both ends are moved by `value` minus the mean of `resampled`. Use this for distances between
    distributions. A resample contains some prompts several times, which makes its distances larger, but hardly changes
    their spread. Raises ValueError for fewer than 2 resamples.
    """
    if len(resampled) < 2:
        raise ValueError(f"an interval needs at least 2 resamples, got {len(resampled)}")
    found = torch.tensor(resampled, dtype=torch.float64)
    tail, moved = (1 - LEVEL) / 2, value - float(found.mean()) if is_biased else 0.0
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, low + moved, high + moved)


def resample(measured: MeasuredImages, rows: Sequence[int], copies: Sequence[int]) -> MeasuredImages:
    """Return a resample of `measured`: the measurements of the images at the positions `rows`, which may repeat.

    `MeasuredImages.copies` holds features of several images per prompt. Of these, the features of the prompts at the
    positions `copies` are taken, which may repeat too.
    """
    chosen, prompts = torch.tensor(rows), torch.tensor(copies)
    return replace(
        measured,
        prompts=[measured.prompts[row] for row in rows],
        indices=[measured.indices[row] for row in rows],
        features={name: features[chosen] for name, features in measured.features.items()},
        scores=None if measured.scores is None else measured.scores[chosen],
        copies={name: several[prompts] for name, several in measured.copies.items()},
        other_noise={name: features[chosen] for name, features in measured.other_noise.items()},
    )


def is_quick(metric: Metric, measured: Mapping[str, MeasuredImages]) -> bool:
    """Return whether `metric` is fast enough to be computed for each resample.

    A metric as slow as a Fréchet distance (see `Metric.work`) is too slow if one of its features in `measured` has more
    than `WIDEST` dimensions.
    """
    if type(metric).work is not Metric.work:
        return True
    wide = [
        name
        for images in measured.values()
        for name, features in images.features.items()
        if name in metric.features and features.shape[1] > WIDEST
    ]
    return not wide


def affordable(
    metric: Metric, measured: Mapping[str, MeasuredImages], resamples: int, most_work: float = MOST_WORK
) -> int:
    """Return how many of the `resamples` are computed, so that the figures of all samplers take at most `most_work`.

    The result depends on the numbers of images and features (see `Metric.work`), but not on the machine. It is 0 if
    fewer than `FEWEST` resamples would be left.
    """
    work = sum(
        metric.work(len(images), max((found.shape[1] for found in images.features.values()), default=0))
        if images.scores is None
        else len(images)
        for images in measured.values()
    )
    found = int(min(resamples, most_work / max(work, 1)))
    return found if found >= min(FEWEST, resamples) else 0


def needed_by(metric: Metric, measured: MeasuredImages) -> MeasuredImages:
    """Return `measured` with the features of those extractors alone that the metric needs, because resampling copies them."""

    def own(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in features.items() if name in metric.features}

    kinds = own(measured.features), own(measured.copies), own(measured.other_noise)
    return replace(measured, features=kinds[0], copies=kinds[1], other_noise=kinds[2])


def resampled_figures(
    name: str, metric: Metric, measured: Mapping[str, MeasuredImages], resamples: int, seed: int
) -> list[dict[str, Row]]:
    """Return a list with one dict {sampler: {figure: value}} for each resample: the figures of the metric `name`.

    `measured` maps names of samplers to their measurements. All samplers have images of the same prompts, and a
    resample takes the same prompts from all of them. `seed` determines the resamples.
    """
    rng = stream(seed, f"resamples of {name}")
    size = min(len(images) for images in measured.values())
    several = min((len(made) for images in measured.values() for made in images.copies.values()), default=1)
    found = []
    for _ in range(resamples):
        rows = torch.randint(size, (size,), generator=rng).tolist()
        copies = torch.randint(several, (several,), generator=rng).tolist()
        drawn = {sampler: resample(images, rows, copies) for sampler, images in measured.items()}
        found.append({sampler: as_row(name, metric.figures(images, drawn)) for sampler, images in drawn.items()})
    return found


def values_of(drawn: Sequence[Mapping[str, Row]], sampler: str, figure: str) -> list[float] | None:
    """Return a sampler's figure in each of the resamples `drawn`, or None if it is missing in one of them."""
    found = [one[sampler][figure] for one in drawn if figure in one[sampler] and math.isfinite(one[sampler][figure])]
    return found if len(found) == len(drawn) else None


def without_interval(name: str, metric: Metric, rows: Mapping[str, Row]) -> set[str]:
    """Return the figures in `rows`, by sampler, for which the metric `name` says that resampling would change them."""
    keys = as_row(name, dict.fromkeys(metric.figures_without_interval, 0.0))
    return {key.removesuffix("_") for key in keys} & {figure for row in rows.values() for figure in row}


def _is_one_number(scores: Tensor) -> bool:
    return len(scores.unique()) == 1 and bool(scores.isfinite().all())


def same_scores(metrics: MetricSuite, samplers: Mapping[str, Collected]) -> list[str]:
    """Return a sentence for each metric that gives all images of a sampler the same score: its interval has no width.

    If none of N images differs, up to about 3 / N of all images may differ at a confidence of 95 % (Hanley and
    Lippman-Hand, 1983).
    """
    found = []
    for name in metrics.metrics:
        scores = {sampler: collected.of(name).scores for sampler, collected in samplers.items()}
        equal = {sampler: len(one) for sampler, one in scores.items() if one is not None and _is_one_number(one)}
        if equal:
            found.append(
                f"{name} of {', '.join(equal)}: all images have the same score, so the interval has no width; up to about "
                f"{3 / min(equal.values()):.2g} of the images of other prompts may still differ"
            )
    return found


@dataclass(frozen=True)
class Comparison:
    """The intervals of an evaluation.

    - `figures`: maps the name of each sampler to a dict with the interval of each figure.
    - `differences`: maps the name of each sampler except the baseline to a dict with an interval for each figure: the
      interval of the sampler's figure minus the baseline's.
    - `missing`: sentences that say which intervals cannot be computed, and why.
    - `left_out`: the names of the metrics for which no intervals were computed, because they would take too long.
    - `reduced`: maps the name of a metric to its number of resamples, if there were fewer because they would take too
      long.
    """

    figures: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    left_out: list[str]
    missing: list[str] = field(default_factory=list)
    reduced: dict[str, int] = field(default_factory=dict)


def compare(
    metrics: MetricSuite,
    samplers: Mapping[str, Collected],
    baseline: str,
    resamples: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda metric: None,
    most_work: float = MOST_WORK,
) -> Comparison:
    """Return the intervals of all samplers' figures, and of their differences from the figures of sampler `baseline`.

    `samplers` maps names to measurements, which must be of images of the same prompts. `progress` is called with the
    name of each metric when its intervals are complete. A metric for which the resamples would take more than `most_work`
    has fewer resamples, or no intervals. Raises KeyError if `baseline` is not in `samplers`.
    """
    figures: dict[str, dict[str, Interval]] = {sampler: {} for sampler in samplers}
    differences: dict[str, dict[str, Interval]] = {sampler: {} for sampler in samplers if sampler != baseline}
    left_out, missing, reduced = [], same_scores(metrics, samplers), dict[str, int]()
    for name, metric in metrics.metrics.items():
        measured = {sampler: needed_by(metric, collected.of(name)) for sampler, collected in samplers.items()}
        count = affordable(metric, measured, resamples, most_work) if is_quick(metric, measured) else 0
        if not count:
            left_out.append(name)
            continue
        if count < resamples:
            reduced[name] = count
        whole = {sampler: as_row(name, metric.figures(images, measured)) for sampler, images in measured.items()}
        skipped = without_interval(name, metric, whole)
        missing += [f"no interval of {', '.join(sorted(skipped))}: {metric.no_interval}"] if skipped else []
        if all(figure in skipped for row in whole.values() for figure in row):
            progress(name)
            continue
        is_biased = any(images.scores is None for images in measured.values())
        drawn = resampled_figures(name, metric, measured, count, seed)
        for sampler, row in whole.items():
            for figure, value in ((figure, value) for figure, value in row.items() if figure not in skipped):
                values, others = values_of(drawn, sampler, figure), values_of(drawn, baseline, figure)
                if values is None:
                    missing.append(
                        f"{figure} of {sampler} has no interval: it is missing or not finite in some resamples"
                    )
                else:
                    figures[sampler][figure] = interval(value, values, is_biased)
                if others is None and sampler != baseline:
                    missing.append(f"{figure}: {baseline} has no such figure to compare with; set another --baseline")
                if sampler != baseline and values is not None and others is not None and figure in whole[baseline]:
                    gaps = [one - other for one, other in zip(values, others, strict=True)]
                    differences[sampler][figure] = interval(value - whole[baseline][figure], gaps, is_biased)
        progress(name)
    return Comparison(figures, differences, left_out, list(dict.fromkeys(missing)), reduced)
