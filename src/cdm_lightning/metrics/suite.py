"""All metrics of a run, with the feature extractors that they share. Validation and the final evaluation use them.

A *sampler* is a way to make images: a network, a number of steps and a guidance scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cdm_lightning.data.text_cache import Texts
from cdm_lightning.errors import UserError
from cdm_lightning.metrics.base import Copies, Figures, ImageBatch, MeasuredImages, Metric, extract

COLUMNS = ("sampler", "prompt", "prompt_index", "network_calls", "seconds_per_image")  # of the results beside figures
Row = dict[str, float]  # figure -> value


@dataclass
class Collected:
    """The measurements of one sampler's images, collected batch by batch: features, scores and prompts.

    The images themselves are not kept.
    """

    prompts: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=dict)  # extractor -> (B, D) of each batch
    scores: dict[str, list[Tensor]] = field(default_factory=dict)  # metric -> (B,) of each batch
    copies: dict[str, list[Tensor]] = field(default_factory=dict)  # extractor -> (P, D) of each additional image
    other_noise: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # extractor -> (B, D) of each batch from other noise
    has_noise: bool = True  # False for real images

    def add(self, other: "Collected") -> None:
        """Append the measurements in `other`, which another process made for the same sampler in validation.

        `copies` and `other_noise` are not appended, because validation makes only one image for each prompt and
        sampler.
        """
        self.prompts += other.prompts
        self.indices += other.indices
        for mine, theirs in ((self.features, other.features), (self.scores, other.scores)):
            for name, batches in theirs.items():
                mine.setdefault(name, []).extend(batches)

    def of(self, metric: str) -> MeasuredImages:
        """Return the measurements from which the metric named `metric` computes its figures, sorted by prompt index."""
        order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
        features = {name: _ordered(batches, order) for name, batches in self.features.items()}
        scores = self.scores.get(metric)
        return MeasuredImages(
            prompts=[self.prompts[i] for i in order],
            indices=[self.indices[i] for i in order],
            features=features,
            scores=_ordered(scores, order) if scores else None,
            copies={
                name: torch.stack([features[name][: len(more[0])], *more], 1) for name, more in self.copies.items()
            },
            other_noise={name: _ordered(batches) for name, batches in self.other_noise.items()},
            has_noise=self.has_noise,
        )


def _ordered(batches: Sequence[Tensor], order: Sequence[int] = ()) -> Tensor:
    """Return the rows of all batches in this order, without a copy if it is one batch in this order already."""
    whole = batches[0] if len(batches) == 1 else torch.cat(list(batches))
    return whole[list(order)] if any(place != row for place, row in enumerate(order)) else whole


def as_row(name: str, found: Figures) -> Row:
    """Return the figures of the metric `name` as a row, a dict {key: figure}.

    `found` is the metric's result. If it is one figure, the key is `name`. If it maps names to figures, each key is
    "NAME_FIGURE". Figures that are None are left out.
    """
    if isinstance(found, Mapping):
        return {f"{name}_{figure}": float(value) for figure, value in found.items() if value is not None}
    return {} if found is None else {name: float(found)}


class MetricSuite:
    """All metrics of a run, and the feature extractors that they share.

    `metrics` holds the metrics by name, and `features` the extractors by the names under which metrics ask for them.
    Entries that are None are left out.

    Raises `UserError` for an object that is not a `Metric`, for an extractor that is not a torch module, and for a
    metric whose name is in `COLUMNS`, the columns of the results that are not metrics. Also raises `UserError` for a
    metric whose extractor is missing, and for a metric that needs features of prompts from an extractor that cannot
    encode prompts.
    """

    def __init__(
        self, metrics: Mapping[str, Metric] | None = None, features: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.metrics = {name: metric for name, metric in (metrics or {}).items() if metric is not None}
        self.extractors = {name: module for name, module in (features or {}).items() if module is not None}
        for name, extractor in self.extractors.items():
            if not isinstance(extractor, nn.Module):
                raise UserError(f"feature.{name} must be a torch nn.Module, not a {type(extractor).__name__}")
        for name, metric in self.metrics.items():
            if not isinstance(metric, Metric):
                raise UserError(f"metric.{name} must be a cdm_lightning Metric, not a {type(metric).__name__}")
            if name in COLUMNS:
                raise UserError(
                    f"metric.{name}: {name} is the name of a column of the results; give the metric another name"
                )
            named = {*metric.features, *metric.score_features, *metric.text_features}
            for missing in sorted(named - self.extractors.keys()):
                known = ", ".join(self.extractors) or "none"
                raise UserError(
                    f"metric.{name} needs the feature extractor feature.{missing}, which is missing; add it, or let metric.{name} "
                    f"use one of these extractors: {known}"
                )
            for feature in metric.text_features:
                if not callable(getattr(self.extractors[feature], "encode_texts", None)):
                    raise UserError(
                        f"metric.{name} needs features of prompts, but feature.{feature} cannot encode prompts; "
                        "use an extractor such as OpenClipFeatures"
                    )
        self.is_prepared = False

    @property
    def copies(self) -> Copies:
        """The numbers of prompts and of images per prompt that are enough for every metric.

        They are the largest `prompts` and the largest `images` in `Metric.copies` of all metrics. If no metric needs
        several images per prompt, the value is `Copies(0, 1)`.
        """
        wishes = [metric.copies for metric in self.metrics.values() if metric.copies is not None]
        return Copies(
            max((wish.prompts for wish in wishes), default=0), max((wish.images for wish in wishes), default=1)
        )

    @property
    def other_noise(self) -> bool:
        """Whether a metric also needs a second image of each prompt, from different noise.

        Only samplers of the student make such images.
        """
        return any(metric.other_noise for metric in self.metrics.values())

    @property
    def needed(self) -> list[str]:
        """The names of the extractors that at least one metric needs. `measure` runs these extractors."""
        return sorted({name for metric in self.metrics.values() for name in metric.features})

    def prepare(self, device: torch.device) -> None:
        """Move the extractors and the metrics' own networks to the device. The first call also runs each metric's `prepare`."""
        self.move(device)
        if not self.is_prepared:
            for metric in self.metrics.values():
                metric.prepare(self.extractors)
        self.is_prepared = True

    def move(self, device: torch.device | str) -> None:
        """Move the extractors and the metrics' own networks to the device."""
        parts = [
            *self.extractors.values(),
            *(part for metric in self.metrics.values() for part in vars(metric).values()),
        ]
        for part in parts:
            if isinstance(part, nn.Module):
                part.to(device)

    def check_prompts(self, prompts: Texts, count: int) -> None:
        """Raise `UserError` if a metric cannot measure images of one of the first `count` prompts."""
        for name, metric in self.metrics.items():
            if type(metric).check_prompt is Metric.check_prompt:
                continue
            for number in range(count):
                try:
                    metric.check_prompt(prompts[number])
                except (UserError, ValueError) as error:
                    raise UserError(
                        f"metric.{name} cannot measure images of prompt {number + 1} ({error}); remove metric.{name} or "
                        "use other prompts"
                    ) from error

    def facts(self) -> dict[str, float | str]:
        """Return the facts of all metrics (see `Metric.facts`) under keys METRIC_FACT, such as "fid_reference_images".

        A value that JSON cannot store is turned into text, so that it never prevents the results from being written.
        """
        return {
            f"{name}_{fact}": value if isinstance(value, int | float | str) else str(value)
            for name, metric in self.metrics.items()
            for fact, value in metric.facts().items()
        }

    def figures(self, samplers: Mapping[str, Collected]) -> dict[str, Row]:
        """Return a dictionary from each sampler's name to its figures.

        `samplers` holds the measurements of each sampler by name. A figure's key is the metric's name. If a metric has
        several figures for a sampler, their keys are METRIC_FIGURE, such as "fid_same_noise". A metric that has no
        figure for a sampler is missing in that sampler's figures.
        """
        rows: dict[str, Row] = {sampler: {} for sampler in samplers}
        for name, metric in self.metrics.items():
            measured = {sampler: collected.of(name) for sampler, collected in samplers.items()}
            for sampler, images in measured.items():
                rows[sampler] |= as_row(name, metric.figures(images, measured))
        return rows

    def measure(
        self,
        collected: Collected,
        images: Tensor,
        prompts: Sequence[str],
        indices: Sequence[int],
        texts: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the features and scores of a sampler's images (B, 3, H, W) in [0, 1] to `collected`.

        `prompts` are the B prompts of the images, and `indices` are the numbers of these prompts. `texts` maps the name
        of an extractor to its features of the prompts. Features that are needed and missing are computed and added to
        `texts`. Pass the same dictionary for other samplers' images of the same prompts, so that the prompts are
        encoded only once.
        """
        batch = ImageBatch(images, prompts, indices, self.extractors, {} if texts is None else texts)
        collected.prompts += prompts
        collected.indices += indices
        for name in self.needed:
            collected.features.setdefault(name, []).append(batch.features(name).cpu())
        for name, metric in self.metrics.items():
            scores = metric.score(batch)
            if (scores is None) != (name not in collected.scores) and len(collected.prompts) > len(prompts):
                raise UserError(
                    f"metric.{name}: its method `score` returned scores for some batches and None for others; it must always "
                    "return scores, or always None"
                )
            if scores is not None:
                if scores.numel() != len(prompts):
                    raise UserError(
                        f"metric.{name}: its method `score` returned a shape of {tuple(scores.shape)} for {len(prompts)} images; "
                        "it must return one score for each image"
                    )
                collected.scores.setdefault(name, []).append(scores.reshape(-1).float().cpu())

    def measure_other_noise(self, collected: Collected, images: Tensor) -> None:
        """Add the features of `images` (B, 3, H, W) in [0, 1] to `collected`.

        The images are made for the same prompts as the images that were passed to `measure`, but from different noise.
        """
        for name in sorted(
            {name for metric in self.metrics.values() if metric.other_noise for name in metric.features}
        ):
            collected.other_noise.setdefault(name, []).append(extract(self.extractors[name], images).cpu())

    def measure_copy(self, collected: Collected, images: Tensor) -> None:
        """Add the features of `images` (P, 3, H, W) in [0, 1] to `collected`.

        The images are one more image for each of the first P prompts, in the order of these prompts.
        """
        for name in self.needed:
            collected.copies.setdefault(name, []).append(extract(self.extractors[name], images).cpu())

    def scores(self, samplers: Mapping[str, Collected]) -> list[dict[str, str | int | float]]:
        """Return a row for each sampler and prompt, so that two runs can be compared prompt by prompt.

        `samplers` holds the measurements of each sampler by name. A row has the keys "sampler", "prompt_index" and
        "prompt". Under each metric's name it has the score of the image that the sampler made for the prompt. Metrics
        without scores are left out.
        """
        rows: list[dict[str, str | int | float]] = []
        for sampler, collected in samplers.items():
            measured = {name: collected.of(name) for name in self.metrics if name in collected.scores}
            columns = {name: images.scores.tolist() for name, images in measured.items() if images.scores is not None}
            for images in list(measured.values())[:1]:
                for i, (index, prompt) in enumerate(zip(images.indices, images.prompts, strict=True)):
                    scores = {name: values[i] for name, values in columns.items()}
                    rows.append({"sampler": sampler, "prompt_index": index, "prompt": prompt, **scores})
        return rows
