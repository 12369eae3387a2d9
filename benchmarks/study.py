"""The study of objectives: `python -m benchmarks.study run --task toy2d`, then `python -m benchmarks.study report --task toy2d`.

The plan (`study_plan.yaml`) fixes arms, seeds, budgets, metric and the rule of tuning before any run. `run` makes the runs that
have no result yet, one after the other, and writes one file for each; stopped at any time, the same command goes on. Each arm
first gets the same tries of its learning rates on the tuning seeds; the best factor is used for all its other runs. `report`
writes the tables and the plot of all runs (`study_report.py`).
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks import evidence, study_report
from benchmarks.machine import command_of, facts
from benchmarks.tiny_sd3 import evaluation
from cdm_lightning.backbones.base import Backbone, BoundField
from cdm_lightning.backbones.toy2d import MODES, RADIUS, WIDTH, exact_points
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import build, compose
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.core.rollout import sample
from cdm_lightning.core.schedules import inference_sigmas
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.metrics.energy import energy_distance
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import train

PLAN = Path(__file__).with_name("study_plan.yaml")
POINTS, NOISE_SEED, DATA_SEED = 4096, 77, 78  # of the plane's evaluation
Figures = dict[str, dict[str, float]]  # by number of steps: {"energy_distance": ...}


@dataclass(frozen=True)
class Cell:
    """One run of the study: an arm of a task, the factor of its learning rates, a seed and a budget."""

    task: str
    arm: str
    rate: float
    seed: int
    budget: str

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.task}-{self.arm}-rate{self.rate:g}-seed{self.seed}-{self.budget}"


class Study:
    """A task of the plan, with the results that lie in `folder`."""

    def __init__(self, plan: Mapping[str, Any], task: str, folder: Path) -> None:
        self.plan, self.name, self.task, self.folder = plan, task, plan["tasks"][task], folder

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a run, or None if it has not been made."""
        path = self.folder / f"{cell.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def tries(self, arm: str) -> list[Cell]:
        """The runs that choose an arm's factor."""
        seeds, rates = self.plan["tuning_seeds"], self.plan["rates"]
        return [Cell(self.name, arm, rate, seed, "once") for rate in rates for seed in seeds]

    def rate(self, arm: str) -> float | None:
        """The factor with the smallest mean of log(distance) over tuning seeds and steps; None if a try is missing."""
        scores: dict[float, list[float]] = {}
        for cell in self.tries(arm):
            result = self.result(cell)
            if result is None:
                return None
            scores.setdefault(cell.rate, []).extend(log_distances(result["figures"], self.task["metric"]))
        return min(scores, key=lambda rate: statistics.mean(scores[rate]))

    def cells(self, arm: str, budget: str) -> list[Cell]:
        """The reported runs of an arm, at the factor that was chosen; none before that."""
        rate = self.rate(arm)
        return [] if rate is None else [Cell(self.name, arm, rate, seed, budget) for seed in self.plan["seeds"]]

    def missing(self, budgets: list[str]) -> Iterator[Cell]:
        """The runs that have no result: first all tries, then the first seed of each arm, then the second, and so on."""
        for arm in self.task["arms"]:
            yield from (cell for cell in self.tries(arm) if self.result(cell) is None)
        for budget in budgets:
            rows = [self.cells(arm, budget) for arm in self.task["arms"]]
            for of_one_seed in zip(*rows):
                yield from (cell for cell in of_one_seed if self.result(cell) is None)

    def results(self, arm: str, budget: str) -> list[dict[str, Any]]:
        """The results of the reported runs of an arm that have been made, in the order of their seeds."""
        return [found for cell in self.cells(arm, budget) if (found := self.result(cell))]

    def overrides(self, cell: Cell) -> list[str]:
        """The overrides of a run's configuration."""
        made = [] if cell.arm in self.task["student_alone"] else [*self.task["with_fake_score"]]
        made = [
            *self.task["overrides"],
            *made,
            *self.task["arms"][cell.arm],
        ]  # of two values of an option, the last counts
        rates = dict(self.task["rates"])
        if "optim=dmd2" in made:
            rates["head"] = rates["fake_score"]
        made += [f"optim.{role}.learning_rate.peak={cell.rate * rate}" for role, rate in rates.items()]
        iterations = self.task["iterations"] * self.plan["budgets"][cell.budget]
        made += [f"trainer.max_steps={iterations}", f"seed={cell.seed}", f"checkpoint.every={iterations}"]
        made += ["callbacks=none", "metric=[]", "logger=none", "trainer.limit_val_batches=0"]
        return [*made, f"output_dir={self.folder / 'runs' / cell.name}"]

    def make(self, cell: Cell) -> None:
        """Train, measure and write the result; the run's folder is removed afterwards."""
        config = compose(self.overrides(cell))
        began = time.process_time()  # of one thread, so that other work on the machine does not count
        run = train(config)
        seconds = time.process_time() - began
        backbone = build(config, "backbone")
        backbone.setup(torch.device("cpu"))
        student = backbone.build_network()
        assert run.checkpoint is not None
        student.load_state_dict(read_checkpoint(run.checkpoint).network_weights("student_ema"))
        figures = MEASURES[self.name](backbone, student.eval().requires_grad_(False), self.plan["steps"])
        result = {
            **cell.__dict__,
            "seconds": round(seconds, 1),
            "figures": figures,
            "facts": facts("cpu", command_of("benchmarks.study")),
        }
        evidence.keep(self.folder / f"{cell.name}.json", json.dumps(result, indent=1) + "\n")
        shutil.rmtree(run.folder)


def log_distances(figures: Figures, metric: str) -> list[float]:
    """The logarithms of the distances at all numbers of steps; a distance that is not positive counts as the floor .1."""
    return [math.log(max(of_steps[metric], 0.1)) for of_steps in figures.values()]


def spread_in_modes(points: torch.Tensor) -> dict[str, float]:
    """How wide the modes of points (n, 2) are along and across the circle, in units of the data's width.

    Each point belongs to the nearest mode. Both figures are the root mean square of the distance to its centre, so 1 for the data.
    """
    angles = torch.arange(len(MODES)) / len(MODES) * 2 * math.pi
    outward = torch.stack([angles.cos(), angles.sin()], dim=1)
    outward = outward[torch.cdist(points, RADIUS * outward).argmin(1)]
    across = torch.stack([-outward[:, 1], outward[:, 0]], dim=1)
    away = (points - RADIUS * outward) / WIDTH
    named = {"radial": outward, "tangential": across}
    return {name: float((away * direction).sum(1).square().mean().sqrt()) for name, direction in named.items()}


def measure_plane(backbone: Backbone, network: nn.Module, steps: list[int]) -> Figures:
    """1000 times the energy distance of samples to exact ones, and the spread within modes, by number of steps."""
    prompts = ["anywhere"] * POINTS
    field = BoundField(backbone, network, backbone.encode_prompts(prompts))
    noise = evaluation_noise(NOISE_SEED, range(POINTS), backbone.latent_shape, "cpu")
    exact = exact_points(prompts, DATA_SEED)
    figures = {}
    for nfe in steps:
        points = sample(field, noise, inference_sigmas(nfe, backbone.shift_steps)).flatten(1)
        spread = {"rms": float(points.square().mean().sqrt()), **spread_in_modes(points)}
        figures[str(nfe)] = {"energy_distance": 1000 * float(energy_distance(points, exact)), **spread}
    return figures


def measure_tiny_sd3(backbone: Backbone, network: nn.Module, steps: list[int]) -> Figures:
    """The demo's metrics on 2048 held-out prompts, by number of steps."""
    ladder, metrics, _ = evaluation(["metric=[shapes_frechet,shapes_adherence,shapes_diversity]"], None)
    ladder = replace(ladder, samplers=[SamplerSpec(str(nfe), "student", nfe) for nfe in steps], real_images=None)
    result = ladder.run(metrics, backbone, {"student": network}, silent=True)
    kept = ("frechet_real", "adherence", "diversity")
    return {row["sampler"]: {name: row[name] for name in kept} for row in result.rows}


MEASURES: dict[str, Callable[[Backbone, nn.Module, list[int]], Figures]] = {
    "toy2d": measure_plane,
    "tiny_sd3": measure_tiny_sd3,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    made.add_argument("--task", choices=tuple(MEASURES), default="toy2d")
    made.add_argument("--plan", type=Path, default=PLAN, help="the plan, a YAML file (default: %(default)s)")
    made.add_argument("--budgets", nargs="+", default=["once", "long"], help="which budgets to run, in this order")
    evidence.add_publish(made)
    return made


def main() -> None:
    """Run the command line."""
    options = parser().parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
    study = Study(plan, options.task, evidence.OUTPUTS / "study" / plan["name"])
    if options.what == "run":
        while (cell := next(study.missing(options.budgets), None)) is not None:
            print(cell.name, flush=True)
            study.make(cell)
    study_report.write(study, options.publish)


if __name__ == "__main__":
    main()
