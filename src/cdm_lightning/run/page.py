"""The page report.html of an evaluation and of a run: what was run, with which versions and weights, and the curves of training."""

import csv
import datetime
import io
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.config.secrets import masked, masked_command, masked_text
from cdm_lightning.distributed.ranks import rank
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.grid import ModelGrid
from cdm_lightning.evaluation.intervals import compare
from cdm_lightning.evaluation.ladder import LadderEvaluation, LadderResult
from cdm_lightning.evaluation.page import PAGE, Page, Setting, remove_page, save_page
from cdm_lightning.evaluation.protocol import FEW_PROMPTS, Evaluated
from cdm_lightning.files import first_line, read_text
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.run.folder import Run, is_run
from cdm_lightning.run.models import digest_of
from cdm_lightning.run.record import PACKAGES, commit, hardware, package_version

LOG = "metrics.csv"
MOST_LOG = 1 << 25  # bytes of the log; longer ones have no curves in the page
FIRST_CURVES = ("/loss", "val/", "/grad_norm", "/learning_rate")  # of a run that logs more than the page shows
RESAMPLES, MOST_WORK = 100, 3e12  # at the end of training: about a minute a metric, see `intervals.affordable`
NOT_CURVES = ("step", "epoch")


def save_evaluation_page(found: Evaluated, models: Sequence[ModelGrid], command: Sequence[str]) -> Evaluated:
    """Write the page of an evaluation of `models` into its folder, in the first process only, and return `found`.

    `command` are the words of the command line; it is empty for an evaluation that Python code started with objects.
    Raises `UserError` if the page cannot be written.
    """
    if rank():
        return found
    settings = {spec.name: Setting.of(spec, model.title) for model in models for spec in model.samplers}
    facts = [*_facts(found.ladder.settings), *_weights(found.ladder.settings)]
    runs = [Run.find(model.model)[0] for model in models if is_run(Path(model.model))]
    configuration: dict[str, Any] = {"evaluation": found.ladder.settings}
    for run in runs:
        configuration[f"run {run.name}"] = _config(run)
    page = Page(
        title=" and ".join(model.title for model in models) if len(models) < 3 else f"{len(models)} models",
        ladder=found.ladder,
        settings=settings,
        comparison=found.comparison,
        baseline=found.baseline,
        command=shlex.join(masked_command(command)),
        facts=facts,
        cautions=found.cautions,
        curves=curves_of(runs[0].folder) if len(runs) == 1 else {},
        configuration=_yaml(configuration),
    )
    try:
        save_page(page, found.folder)
    except OSError as error:
        raise UserError(
            f"{found.folder / PAGE} could not be written ({first_line(error)}); make room for it, and run the same command "
            "again, which measures nothing again"
        ) from error
    return found


def save_run_page(
    run: Run, result: LadderResult, ladder: LadderEvaluation, metrics: MetricSuite, backbone: Backbone
) -> Path:
    """Write the page of a run's last evaluation, `result`, into the run's folder, and return its path.

    `ladder` and `metrics` are those of the evaluation, whose measurements give the intervals, and `backbone` is the run's.
    Raises OSError if the page cannot be written.
    """
    remove_page(run.folder)
    baseline = next(spec.name for spec in sorted(ladder.samplers, key=lambda spec: spec.network != "teacher"))
    collected = {name: found.collected for name, found in result.measured.items()}
    comparison = compare(metrics, collected, baseline, RESAMPLES, ladder.seed, most_work=MOST_WORK)
    cautions = [f"metric.{name} has no intervals, because they would take long" for name in comparison.left_out]
    if ladder.size < FEW_PROMPTS:
        cautions += [f"{ladder.size} prompts are few: the intervals are too narrow; use {FEW_PROMPTS} or more"]
    page = Page(
        title=run.name,
        ladder=result,
        settings={spec.name: Setting.of(spec, spec.network) for spec in ladder.samplers},
        comparison=comparison,
        baseline=baseline,
        command=shlex.join(_own_command()),
        facts=[*_facts(result.settings), *_weights_of_run(run, result.settings, backbone)],
        cautions=cautions,
        curves=curves_of(run.folder),
        configuration=_yaml(_config(run)),
    )
    return save_page(page, run.folder)


def _weights_of_run(run: Run, settings: Mapping[str, Any], backbone: Backbone) -> list[tuple[str, str]]:
    """Return pairs of a name and a text: which weights of the student and of the teacher were measured, with their hashes."""
    kind = "EMA of the student" if settings.get("ema_updates") else "the student as last trained"
    student = f"{kind}, iteration {settings.get('iteration')}"
    if run.checkpoints:
        student += f", {run.checkpoints[-1].name} (hash {digest_of([run.checkpoints[-1]])})"
    folder = getattr(backbone, "folder", None)
    if not isinstance(folder, Path):
        return [("weights of student", student)]
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder.name  # no home folder
    teacher = [("weights of teacher", f"{shown} (hash {digest_of([folder])})")]
    return [("weights of student", student), *teacher]


def curves_of(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the curves in the newest CSV log of a run in `folder`: their names, with points (iteration, value).

    There are none if the run has no such log or it cannot be read. Curves that do not change are left out.
    """
    logs = [path for path in folder.glob(f"logs/**/{LOG}") if path.is_file()]
    if not logs:
        return {}
    try:
        text = read_text(max(logs, key=lambda path: path.stat().st_mtime), MOST_LOG, follow=False)
        rows = list(csv.DictReader(io.StringIO(text)))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        step = _number(row.get("step"))
        for name, value in row.items():
            if (
                step is not None
                and isinstance(name, str)
                and name not in NOT_CURVES
                and (y := _number(value)) is not None
            ):
                curves.setdefault(name, []).append((step, y))
    changing = {name: points for name, points in curves.items() if len({y for _, y in points}) > 1}
    return dict(sorted(changing.items(), key=lambda item: _place(item[0])))


def _place(name: str) -> tuple[int, str]:
    """Return what sorts the curves: losses, validation and gradients first."""
    return next((i for i, part in enumerate(FIRST_CURVES) if part in f"/{name}"), len(FIRST_CURVES)), name


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _own_command() -> list[str]:
    """Return the command that started this process, if it was the command of training, with its secrets masked."""
    words = list(sys.argv)
    is_train = bool(words) and Path(words[0]).name in ("train.py", "-m")
    return ["python", "-m", "cdm_lightning.train", *masked_command(words[1:])] if is_train else []


def _config(run: Run) -> dict[str, Any]:
    try:
        return run.config() if run.is_started else {}
    except UserError:
        return {}


def _yaml(content: Mapping[str, Any]) -> str:
    return (
        yaml.safe_dump(_simple(masked(dict(content))), sort_keys=False, allow_unicode=True, width=120)
        if content
        else ""
    )


def _simple(value: Any) -> Any:
    """Return nested dicts and lists in which everything that YAML cannot write safely is text."""
    if isinstance(value, Mapping):
        return {str(key): _simple(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_simple(child) for child in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _facts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return pairs of a name and a text: the date, the prompts and noise, the versions and the machine."""
    versions = {name: package_version(name) for name in PACKAGES}
    machine = hardware()
    found = [
        ("date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("prompts", str(settings.get("count", ""))),
        ("seed of the noise", str(settings.get("seed", ""))),
        ("batch size", str(settings.get("batch_size", ""))),
        ("precision of the networks", str(settings.get("dtype", ""))),
        ("metrics", ", ".join(map(str, settings.get("metrics", ())))),
        ("versions", ", ".join(f"{name} {found}" for name, found in versions.items() if found)),
        ("Python", platform.python_version()),
        ("commit", commit() or ""),
        ("machine", ", ".join([machine["system"], f"{machine['cores']} CPU cores", *machine["gpus"]])),
    ]
    return [(name, text) for name, text in found if text]


def _weights(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    paths = settings.get("paths", {})
    return [
        (f"weights of {name}", masked_text(f"{paths.get(name, '')} (hash {found})"))
        for name, found in settings["models"].items()
    ]
