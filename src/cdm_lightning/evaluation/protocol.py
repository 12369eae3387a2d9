"""Measure several models at several numbers of steps, guidance scales and shifts, on the same prompts and noise.

A *sampler* is one combination: a model, a number of steps, a guidance scale and a shift. One model is in memory at a time.
"""

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.distributed.ranks import from_first, rank
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.given_scores import GivenScores
from cdm_lightning.evaluation.grid import ModelGrid
from cdm_lightning.evaluation.intervals import Comparison, Interval, compare
from cdm_lightning.evaluation.ladder import LadderEvaluation, LadderResult, Row, SamplerResult
from cdm_lightning.evaluation.measuring import EightBits
from cdm_lightning.evaluation.page import PAGE
from cdm_lightning.evaluation.report import METRICS, PICTURE, SCORES, TABLE, markdown_table, save_report, table
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.evaluation.store import ImageFiles, file_name, key_of, load_measured, save_measured
from cdm_lightning.files import require_replaceable, write_text
from cdm_lightning.metrics.rehearsal import rehearse
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.terminal.progress import Progress

FEW_PROMPTS, FEW_RESAMPLES = 30, 100
MEASURED, IMAGES, INTERVALS, DIFFERENCES = "measured", "images", "intervals.json", "differences.md"


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

    def text(self, width: int | None = None) -> str:
        """Return the results as text for a terminal of `width` characters, or of any width."""
        lines = [f"{self.ladder.settings['count']} images of each sampler", table(self.ladder.rows, width), ""]
        if any(len(row) > 1 for row in self.differences):
            lines += [f"differences to {self.baseline}, with 95 % intervals (* does not contain 0)"]
            lines += [table(self.differences, width), ""]
        lines += [f"note: {caution}" for caution in self.cautions]
        return "\n".join([*lines, f"results: {self.folder}", f"report:  {self.folder / PAGE}"])


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of several models, which are loaded one after another.

    `ladder` has the samplers, prompts and noise. `output` is the folder for the results. The networks compute on
    `device` in `dtype`. `settings` is everything else that determines the measurements, such as the configuration of
    `metrics`. With `save_images`, all images are written as PNG files. `scores` are scores of the images that another
    program has computed.
    """

    ladder: LadderEvaluation
    metrics: MetricSuite
    output: Path
    device: torch.device
    dtype: torch.dtype
    settings: Mapping[str, Any]
    save_images: bool = False
    scores: GivenScores = field(default_factory=GivenScores)

    def run(self, models: Sequence[ModelGrid], baseline: str, resamples: int) -> Evaluated:
        """Measure all samplers of `models`, write the results, and return them.

        `baseline` is the name of the sampler to which the others are compared, and `resamples` the number of resamples of
        the prompts. Samplers that an earlier call has measured into the same folder are not measured again.
        """
        for model in models:
            model.opened.check(model.samplers, self._prompts, self.metrics)
        sizes = dict.fromkeys(size for model in models for size in model.opened.sizes(model.samplers))
        rehearse(self.metrics, sizes, self._prompts[:2], self.device)
        weights = {model.title: model.opened.digest() for model in models}
        self.scores.require_images(
            {spec.name: self._mark(weights[model.title], spec) for model in models for spec in model.samplers}
        )
        measured: dict[str, SamplerResult] = {}
        for model in models:
            measured |= self._measure(model, weights[model.title])
        if not rank():
            found = self._results(models, measured, weights, baseline, resamples)
            _ = from_first(replace(found, ladder=replace(found.ladder, measured={}, scores=[])))
            return found
        return from_first(None)  # the first process needs seconds or minutes for the results

    def _results(
        self,
        models: Sequence[ModelGrid],
        measured: Mapping[str, SamplerResult],
        weights: Mapping[str, str],
        baseline: str,
        resamples: int,
    ) -> Evaluated:
        """Compute the figures and intervals, and write them. `weights` are the hashes of the models' weights."""
        self.metrics.prepare(self.device)
        paths = {model.title: model.model for model in models}
        settings = {**self._settings(), "paths": paths, "models": weights, "baseline": baseline, "resamples": resamples}
        settings["notes"] = {model.title: list(model.opened.notes) for model in models if model.opened.notes}
        collected = {name: found.collected for name, found in measured.items()}
        metrics = self.scores.join(self.metrics, collected)
        if self.scores.facts:
            settings |= {"metrics": list(metrics.metrics), "scores": self.scores.facts}
        result = self.ladder.result(metrics, measured, settings)
        progress = Progress("resampling the prompts", len(metrics.metrics))
        comparison = compare(metrics, collected, baseline, resamples, self.ladder.seed, lambda name: progress.advance())
        progress.close()
        found = Evaluated(
            result, comparison, baseline, self.output, self._cautions(comparison, measured, models, resamples)
        )
        self._write(found)
        return found

    def _measure(self, model: ModelGrid, weights: str) -> dict[str, SamplerResult]:
        """Return the measurements of one model's samplers; the model is in memory only meanwhile.

        `weights` is the hash of its weights.
        """
        prompts = self._prompts
        files = ImageFiles(self.output / IMAGES, prompts, self.ladder.seed)
        keys = {spec.name: self._key(weights, spec) for spec in model.samplers}
        marks = {spec.name: self._mark(weights, spec) for spec in model.samplers}
        paths = {name: self.output / MEASURED / f"{file_name(name)}.safetensors" for name in keys}
        known = self._known(files, keys, paths)
        if len(known) == len(keys):
            return known

        def keep(name: str, result: SamplerResult) -> None:
            result.collected.has_noise = model.opened.shares_noise
            if rank():
                return
            if self.save_images:
                files.finish(name, marks[name])
            save_measured(paths[name], result, keys[name])

        opened = model.opened if model.opened.steps is None else model.open_model()
        maker = opened.maker(self.device, self.dtype, self.ladder.batch_size)
        try:
            return _only(self.ladder, model).measure_by(
                self.metrics,
                EightBits(maker) if self.save_images else maker,
                self.device,
                known=known,
                on_measured=keep,
                on_images=files.add if self.save_images else _ignore,
                silent=rank() > 0,
                is_shared=True,
            )
        finally:
            del maker, opened
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _known(self, files: ImageFiles, keys: Mapping[str, str], paths: Mapping[str, Path]) -> dict[str, SamplerResult]:
        """Return the complete measurements of an earlier call. All processes agree, but only the first has the contents."""
        known = {}
        for name, key in keys.items() if not rank() else ():
            found = load_measured(paths[name], key, self._prompts, self.metrics.needed)
            if found is not None and (not self.save_images or files.is_complete(name)):
                known[name] = found
        return {name: known.get(name) or SamplerResult(torch.empty(0)) for name in from_first(list(known))}

    @property
    def _prompts(self) -> list[str]:
        return [self.ladder.prompts[i] for i in range(self.ladder.size)]

    def _settings(self) -> dict[str, Any]:
        return {
            **self.settings,
            "prompts": key_of({"prompts": self._prompts}),
            "count": self.ladder.count,
            "seed": self.ladder.seed,
            "batch_size": self.ladder.batch_size,
            "samplers": [str(spec) for spec in self.ladder.samplers],
            "metrics": list(self.metrics.metrics),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _mark(self, weights: str, spec: SamplerSpec) -> str:
        """Return a hash of everything that determines the images of a sampler, but not of what is measured of them."""
        own = {"seed": self.ladder.seed, "dtype": str(self.dtype), "prompts": self._prompts}
        return key_of({**own, "weights": weights, "sampler": str(spec)})

    def _key(self, weights: str, spec: SamplerSpec) -> str:
        own: dict[str, Any] = {"seed": self.ladder.seed, "dtype": str(self.dtype), "prompts": self._prompts}
        own |= {"images": "of 8 bits"} if self.save_images else {}
        return key_of({**self.settings, **own, "weights": weights, "sampler": str(spec)})

    def _cautions(
        self,
        comparison: Comparison,
        measured: Mapping[str, SamplerResult],
        models: Sequence[ModelGrid],
        resamples: int,
    ) -> list[str]:
        """Return what a reader of the figures must know, such as metrics that have too few images."""
        cautions = [f"{model.title}: {note}" for model in models for note in model.opened.notes]
        cautions += [
            f"{name}: the safety checker replaced {found.counts['flagged']:.0f} of {self.ladder.size} images by black ones"
            for name, found in measured.items()
            if found.counts.get("flagged")
        ]
        if resamples < FEW_RESAMPLES:
            cautions += [
                f"{resamples} resamples are few: the ends of the intervals are rough; use {FEW_RESAMPLES} or more"
            ]
        cautions += [
            f"metric.{name} has no intervals, because its features are wide or its images many, and each resample would take seconds"
            for name in comparison.left_out
        ]
        cautions += [
            f"metric.{name} has {count} resamples instead of {resamples}, because more would take more than half an hour"
            for name, count in comparison.reduced.items()
        ]
        if self.ladder.size < FEW_PROMPTS:
            cautions += [f"{self.ladder.size} prompts are few: the intervals are too narrow; use {FEW_PROMPTS} or more"]
        cautions += comparison.missing
        first = next(iter(measured.values())).collected
        for name, metric in self.metrics.metrics.items():
            caution = metric.caution(first.of(name))
            cautions += [f"metric.{name}: {caution}"] if caution else []
        return cautions

    def _write(self, found: Evaluated) -> None:
        """Write table, figures, scores and picture (`report.save_report`), and the intervals."""
        for name in (INTERVALS, DIFFERENCES):  # of an earlier evaluation, so that files of two are never mixed
            require_replaceable(self.output / name).unlink(missing_ok=True)
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
        if lost := [name for name in (METRICS, TABLE, SCORES, PICTURE) if not (self.output / name).is_file()]:
            raise UserError(
                f"{self.output / lost[0]} could not be written; make room for it, and run the same command again, which "
                "measures nothing again"
            )


def _only(ladder: LadderEvaluation, model: ModelGrid) -> LadderEvaluation:
    """Return the evaluation of the samplers of `model` alone."""
    return replace(ladder, samplers=model.samplers)


def _ignore(sampler: str, images: torch.Tensor, indices: Sequence[int]) -> None:
    """Do nothing with a batch of images."""


def _starred(found: Interval) -> str:
    return f"{found}{' *' if found.low > 0 or found.high < 0 else ''}"


def _as_numbers(rows: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
    return {
        sampler: {
            figure: [number if math.isfinite(number) else None for number in (found.value, found.low, found.high)]
            for figure, found in row.items()
        }
        for sampler, row in rows.items()
    }
