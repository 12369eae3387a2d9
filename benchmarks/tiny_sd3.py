"""The gates of the bundled tiny pipeline: `python -m benchmarks.tiny_sd3 teacher` and `... student --seeds 1 2 3`.

Both use 2048 held-out prompts and 8192 real renderings of them, four a prompt. The student is trained by the very
configuration of `make demo`, once a seed; the seeds are named beforehand on the command line and all of them are reported.
Results have date, machine, commit and command; benchmarks/README.md says where they go.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from benchmarks import evidence
from cdm_lightning.backbones.base import Backbone
from cdm_lightning.backbones.pipeline_folder import hash_part
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import asset_path, build, build_named, compose
from cdm_lightning.evaluation.ladder import STEPS, LadderEvaluation, LadderResult, Row
from cdm_lightning.evaluation.report import markdown_table, save_report
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import train

COUNT, REFERENCE = 2048, 8192
EVALUATION_SEED = 11  # of the noise; no training uses it


def evaluation(overrides: list[str], samplers: list[str] | None) -> tuple[LadderEvaluation, MetricSuite, Backbone]:
    """The demo's evaluation at full size, for the named samplers (None: all), its metrics, and the backbone."""
    ladder = "callbacks.ladder.evaluation"
    sizes = {f"{ladder}.count": COUNT, f"{ladder}.seed": EVALUATION_SEED}
    sizes |= {f"metric.frechet_real.reference.{name}": n for name, n in (("captions", COUNT), ("count", REFERENCE))}
    size_overrides = [f"{name}={value}" for name, value in sizes.items()]
    config = compose(["experiment=tiny_sd3_cdm", "output_dir=outputs/unused", *overrides, *size_overrides])
    found = build(config, ladder)
    if samplers is not None:
        found = replace(found, samplers=[spec for spec in STEPS if spec.name in samplers])
    metrics = MetricSuite(build_named(config, "metric"), build_named(config, "feature"))
    return found, metrics, build(config, "backbone")


def measure_teacher(publish: bool) -> None:
    """The teacher's rows of the ladder and the verdict on its gate."""
    names = [spec.name for spec in STEPS if spec.network == "teacher"]
    ladder, metrics, backbone = evaluation([], names)
    backbone.setup(torch.device("cpu"))
    result = ladder.run(metrics, backbone, {"teacher": backbone.build_teacher().requires_grad_(False).eval()})
    save_report(result, Path("outputs/benchmark_teacher"))
    row = rows_by_name(result)
    ratio = row["teacher 50 steps"]["frechet_real"] / row["teacher 4 steps"]["frechet_real"]
    guided, short = (row[f"teacher {steps} steps, guidance 2"]["adherence"] for steps in (50, 4))
    verdicts = {
        f"50-step / 4-step distance, no guidance: {ratio:.3f} (at most 0.5)": ratio <= 0.5,
        f"50-step adherence at guidance 2: {guided:.4f} (at least 0.97)": guided >= 0.97,
        f"and above its own 4-step one: {guided:.4f} > {short:.4f}": guided > short,
    }
    write("tiny_sd3_teacher", result.settings, {"teacher": result.rows}, verdicts, publish)


def measure_student(seeds: list[int], extra: list[str], publish: bool) -> None:
    """Train once a seed, measure all, and give the verdict on the mean; the results are written anew after each seed."""
    before = measured_teacher(publish)
    names = ["teacher 50 steps, guidance 1.5", *(spec.name for spec in STEPS if spec.network == "student")]
    tables, settings, seconds, known = {}, {}, [], {}
    for seed in seeds:
        folder = Path(f"outputs/benchmark_student_{seed}")
        place = [
            f"output_dir={folder}",
            f"run_name={folder.name}",
            f"seed={seed}",
        ]  # a finished run is not trained again
        config = compose(["experiment=tiny_sd3_cdm", *place, "~callbacks.ladder", "~callbacks.metrics", *extra])
        began = time.perf_counter()
        run = train(config)
        seconds.append(time.perf_counter() - began)
        ladder, metrics, backbone = evaluation(extra, names)
        backbone.setup(torch.device("cpu"))
        student = backbone.build_network()
        student.load_state_dict(read_checkpoint(run.checkpoint).network_weights("student_ema"))
        networks = {"student": student.eval(), "teacher": backbone.build_teacher().eval()}
        result = ladder.run(metrics, backbone, networks, known=known)
        known = {names[0]: result.measured[names[0]]}  # the teacher is the same for all seeds
        save_report(result, folder)
        tables[f"seed {seed}"], settings = result.rows, result.settings
        print(markdown_table(result.rows), flush=True)
        four = [next(row for row in rows if row["sampler"] == "student 4 steps") for rows in tables.values()]
        verdicts = student_verdicts(four, before)
        write("tiny_sd3_student", {**settings, "training_seconds": seconds}, tables, verdicts, publish)


def measured_teacher(publish: bool) -> dict[str, dict]:
    """The teacher's rows by sampler, from a measurement of this bundle; published ones where there is none of one's own.

    What is to be published is compared with what is published alone.
    """
    folders = [evidence.PUBLISHED] if publish else [evidence.OUTPUTS, evidence.PUBLISHED]
    for file in (folder / "tiny_sd3_teacher.json" for folder in folders):
        teacher = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"facts": {}}
        if teacher["facts"].get("bundle") == bundle():
            return {row["sampler"]: row for row in teacher["rows"]["teacher"]}
    command = "python -m benchmarks.tiny_sd3 teacher" + (" --publish" if publish else "")
    sys.exit(f"error: {file} has no measurement of the bundled teacher (bundle {bundle()}); run `{command}` first")


def student_verdicts(four: list[Row], teacher: dict[str, dict]) -> dict[str, bool]:
    """The student's gate at 4 steps, no guidance, on the mean over seeds."""
    distance, adherence = (statistics.mean(row[name] for row in four) for name in ("frechet_real", "adherence"))
    spread = ", ".join(f"{row['frechet_real']:.3f}" for row in four)
    short = teacher["teacher 4 steps"]["frechet_real"]
    best = teacher["teacher 50 steps, guidance 1.5"]["frechet_real"]
    plain = teacher["teacher 50 steps"]["adherence"]
    return {
        f"distance {distance:.3f} ({spread}) is at most 0.6 x {short:.3f} = {0.6 * short:.3f}": distance <= 0.6 * short,
        f"and no worse than the teacher's with 100 calls at guidance 1.5: {best:.3f}": distance <= best,
        f"adherence {adherence:.4f} is at least 0.94": adherence >= 0.94,
        f"and above the unguided 50-step teacher's {plain:.4f}": adherence > plain,
    }


def rows_by_name(result: LadderResult) -> dict[str, Row]:
    """The rows of a ladder by sampler."""
    return {row["sampler"]: row for row in result.rows}


def bundle() -> str:
    """Which weights are measured: a hash of the bundled pipeline's transformer."""
    return hash_part(Path(asset_path("tiny_sd3")) / "transformer")


def write(name: str, settings: dict, tables: dict[str, list[Row]], verdicts: dict[str, bool], publish: bool) -> None:
    """Write facts, verdicts and tables as JSON and Markdown where `evidence.write` does."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "command": "python -m benchmarks.tiny_sd3 " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}",
        "bundle": bundle(),
        **settings,
    }
    rows = {title: list(table) for title, table in tables.items()}
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [f"- {'holds' if holds else 'DOES NOT HOLD'}: {text}" for text, holds in verdicts.items()]
    for title, table in tables.items():
        lines += ["", f"## {title}", "", markdown_table(table).rstrip()]
    result = {"facts": facts, "verdicts": verdicts, "rows": rows}
    evidence.write(name, json.dumps(result, indent=2) + "\n", "\n".join(lines) + "\n", publish)


@cache
def commit() -> str:
    """What is checked out, as it was at the start: the results that are written change the checkout."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_sd3",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("what", choices=["teacher", "student"])
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("overrides", nargs="*", help="Hydra overrides of experiment=tiny_sd3_cdm")
    evidence.add_publish(made)
    return made


def main() -> None:
    """The command line."""
    commit()
    arguments = parser().parse_args()
    quiet_libraries()
    if arguments.what == "teacher":
        measure_teacher(arguments.publish)
    else:
        measure_student(arguments.seeds, arguments.overrides, arguments.publish)


if __name__ == "__main__":
    main()
