"""The interface of a metric. A metric computes numbers (figures) from the images of one sampler.

A *sampler* is a way to make images: a network, a number of steps and a guidance scale. A *feature extractor* is a
network that maps images to vectors (features), such as Inception or CLIP. A metric names the extractors that it needs.
Each extractor runs once on each batch of images, even if several metrics need it. A metric that measures single images
gives each image a *score*. Shapes: images are (B, 3, H, W) in [0, 1]. For N images, the features are (N, D) and the
scores are (N,). See docs/new-metric.md.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

Figures = float | Mapping[str, float] | None


@runtime_checkable
class TextEncoder(Protocol):
    """A feature extractor that can also encode prompts, such as `metrics.extractors.OpenClipFeatures`."""

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the features (B, D) of B prompts."""
        ...


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor) -> Tensor:
    """Return the features (B, D) of images (B, 3, H, W) in [0, 1]. The images are moved to the extractor's device."""
    state = next(itertools.chain(extractor.parameters(), extractor.buffers()), images)
    return extractor(images.to(state.device)).flatten(1)


@dataclass
class ImageBatch:
    """A batch of images (B, 3, H, W) in [0, 1] of one sampler, with their prompts and the indices of these prompts.

    `extractors` are the feature extractors by name. Features are computed only when they are first requested, and
    metrics share them. `known_texts` maps an extractor's name to its features (B, D) of the prompts. The method
    `text_features` adds missing features to this dictionary. Pass the same dictionary for images of the same prompts by
    other samplers, so that prompts are encoded only once.
    """

    images: Tensor
    prompts: Sequence[str]
    indices: Sequence[int]
    extractors: Mapping[str, nn.Module] = field(default_factory=dict)
    known_texts: dict[str, Tensor] = field(default_factory=dict)
    _known: dict[str, Tensor] = field(default_factory=dict)

    def features(self, name: str) -> Tensor:
        """Return the features (B, D) of the images by the extractor `name`, on its device."""
        if name not in self._known:
            self._known[name] = extract(self.extractors[name], self.images)
        return self._known[name]

    def text_features(self, name: str) -> Tensor:
        """Return the features (B, D) of the prompts by the extractor `name`, which must be a `TextEncoder`."""
        if name not in self.known_texts:
            self.known_texts[name] = cast(TextEncoder, self.extractors[name]).encode_texts(self.prompts)
        return self.known_texts[name]


@dataclass(frozen=True)
class MeasuredImages:
    """The measurements of the N images of one sampler, sorted by prompt index.

    The method `figures` of a metric computes the metric's figures from these measurements. The keys of all dictionaries
    are names of extractors.

    - `features`: a dictionary of the features (N, D) of the images, on the CPU.
    - `scores`: the results (N,) of the metric's `score`, or None if the metric has no scores.
    - `copies`: a dictionary of the features (P, M, D) of M images for each of the first P prompts. It is empty if no
      metric needs several images per prompt.
    - `other_noise`: a dictionary of the features (N, D) of N more images of the same prompts, from different noise. It
      is empty if no metric needs them.
    - `has_noise`: True for generated images, which start from noise, and False for real images.
    """

    prompts: list[str]
    indices: list[int]
    features: Mapping[str, Tensor]
    scores: Tensor | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    other_noise: Mapping[str, Tensor] = field(default_factory=dict)
    has_noise: bool = True

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Copies:
    """A metric's request for `images` images of each of the first `prompts` prompts of the evaluation.

    The images of a prompt start from different noise.
    """

    prompts: int
    images: int


class Metric:
    """The base class of metrics. A metric measures the images of one sampler (a way to make images).

    A subclass overrides `score` if it measures single images, and `figures` if it measures all images together.

    - `features`: names of the feature extractors that the metric needs. The features of all images are kept.
    - `score_features`: names of the extractors that only `score` needs. Their features are not kept.
    - `text_features`: names of the extractors that must also encode prompts.
    - `copies`: a request for several images per prompt, or None for one image per prompt.
    - `sampler`: name of a sampler with which the metric compares all samplers, or None. An evaluation must run this
      sampler (see `LadderEvaluation.check`). If validation does not run it, the metric has no figure in validation.
    - `other_noise`: True if the metric also needs a second image of each prompt, from different noise. Only samplers of
      the student make such images.
    - `least_images`: the number of images of a sampler below which the metric has no figure.
    - `figures_without_interval`: the names of those figures that have no confidence interval, because resampling would
      change them, and `no_interval`: the reason, as part of a sentence. The name of a single figure is "".
    """

    features: tuple[str, ...] = ()
    score_features: tuple[str, ...] = ()
    text_features: tuple[str, ...] = ()
    copies: Copies | None = None
    sampler: str | None = None
    other_noise: bool = False
    least_images: int = 1
    figures_without_interval: Sequence[str] = ()
    no_interval: str = ""

    def prepare(self, extractors: Mapping[str, nn.Module]) -> None:
        """Do the metric's slow work, such as measuring reference images.

        This method is called once, before the first image is measured. `extractors` holds all feature extractors by
        name.
        """

    def has_figure(self, samplers: Collection[str], images: int) -> bool:
        """Return whether validation with these samplers and this number of prompts will have a figure of this metric."""
        return self.copies is None and images >= self.least_images and (not self.sampler or self.sampler in samplers)

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` or ValueError if images of `prompt` cannot be measured.

        This method is called for all prompts before training.
        """

    def check_features(self, features: Mapping[str, Tensor]) -> None:
        """Raise `UserError` if the metric cannot use the features of its extractors, such as features of a wrong width.

        This method is called before training. `features` maps an extractor's name to the features (B, D) of B made-up
        images.
        """

    def score(self, batch: ImageBatch) -> Tensor | None:
        """Return the scores (B,) of single images, or None (the default) if the metric has no scores."""
        return None

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> Figures:
        """Return the figure of the sampler whose measurements are `measured`, or None if there is none.

        If there are several figures, return a dict {name: figure}. By default the figure is the mean of the scores.
        `others` holds the measurements of all samplers by name, including the measured sampler.
        """
        scores = measured.scores
        return None if scores is None or not len(scores) else float(scores.double().mean())

    def work(self, images: int, width: int) -> float:
        """Return about how many multiplications and additions `figures` takes for a sampler's images.

        `width` is the number of dimensions of the features (0 if there are none). Confidence intervals compute the
        figures for hundreds of resamples, and fewer if these would take too long. By default, the result is the work
        of a Fréchet distance: covariances and eigenvalues of features, or a mean of scores.
        """
        return 2.0 * images * width**2 + 60.0 * width**3 if self.features else float(images)

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning about the metric's figures for `measured`, such as that the images are too few.

        The default is None, which means no warning.
        """
        return None

    def facts(self) -> Mapping[str, float | str]:
        """Return facts on which the figures depend, such as the number of reference images, as a dict {name: value}."""
        return {}
