"""Measure several models at several numbers of steps, guidance scales and shifts, on the same prompts and noise.

A *sampler* is one combination: a model, a number of steps, a guidance scale and a shift. One model is in memory at a time.
"""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.intervals import Comparison, Interval, compare
from cdm_lightning.evaluation.ladder import LadderEvaluation, LadderResult, Row, SamplerResult
from cdm_lightning.evaluation.report import markdown_table, save_report, table
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.evaluation.store import ImageFiles, file_name, key_of, load_measured, save_measured
from cdm_lightning.files import write_text
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.terminal.progress import Progress

MEASURED, IMAGES, INTERVALS, DIFFERENCES = "measured", "images", "intervals.json", "differences.md"


class Opened(Protocol):
    """A model whose weights are not in memory yet, such as `run.models.OpenedModel`."""

    @property
    def backbone(self) -> Backbone:
        """The model family's adapter."""
        ...

    @property
    def steps(self) -> int:
        """The number of steps that the model is made for."""
        ...

    @property
    def build_network(self) -> Callable[[], nn.Module]:
        """The function that returns the network with its weights."""
        ...

    def digest(self) -> str:
        """Return a hash of the weights."""
        ...


@dataclass(frozen=True)
class ModelGrid:
    """A model and the combinations of steps, guidance scales and shifts at which it is measured.

    - `model`: the path or hub id that the user gave.
    - `opened`: the opened model.
    - `name`: the model's name in the results. With "" this is the last part of `model`.
    - `steps`: numbers of steps. With () this is the number that the model is made for.
    - `guidance`: guidance scales. A scale of 1 means no guidance.
    - `shift`: factors of the timestep shift. None means the model family's own shift.
    """

    model: str
    opened: Opened
    name: str = ""
    steps: tuple[int, ...] = ()
    guidance: tuple[float, ...] = (1.0,)
    shift: tuple[float | None, ...] = (None,)

    @property
    def samplers(self) -> list[SamplerSpec]:
        """The combinations, each with a name such as "teacher 4 steps, guidance 1.5, shift 3"."""
        made = []
        for nfe, guidance, shift in product(self.steps or (self.opened.steps,), self.guidance, self.shift):
            name = f"{self.name or Path(self.model).name} {nfe} {'step' if nfe == 1 else 'steps'}"
            name += "" if guidance == 1 else f", guidance {guidance:g}"
            name += "" if shift is None else f", shift {shift:g}"
            made.append(SamplerSpec(name, "student", nfe, guidance, shift=shift))
        return made


class GridEvaluation(LadderEvaluation):
    """The evaluation of the command `evaluate`, whose messages name the options of its command line."""

    OPTIONS = "--"


@dataclass(frozen=True)
class Evaluated:
    """The results of an evaluation: the figures (`ladder`), their intervals, and the folder with the files."""

    ladder: LadderResult
    comparison: Comparison
    baseline: str
    folder: Path
    cautions: list[str] = field(default_factory=list)

    @property
    def differences(self) -> list[Row]:
        """A row for each sampler except the baseline, with the differences between its figures and the baseline's.

        Each difference is a text with the 95 % interval. A star marks an interval that does not contain 0.
        """
        return [
            {"sampler": sampler, **{figure: _starred(found) for figure, found in row.items()}}
            for sampler, row in self.comparison.differences.items()
        ]

    def text(self) -> str:
        """Return the results as text for a terminal."""
        lines = [table(self.ladder.rows), ""]
        if any(len(row) > 1 for row in self.differences):
            lines += [f"differences to {self.baseline}, with 95 % intervals (* does not contain 0)"]
            lines += [table(self.differences), ""]
        lines += [f"note: {caution}" for caution in self.cautions]
        return "\n".join([*lines, f"results: {self.folder}"])


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of several models, which are loaded one after another.

    `ladder` has the samplers, prompts and noise. `output` is the folder for the results. The networks compute on
    `device` in `dtype`. `settings` is everything else that determines the measurements, such as the configuration of
    `metrics`. With `save_images`, all images are written as PNG files.
    """

    ladder: LadderEvaluation
    metrics: MetricSuite
    output: Path
    device: torch.device
    dtype: torch.dtype
    settings: Mapping[str, Any]
    save_images: bool = False

    def run(self, models: Sequence[ModelGrid], baseline: str, resamples: int) -> Evaluated:
        """Measure all samplers of `models`, write the results, and return them.

        `baseline` is the name of the sampler to which the others are compared, and `resamples` the number of resamples of
        the prompts. Samplers that an earlier call has measured into the same folder are not measured again.
        """
        for model in models:
            for spec in model.samplers:
                spec.check(model.opened.backbone)
        weights = {model.name or model.model: model.opened.digest() for model in models}
        measured: dict[str, SamplerResult] = {}
        for model in models:
            measured |= self._measure(model)
        self.metrics.prepare(self.device)
        settings = {**self._settings(), "models": weights, "baseline": baseline, "resamples": resamples}
        result = self.ladder.result(self.metrics, measured, settings)
        collected = {name: found.collected for name, found in measured.items()}
        progress = Progress("resampling the prompts", len(self.metrics.metrics))
        comparison = compare(
            self.metrics, collected, baseline, resamples, self.ladder.seed, lambda name: progress.advance()
        )
        progress.close()
        found = Evaluated(result, comparison, baseline, self.output, self._cautions(comparison, measured))
        self._write(found)
        return found

    def _measure(self, model: ModelGrid) -> dict[str, SamplerResult]:
        """Return the measurements of one model's samplers; its network is in memory only meanwhile."""
        prompts = [self.ladder.prompts[i] for i in range(self.ladder.size)]
        keys = {spec.name: self._key(model, spec, prompts) for spec in model.samplers}
        paths = {name: self.output / MEASURED / f"{file_name(name)}.safetensors" for name in keys}
        known = {name: load_measured(path, keys[name], prompts) for name, path in paths.items()}
        known = {name: found for name, found in known.items() if found is not None}
        if len(known) == len(keys):
            return known
        files = ImageFiles(self.output / IMAGES, prompts, self.ladder.seed)

        def keep(name: str, result: SamplerResult) -> None:
            save_measured(paths[name], result, keys[name])
            if self.save_images:
                files.finish(name)

        model.opened.backbone.setup(self.device)
        network = model.opened.build_network().to(self.device, self.dtype).eval().requires_grad_(False)
        try:
            return _only(self.ladder, model).measure(
                self.metrics,
                model.opened.backbone,
                {"student": network},
                self.dtype,
                known=known,
                on_measured=keep,
                on_images=files.add if self.save_images else _ignore,
            )
        finally:
            del network
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _settings(self) -> dict[str, Any]:
        return {
            "count": self.ladder.count,
            "seed": self.ladder.seed,
            "batch_size": self.ladder.batch_size,
            "samplers": [str(spec) for spec in self.ladder.samplers],
            "metrics": list(self.metrics.metrics),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _key(self, model: ModelGrid, spec: SamplerSpec, prompts: Sequence[str]) -> str:
        own = {"seed": self.ladder.seed, "dtype": str(self.dtype), "images": self.save_images, "prompts": prompts}
        return key_of({**self.settings, **own, "weights": model.opened.digest(), "sampler": str(spec)})

    def _cautions(self, comparison: Comparison, measured: Mapping[str, SamplerResult]) -> list[str]:
        """Return what a reader of the figures must know, such as metrics that have too few images."""
        cautions = [
            f"metric.{name} has no intervals, because its features are wide and each resample would take seconds"
            for name in comparison.left_out
        ]
        first = next(iter(measured.values())).collected
        for name, metric in self.metrics.metrics.items():
            caution = metric.caution(first.of(name))
            cautions += [f"metric.{name}: {caution}"] if caution else []
        return cautions

    def _write(self, found: Evaluated) -> None:
        """Write table, figures, scores and picture (`report.save_report`), and the intervals."""
        save_report(found.ladder, self.output)
        content = {
            "figures": _as_numbers(found.comparison.figures),
            "differences": _as_numbers(found.comparison.differences),
            "baseline": found.baseline,
            "level": 0.95,
            "prompts": self.ladder.count,
        }
        write_text(self.output / INTERVALS, json.dumps(content, indent=2) + "\n")
        heading = f"Differences to {found.baseline}, with 95 % intervals. A star marks an interval without 0.\n\n"
        write_text(self.output / DIFFERENCES, heading + markdown_table(found.differences))


def _only(ladder: LadderEvaluation, model: ModelGrid) -> LadderEvaluation:
    """Return the evaluation of the samplers of `model` alone."""
    return replace(ladder, samplers=model.samplers)


def _ignore(sampler: str, images: torch.Tensor, indices: Sequence[int]) -> None:
    """Do nothing with a batch of images."""


def _starred(found: Interval) -> str:
    return f"{found}{'' if found.contains(0) else ' *'}"


def _as_numbers(rows: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
    return {
        sampler: {figure: [found.value, found.low, found.high] for figure, found in row.items()}
        for sampler, row in rows.items()
    }


def require_distinct(samplers: Sequence[SamplerSpec]) -> None:
    """Raise `UserError` if two samplers have the same name."""
    names = [spec.name for spec in samplers]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two samplers have the name {name!r}; give one of the models another name with name=NAME")
