"""The tables and the plot of a study: means over seeds with their intervals, pairs of runs of one seed, and every run."""

import json
import math
import shutil
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks import evidence
from benchmarks.machine import markdown
from cdm_lightning.config import build, compose
from cdm_lightning.evaluation.ladder import Row
from cdm_lightning.train import train

if TYPE_CHECKING:
    from benchmarks.study import Study

PUBLISHED_METHOD = "cdm"  # the arm with which the others are compared
RESAMPLES = 10_000
COUNTED_ITERATIONS = 56  # twice the longest rollout, so that the mean over lengths is near


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over seeds (percentiles)."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def mean_rows(study: "Study", budget: str, figure: str) -> list[Row]:
    """A row for each arm: the mean of a figure over seeds and its interval at each number of steps, and the number of runs."""
    rows = []
    for arm in study.task["arms"]:
        results = study.results(arm, budget)
        if not results:
            continue
        row: Row = {"arm": arm, "rate": study.rate(arm), "runs": len(results)}
        for nfe in map(str, study.plan["steps"]):
            values = [result["figures"][nfe][figure] for result in results]
            low, high = interval(values)
            row[f"{nfe} steps"] = f"{statistics.mean(values):.3g} ({low:.3g} to {high:.3g})"
        row["CPU seconds"] = f"{statistics.median(result['seconds'] for result in results):.0f}"
        rows.append(row)
    return rows


def ratio_rows(study: "Study", budget: str, arm: str | None = None, other: str | None = None) -> list[Row]:
    """A row for each arm with the ratios of its distances to others of the same seed: the mean, the smallest, the largest.

    The others are those of `arm` (of the same arm if that is None) with the budget `other` (the same if that is None). The
    mean is the geometric one.
    """
    rows, metric = [], study.task["metric"]
    for ours in study.task["arms"]:
        pair = (study.results(ours, budget), study.results(arm or ours, other or budget))
        first, second = ({result["seed"]: result["figures"] for result in results} for results in pair)
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            continue
        row: Row = {"arm": ours, "pairs": len(seeds)}
        for nfe in map(str, study.plan["steps"]):
            logs = [math.log(max(first[s][nfe][metric], 0.1) / max(second[s][nfe][metric], 0.1)) for s in seeds]
            low, mean, high = (math.exp(value) for value in (min(logs), statistics.mean(logs), max(logs)))
            row[f"{nfe} steps"] = f"{mean:.2f} ({low:.2f} to {high:.2f})"
        rows.append(row)
    return rows


def run_rows(runs: list[dict[str, Any]], metric: str) -> list[Row]:
    """A row for each run."""
    return [
        {
            **{name: run[name] for name in ("arm", "rate", "seed", "budget")},
            **{f"{nfe} steps": f"{figures[metric]:.3g}" for nfe, figures in run["figures"].items()},
            "CPU seconds": run["seconds"],
        }
        for run in runs
    ]


def calls_of_iteration(study: "Study", arm: str) -> float:
    """The network calls of an iteration for one sample, measured; a call with a backward pass counts as three."""
    from benchmarks.study import Cell

    made = study.overrides(Cell(study.name, arm, 1.0, 0, "once"))
    folder = evidence.OUTPUTS / "study" / "calls" / study.plan["name"] / study.name / arm
    short = [f"trainer.max_steps={COUNTED_ITERATIONS}", f"output_dir={folder}"]
    config = compose([*made, *short])
    network = type(build(config, "backbone").build_network())
    calls = 0.0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal calls
        if type(module) is network:
            tensor = output[0] if isinstance(output, tuple) else output
            calls += (3 if tensor.requires_grad else 1) * len(tensor)

    shutil.rmtree(folder, ignore_errors=True)  # a run that is at its end would make no calls
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        train(config)
    finally:
        hook.remove()
    return calls / COUNTED_ITERATIONS / config.data.batch_size


def plot(study: "Study", budgets: Mapping[str, int]) -> bytes:
    """A PNG picture: distance against the number of steps, a panel for each arm, a thin line for each seed."""
    import io

    from matplotlib.figure import Figure

    arms = [arm for arm in study.task["arms"] if any(study.results(arm, budget) for budget in budgets)]
    columns = 3
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    found = [result for arm in arms for budget in budgets for result in study.results(arm, budget)]
    largest = [max(figures[study.task["metric"]] for figures in result["figures"].values()) for result in found]
    smallest = min(figures[study.task["metric"]] for result in found for figures in result["figures"].values())
    smallest, typical = max(smallest, 0.1), 4 * float(np.percentile(largest, 90))
    for panel, arm in zip(panels, arms):
        for colour, (budget, factor) in zip(("tab:blue", "tab:red"), budgets.items()):
            label = f"{factor * study.task['iterations']} iterations"
            for result in study.results(arm, budget):
                values = [max(figures[study.task["metric"]], 0.1) for figures in result["figures"].values()]
                panel.plot(study.plan["steps"], values, color=colour, linewidth=0.8, marker=".", label=label)
                label = None
        seen = [line.get_ydata() for line in panel.get_lines()]
        above = sum(max(values) > typical for values in seen)  # of a diverged run, which would flatten all panels
        title = arm + (f" ({above} of {len(seen)} runs leave the panel)" if above else "")
        panel.set(title=title, xscale="log", yscale="log", xticks=study.plan["steps"], xticklabels=study.plan["steps"])
        panel.set_ylim(smallest / 1.5, typical)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.supxlabel("steps of the student")
    figure.supylabel(f"{study.task['metric'].replace('_', ' ')}, smaller is better")
    for panel in list(panels):
        panel.set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90, format="png")
    return picture.getvalue()


def text_of(study: "Study", runs: list[dict[str, Any]], calls: Mapping[str, float]) -> str:
    """The report as Markdown."""
    metric, budgets = study.task["metric"], study.plan["budgets"]
    commits = sorted({run["facts"]["commit"][:9] for run in runs if "facts" in run})
    text = [
        f"# The study of objectives on {study.name}",
        f"Plan: {study.plan['name']} (benchmarks/study_plan*.yaml). {len(runs)} runs, made at commit {', '.join(commits)}.",
        f"Metric: {metric}, smaller is better. Each cell has the mean over seeds and its 95 % bootstrap interval.",
    ]
    for budget, factor in budgets.items():
        if rows := mean_rows(study, budget, metric):
            text += [f"## {factor * study.task['iterations']} iterations", markdown(rows)]
        if PUBLISHED_METHOD in study.task["arms"] and (compared := ratio_rows(study, budget, PUBLISHED_METHOD)):
            text += [
                f"### As a multiple of the distance of `{PUBLISHED_METHOD}` with the same seed",
                "Below 1 is better. The geometric mean over seeds, with the smallest and the largest.",
                markdown(compared),
            ]
    first, *later = budgets
    for budget in later:
        if rows := ratio_rows(study, budget, other=first):
            text += [
                f"## {budgets[budget]} times the iterations against once, with the same seed",
                "Above 1, longer training was worse. The geometric mean over seeds, with the smallest and the largest.",
                markdown(rows),
            ]
    others = [name for name in next(iter(runs[0]["figures"].values())) if name != metric] if runs else []
    for name in others:
        for budget in budgets:
            if rows := mean_rows(study, budget, name):
                text += [f"## {name}, {budgets[budget] * study.task['iterations']} iterations", markdown(rows)]
    if calls:
        rows = [{"arm": arm, "calls": f"{number:.1f}"} for arm, number in calls.items()]
        text += [
            "## Network calls of an iteration for one sample",
            "A call with a backward pass counts as three.",
            markdown(rows),
        ]
    text += ["## All runs", markdown(run_rows(runs, metric)) if runs else "None yet."]
    return "\n\n".join(text) + "\n"


def write(study: "Study", publish: bool) -> None:
    """Write tables, figures of all runs, and the plot."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(study.folder.glob(f"{study.name}-*.json"))]
    calls = {arm: calls_of_iteration(study, arm) for arm in study.task["arms"]} if publish else {}
    name = f"study_{study.plan['name']}_{study.name}"
    written = evidence.write(name, json.dumps(runs, indent=1) + "\n", text_of(study, runs, calls), publish)
    if runs:
        evidence.put(written.parent, {f"{name}.png": plot(study, study.plan["budgets"])})
