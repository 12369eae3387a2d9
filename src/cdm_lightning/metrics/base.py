"""What a metric is: it looks at the images of one sampler and gives figures.

Shapes: images (B, 3, H, W) in [0, 1], features (N, D), scores (N,). A metric asks for feature extractors by name; each of
them runs once on a batch, whatever number of metrics asks for it. See docs/new-metric.md.
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
    """An extractor that also has features of prompts, such as `metrics.extractors.OpenClipFeatures`."""

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, D) of prompts."""
        ...


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor) -> Tensor:
    """Features (B, D) of images (B, 3, H, W) in [0, 1], on the extractor's device."""
    state = next(itertools.chain(extractor.parameters(), extractor.buffers()), images)
    return extractor(images.to(state.device)).flatten(1)


@dataclass
class ImageBatch:
    """Images (B, 3, H, W) in [0, 1] of one sampler, their prompts, and the numbers of these prompts in the prompt set.

    `extractors` are the feature extractors by name. Features are computed at the first request and then kept, so that
    metrics share them; `known_texts` keeps those of prompts for the other samplers of the same batch.
    """

    images: Tensor
    prompts: Sequence[str]
    indices: Sequence[int]
    extractors: Mapping[str, nn.Module] = field(default_factory=dict)
    known_texts: dict[str, Tensor] = field(default_factory=dict)
    _known: dict[str, Tensor] = field(default_factory=dict)

    def features(self, name: str) -> Tensor:
        """Features (B, D) of the images by the extractor of that name, on its device."""
        if name not in self._known:
            self._known[name] = extract(self.extractors[name], self.images)
        return self._known[name]

    def text_features(self, name: str) -> Tensor:
        """Features (B, D) of the prompts by the extractor of that name, which must be a `TextEncoder`."""
        if name not in self.known_texts:
            self.known_texts[name] = cast(TextEncoder, self.extractors[name]).encode_texts(self.prompts)
        return self.known_texts[name]


@dataclass(frozen=True)
class MeasuredImages:
    """What is kept of the N images of one sampler, in the order of their prompts' numbers.

    `features` are (N, D) by the name of their extractor, on the CPU. `scores` are (N,), those of the metric that is asked
    for its figures, or None if it scores no single images. `copies` are the features (P, M, D) of M images for each of
    the first P prompts; there are none unless the metric asks for copies and the evaluation makes them.
    """

    prompts: list[str]
    indices: list[int]
    features: Mapping[str, Tensor]
    scores: Tensor | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Copies:
    """The wish for `images` images of each of the first `prompts` prompts, which start from different noise."""

    prompts: int
    images: int


class Metric:
    """A quality of a sampler's images. A subclass overrides `score`, for a quality of one image, or `figures`, for one of all.

    `features` are the names of the extractors it needs, `copies` asks for several images a prompt, and `sampler` names
    another sampler that it compares with (where that one is not run, the metric gives no figure).
    """

    features: tuple[str, ...] = ()
    copies: Copies | None = None
    sampler: str | None = None

    def prepare(self, extractors: Mapping[str, nn.Module]) -> None:
        """Do once, before the first image, what takes long: for example the features of reference images."""

    def score(self, batch: ImageBatch) -> Tensor | None:
        """Scores (B,) of the single images, which are kept by prompt; None where only all images together have a figure."""
        return None

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> Figures:
        """The figure of one sampler's images, figures by name, or None if there is none; by default the mean score.

        `others` are the images of all samplers by name, this one's included.
        """
        scores = measured.scores
        return None if scores is None or not len(scores) else float(scores.double().mean())

    def facts(self) -> Mapping[str, float | str]:
        """What a reader of the figures must know, for example the number of reference images."""
        return {}
