"""The interface of a metric, which computes figures from the images of one sampler.

A *sampler* is a way to make images: a network, a number of steps and a guidance scale. A *feature extractor* is a network that
maps images to vectors, such as Inception or CLIP. A metric asks for extractors by name, and each runs once on a batch, however
many metrics ask for it. Shapes: images (B, 3, H, W) in [0, 1], features (N, D), scores (N,). See docs/new-metric.md.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

Figures = float | Mapping[str, float] | None


@runtime_checkable
class TextEncoder(Protocol):
    """A feature extractor that can also encode prompts, such as `metrics.extractors.OpenClipFeatures`."""

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return features (B, D) of B prompts."""
        ...


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor) -> Tensor:
    """Return the features (B, D) of images (B, 3, H, W) in [0, 1]; the images are moved to the extractor's device."""
    state = next(itertools.chain(extractor.parameters(), extractor.buffers()), images)
    return extractor(images.to(state.device)).flatten(1)


@dataclass
class ImageBatch:
    """Images (B, 3, H, W) in [0, 1] of one sampler, their prompts, and the indices of these prompts in the prompt set.

    `extractors` are the feature extractors by name. Features are computed at the first request and then kept, so that
    metrics share them. `known_texts` holds the features (B, D) of the prompts by extractor; pass the same dictionary for other
    samplers' images of the same prompts, so that prompts are encoded once.
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
    """What is kept of the N images of one sampler, in the order of their prompts' indices, for one metric's `figures`.

    `features` are (N, D) by the name of their extractor, on the CPU. `scores` (N,) are what the metric's own `score` returned,
    or None if it does not score single images. `copies` are the features (P, M, D), by extractor, of M images for each of the
    first P prompts; it is empty unless a metric asks for several images per prompt and the evaluation makes them. `other_noise`
    are the features (N, D) of images of the same prompts from other noise, if a metric asks for them. `has_noise` is False for
    real images.
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
    """A metric's request for several images of one prompt: `images` for each of the first `prompts`, from different noise."""

    prompts: int
    images: int


class Metric:
    """The base class of metrics: a measure of the images of a sampler (a way to make images).

    A subclass overrides `score` if it measures single images, or `figures` if it measures all images together.
    `features` are the names of the feature extractors that it needs, `text_features` those that must also encode prompts.
    `copies` asks for several images per prompt (None: one). `sampler` names another sampler to compare with, if any; the
    metric has no figure if that sampler is not run. `other_noise` asks for each student's images from other noise in addition.
    """

    features: tuple[str, ...] = ()
    text_features: tuple[str, ...] = ()
    copies: Copies | None = None
    sampler: str | None = None
    other_noise: bool = False

    def prepare(self, extractors: Mapping[str, nn.Module]) -> None:
        """Do slow work once, before the first image, with all extractors by name; for example, measure reference images."""

    def check_prompt(self, prompt: str) -> None:
        """Raise UserError or ValueError for a prompt whose images cannot be judged; asked before training, for all prompts."""

    def score(self, batch: ImageBatch) -> Tensor | None:
        """Return the scores (B,) of the single images, or None if the metric does not score single images (the default)."""
        return None

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> Figures:
        """Return the figure of one sampler's images, or several figures by name, or None if there is no figure.

        By default this is the mean of the scores. `others` has the images of all samplers by name, including this one.
        """
        scores = measured.scores
        return None if scores is None or not len(scores) else float(scores.double().mean())

    def facts(self) -> Mapping[str, float | str]:
        """Return what a reader must know to compare the figures, by name, for example the number of reference images."""
        return {}
