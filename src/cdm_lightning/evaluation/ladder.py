"""An evaluation of teacher and student at several numbers of steps (a ladder), on the same prompts and noise.

A *sampler* is a way to make images: a network, a number of steps and a guidance scale (see `SamplerSpec`). Images are
generated in batches, and all metrics measure a batch before the next one is generated. Only features, scores and the
few images of the overview picture are kept. Shapes: images (N, 3, H, W) in [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.measuring import MakeImages, Maker, Measuring, NetworkMaker, SamplerResult, own_share
from cdm_lightning.evaluation.samplers import STEPS, SamplerSpec, device_of
from cdm_lightning.kinds import BatchSize, NotEmpty, Pictures, Seed, Several
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.terminal.progress import Progress

REAL = "real images"
OnImages = Callable[
    [str, Tensor, Sequence[int]], None
]  # (sampler's name, images (B, 3, H, W), indices of their prompts)
Row = dict[str, Any]


@dataclass(frozen=True)
class LadderResult:
    """The result of an evaluation: the figures of each sampler, and the data behind them.

    - `rows`: one row for each sampler, with its name ("sampler"), its figures, and "network_calls" and
      "seconds_per_image". The time includes decoding; it includes text encoding unless the encodings are kept in
      memory.
    - `scores`: one row for each sampler and prompt, with the scores of the image.
    - `images`: maps the name of each sampler to its images (P, 3, H, W) of the P `prompts`, for the overview picture.
    - `prompts`: the prompts of these images, the first P of the evaluation.
    - `settings`: everything that determines the figures.
    - `measured`: the measurements of each sampler. Pass them as `known` to a later `run` of the same evaluation, to
      reuse them.
    """

    rows: list[Row]
    scores: list[Row]
    images: dict[str, Tensor]
    prompts: list[str]
    settings: dict[str, Any]
    measured: dict[str, SamplerResult]


@dataclass(frozen=True)
class LadderEvaluation:
    """The settings of an evaluation: its samplers, prompts and noise.

    The first `count` of `prompts` are used, or all if `count` is None or larger. Images are generated in batches of
    `batch_size`. Image k = 0, 1, ... of a prompt starts from noise that is seeded with (`seed` + k, prompt index). Only
    image 0 is made, unless a metric needs more images of each prompt. The images of the first `shown` prompts are part
    of the result, for the overview picture.

    `real_images` is a function of (prompts, their indices, seed) that returns real images. If it is given, the result
    has an additional row with the figures of these images. A perfect sampler would reach these figures. Raises
    `UserError` for samplers of the same name and for numbers out of range.
    """

    OPTIONS: ClassVar[str] = "callbacks.ladder.evaluation."  # what messages put before the name of an option

    prompts: Sequence[str]
    samplers: Annotated[Sequence[SamplerSpec], NotEmpty] = STEPS
    real_images: MakeImages | None = None
    count: Several | None = 512
    batch_size: BatchSize = 64
    seed: Seed = 0
    shown: Pictures = 8

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.samplers]
        if len(set(names)) < len(names):
            raise UserError(
                f"{self.OPTIONS}samplers: two of the samplers {', '.join(names)} have the same name; rename one"
            )
        count = len(self.prompts) if self.count is None else min(self.count, len(self.prompts))
        object.__setattr__(self, "count", count)
        self._require_enough()

    def _require_enough(self) -> None:
        """Raise `UserError` for the first number that is too small."""
        if len(self.prompts) < 2:
            raise UserError(f"{self.OPTIONS}prompts: there are {len(self.prompts)} prompts; give at least 2")
        for name, value, least in (
            ("count", self.size, 2),
            ("batch_size", self.batch_size, 1),
            ("shown", self.shown, 1),
        ):
            if value < least:
                raise UserError(f"{self.OPTIONS}{name}={value} is too small; set it to at least {least}")
        if not self.samplers:
            raise UserError(f"{self.OPTIONS}samplers is empty; give at least one sampler")

    @property
    def size(self) -> int:
        """The number of prompts that are used."""
        return self.count or 0

    def check(self, metrics: MetricSuite) -> None:
        """Raise `UserError` if a metric cannot be computed for this evaluation.

        A metric may refuse a prompt, need a sampler that is not evaluated, or need more prompts than `size`.
        """
        metrics.check_prompts(self.prompts, self.size)
        if self.real_images is not None:
            _ = self.real_images([self.prompts[0], self.prompts[self.size - 1]], [0, self.size - 1], self.seed)
        names = [spec.name for spec in self.samplers]
        for name, metric in metrics.metrics.items():
            if metric.sampler is not None and metric.sampler not in names:
                raise UserError(
                    f"metric.{name}.sampler={metric.sampler!r} must be one of the evaluated samplers: {', '.join(names)}"
                )
            if metric.copies is not None and metric.copies.prompts > self.size:
                raise UserError(
                    f"metric.{name}.prompts={metric.copies.prompts} is more than the {self.count} prompts of the evaluation; reduce "
                    f"it, or raise {self.OPTIONS}count"
                )

    def run(
        self,
        metrics: MetricSuite,
        backbone: Backbone,
        networks: Mapping[str, nn.Module],
        compute_dtype: torch.dtype = torch.float32,
        silent: bool = False,
        known: Mapping[str, SamplerResult] | None = None,
    ) -> LadderResult:
        """Generate and measure the images of all samplers, and return the figures and measurements.

        `networks` holds the networks "student" and "teacher", which compute on their device in `compute_dtype`. With
        `silent`, no progress is shown. `known` maps names of samplers, such as the teacher's, to their measurements
        from an earlier run of the same evaluation. These samplers are not run again. Raises the errors of `check`.
        """
        self.check(metrics)
        measured = self.measure(metrics, backbone, networks, compute_dtype, silent, known)
        return self.result(metrics, measured, self.settings(metrics, backbone))

    def measure(
        self,
        metrics: MetricSuite,
        backbone: Backbone,
        networks: Mapping[str, nn.Module],
        compute_dtype: torch.dtype = torch.float32,
        silent: bool = False,
        known: Mapping[str, SamplerResult] | None = None,
        on_images: OnImages = lambda name, images, indices: None,
        on_measured: Callable[[str, SamplerResult], None] = lambda name, result: None,
    ) -> dict[str, SamplerResult]:
        """Return the measurements of all samplers by name. The first six arguments are those of `run`.

        `on_images` is called with the sampler's name, each batch of images, and the indices of their prompts. Some
        metrics need several images of each prompt; `on_images` gets only the first. `on_measured` is called with the
        sampler's name and its measurements as soon as they are complete.
        """
        maker = NetworkMaker(backbone, networks, self.batch_size, compute_dtype)
        device = device_of(next(iter(networks.values())))
        return self.measure_by(metrics, maker, device, silent, known, on_images, on_measured)

    def measure_by(
        self,
        metrics: MetricSuite,
        maker: Maker,
        device: torch.device,
        silent: bool = False,
        known: Mapping[str, SamplerResult] | None = None,
        on_images: OnImages = lambda name, images, indices: None,
        on_measured: Callable[[str, SamplerResult], None] = lambda name, result: None,
        is_shared: bool = False,
    ) -> dict[str, SamplerResult]:
        """Return the measurements of all samplers by name, whose images `maker` makes. Metrics compute on `device`.

        With `is_shared`, the processes share the work, and only the first gets the measurements. The other arguments are
        those of `measure`.
        """
        share = own_share(self.size, self.batch_size) if is_shared else 1.0
        progress = Progress("reading reference images", round(share * self._total_calls(metrics)), silent=silent)
        metrics.prepare(device)
        measuring = Measuring(metrics, self._prompts, self.batch_size, self.seed, self.shown, progress, is_shared)
        measured: dict[str, SamplerResult] = {}
        if self.real_images is not None:
            progress.describe("measuring real images")
            measured[REAL] = measuring.measure(self.real_images, 0)
            measured[REAL].collected.has_noise = False
        for spec in self.samplers:
            if known and spec.name in known:
                measured[spec.name] = known[spec.name]
                progress.advance(round(share * spec.network_calls * self._images(metrics)))
                continue
            progress.describe(f"evaluating {spec.name}")
            other = metrics.other_noise and spec.network == "student"  # the teacher's many steps would double the time
            other = other and spec.is_made_here
            see, make = partial(on_images, spec.name), partial(maker.images, spec)
            measured[spec.name] = measuring.measure(make, spec.network_calls, see, other, maker.take_counts)
            on_measured(spec.name, measured[spec.name])
        progress.close()
        return measured

    def result(
        self, metrics: MetricSuite, measured: Mapping[str, SamplerResult], settings: Mapping[str, Any]
    ) -> LadderResult:
        """Compute the figures of `measured`, the measurements by sampler name. `settings` are stored in the result."""
        collected = {name: result.collected for name, result in measured.items()}
        return LadderResult(
            rows=self._rows(metrics, measured),
            scores=metrics.scores(collected),
            images={name: result.shown for name, result in measured.items()},
            prompts=self._prompts[: self.shown],
            settings={**settings, **metrics.facts(), "threads": torch.get_num_threads()},
            measured=dict(measured),
        )

    @cached_property
    def _prompts(self) -> list[str]:
        return [self.prompts[i] for i in range(self.size)]

    def _images(self, metrics: MetricSuite) -> int:
        return self.size + metrics.copies.prompts * (metrics.copies.images - 1)

    def _total_calls(self, metrics: MetricSuite) -> int:
        students = sum(spec.network_calls for spec in self.samplers if spec.network == "student")
        other = self.size * students if metrics.other_noise else 0
        return self._images(metrics) * sum(spec.network_calls for spec in self.samplers) + other

    def _rows(self, metrics: MetricSuite, measured: Mapping[str, SamplerResult]) -> list[Row]:
        figures = metrics.figures({name: result.collected for name, result in measured.items()})
        rows: list[Row] = []
        for name, result in measured.items():
            spec = next((spec for spec in self.samplers if spec.name == name), None)
            costs = {"network_calls": 0} if spec is None else self._costs(spec, result)
            rows.append({"sampler": name, **figures[name], **costs})
        return rows

    def _costs(self, spec: SamplerSpec, result: SamplerResult) -> Row:
        """Return the network calls and the seconds per image, or {} for images that were made elsewhere."""
        if not spec.is_made_here:
            return {}
        calls = result.counts.get("network_calls", spec.network_calls * self.size) / self.size
        return {
            "network_calls": int(calls) if calls.is_integer() else calls,
            "seconds_per_image": result.seconds / self.size,
        }

    def settings(self, metrics: MetricSuite, backbone: Backbone) -> dict[str, Any]:
        """Return everything that determines the figures and is known before measuring. Equal settings give comparable figures."""
        return {
            "count": self.count,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "samplers": [str(spec) for spec in self.samplers],
            "metrics": list(metrics.metrics),
            "images_per_prompt": metrics.copies.images,
            "backbone": backbone.fingerprint,
        }
