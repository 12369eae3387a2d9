"""Generate and measure the images of one sampler, batch by batch. Several processes can share the batches.

A *sampler* is a way to make images. A batch holds the same prompts for any number of processes, and each batch is made by
one process. Therefore the images and figures do not depend on the number of processes, bit for bit. Only features,
scores, the few images of the overview picture, and small copies of the first images are kept. Shapes: images (B, 3, H, W) in [0, 1].
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.distributed.ranks import rank, to_first, world_size
from cdm_lightning.evaluation.samplers import SamplerSpec, generate
from cdm_lightning.evaluation.thumbnails import MOST, thumbnail
from cdm_lightning.metrics.suite import Collected, MetricSuite
from cdm_lightning.terminal.progress import Progress

OTHER_NOISE = 1 << 20  # added to the seed: images from other noise than those that all samplers share
MakeImages = Callable[[Sequence[str], Sequence[int], int], Tensor]  # (prompts, indices, seed) -> (B, 3, H, W)
See = Callable[[Tensor, Sequence[int]], None]  # (images (B, 3, H, W), indices of their prompts)


class Maker(Protocol):
    """The images of one model, whose networks are in memory."""

    def images(self, spec: SamplerSpec, prompts: Sequence[str], indices: Sequence[int], seed: int) -> Tensor:
        """Return the images (B, 3, H, W) in [0, 1] of B prompts, on the CPU. They depend only on the arguments."""
        ...

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call, such as {"network_calls": 8}, summed over the images."""
        ...


@dataclass(frozen=True)
class NetworkMaker:
    """The images of networks of a known model family, made by `samplers.generate` in batches of `batch_size`."""

    backbone: Backbone
    networks: Mapping[str, nn.Module]
    batch_size: int
    dtype: torch.dtype

    def images(self, spec: SamplerSpec, prompts: Sequence[str], indices: Sequence[int], seed: int) -> Tensor:
        """Return the images (B, 3, H, W) in [0, 1] of B prompts. The noise depends only on `seed` and `indices`."""
        network = self.networks[spec.network]
        return generate(self.backbone, network, spec, prompts, indices, seed, self.batch_size, self.dtype)

    def take_counts(self) -> dict[str, float]:
        """Return {}: the network calls of these samplers are known (`SamplerSpec.network_calls`)."""
        return {}


@dataclass(frozen=True)
class EightBits:
    """The images of another `Maker`, rounded to 8 bits. They are exactly those that a PNG file can hold."""

    maker: Maker

    def images(self, spec: SamplerSpec, prompts: Sequence[str], indices: Sequence[int], seed: int) -> Tensor:
        """Return the images (B, 3, H, W) of the other maker; each value is a multiple of 1/255."""
        images = self.maker.images(spec, prompts, indices, seed)
        return (images * 255).round().clamp(0, 255) / 255  # NaN stays NaN

    def take_counts(self) -> dict[str, float]:
        """Return what the other maker has counted."""
        return self.maker.take_counts()


@dataclass
class SamplerResult:
    """The measurements of one sampler: features and scores of its images, the generation time in seconds, and some images.

    `shown` are the images (P, 3, H, W) of the first P prompts, for the overview picture. `counts` is what its `Maker`
    counted, summed over the images. `thumbnails` are small copies of the images of the first prompts (`thumbnails.MOST`),
    as files; there are none in measurements that an older version has stored.
    """

    shown: Tensor
    collected: Collected = field(default_factory=Collected)
    seconds: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    thumbnails: list[bytes] = field(default_factory=list)


@dataclass
class _Share:
    """What one process has measured of a sampler. `shown` and `thumbnails` have an entry for each of its batches."""

    shown: list[Tensor] = field(default_factory=list)
    collected: Collected = field(default_factory=Collected)
    seconds: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    thumbnails: list[list[bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Measuring:
    """Generates and measures images of N prompts in batches of `batch_size`.

    The images of the first `shown` prompts are kept for the overview picture. With `is_shared`, the processes share the
    batches, and only the first process gets the measurements of all. `texts` keeps the prompts' features for other
    samplers.
    """

    metrics: MetricSuite
    prompts: Sequence[str]
    batch_size: int
    seed: int
    shown: int
    progress: Progress
    is_shared: bool = False
    texts: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def measure(
        self,
        make: MakeImages,
        calls: int,
        see: See = lambda images, indices: None,
        has_other_noise: bool = False,
        take_counts: Callable[[], dict[str, float]] = dict,
    ) -> SamplerResult:
        """Generate and measure one sampler's images.

        `calls` is the number of network calls for an image. `see` is called with each batch of images and the indices
        of their prompts. With `has_other_noise`, one more image is generated for each prompt, from noise that no other
        image uses, and its features are kept. `take_counts` is that of the `Maker`.
        """
        share = _Share()
        nothing = make(self.prompts[:1], [0], self.seed)[:0].clone()  # not timed: it includes one-time setup
        take_counts()
        for start, prompts, indices in self._batches():
            began = time.perf_counter()
            images = make(prompts, indices, self.seed)
            share.seconds += time.perf_counter() - began
            see(images, indices)
            self.metrics.measure(share.collected, images, prompts, indices, self.texts.setdefault(start, {}))
            if start < self.shown:  # a copy: a view would keep the whole batch in memory
                share.shown.append(images[: self.shown - start].clone())
            if start < MOST:
                share.thumbnails.append([thumbnail(image) for image in images[: MOST - start]])
            self.progress.advance(len(prompts) * calls)
        share.counts = take_counts()
        prompts = self.prompts[: self.metrics.copies.prompts]
        for copy in range(1, self.metrics.copies.images if prompts else 1):
            if self._is_mine(copy - 1):
                self.metrics.measure_copy(share.collected, make(prompts, range(len(prompts)), self.seed + copy))
                self.progress.advance(len(prompts) * calls)
        if has_other_noise:
            for _, prompts, indices in self._batches():
                images = make(prompts, indices, self.seed + OTHER_NOISE)
                self.metrics.measure_other_noise(share.collected, images)
                self.progress.advance(len(prompts) * calls)
        shares = to_first(share) if self.is_shared else [share]
        return joined(shares or [share], nothing, self.batch_size)

    def _batches(self) -> Iterator[tuple[int, Sequence[str], range]]:
        """Yield (number of the first prompt, prompts, their indices) of each batch that this process makes."""
        for number, start in enumerate(range(0, len(self.prompts), self.batch_size)):
            prompts = self.prompts[start : start + self.batch_size]
            if self._is_mine(number):
                yield start, prompts, range(start, start + len(prompts))

    def _is_mine(self, number: int) -> bool:
        return not self.is_shared or number % world_size() == rank()


def own_share(size: int, batch_size: int) -> float:
    """Return which part of the images of `size` prompts this process makes, if the processes share the batches."""
    starts = range(rank() * batch_size, size, world_size() * batch_size)
    return sum(min(batch_size, size - start) for start in starts) / size


def joined(shares: Sequence[_Share], nothing: Tensor, batch_size: int) -> SamplerResult:
    """Join what the processes have measured, in the order of the batches. Batch k is in share k modulo their number.

    The shares lose their features and scores. `nothing` are 0 images, for a share without images of the first prompts.
    """
    found = [share.collected for share in shares]
    collected = Collected(has_noise=found[0].has_noise)
    for kind in ("prompts", "indices"):
        flat = [_chunks(getattr(one, kind), batch_size) for one in found]
        setattr(collected, kind, [value for chunk in _interleaved(flat) for value in chunk])
    for kind in ("features", "scores", "copies", "other_noise"):
        for name in dict.fromkeys(name for one in found for name in getattr(one, kind)):
            batches = _interleaved(
                [getattr(one, kind).pop(name, []) for one in found]
            )  # not kept: they fill the memory
            getattr(collected, kind)[name] = batches if kind == "copies" else [torch.cat(batches)]
    shown = torch.cat([nothing, *_interleaved([share.shown for share in shares])])
    counts = {name: sum(share.counts.get(name, 0) for share in shares) for share in shares for name in share.counts}
    small = [content for batch in _interleaved([share.thumbnails for share in shares]) for content in batch]
    return SamplerResult(shown, collected, sum(share.seconds for share in shares), counts, small)


def _chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the first entry of each part, then the second of each, and so on; parts may have one entry less."""
    absent = object()
    return [value for row in zip_longest(*parts, fillvalue=absent) for value in row if value is not absent]
