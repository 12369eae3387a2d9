"""`python -m benchmarks.gpu_tables`: every table that needs a GPU, one process after another, and one table of all candidates.

What fails (for memory, say) is told in its row, and the others still run.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence import add_publish, folder_of


@dataclass(frozen=True)
class Candidate:
    """A run of a benchmark: what it tries, in words, the module, its arguments; its files are called `name`."""

    name: str
    tries: str
    arguments: str
    module: str = "benchmarks.step_time"

    @property
    def command(self) -> list[str]:
        """As `subprocess` takes it."""
        return [sys.executable, "-m", self.module, *shlex.split(self.arguments), "--name", self.name]


SD3, LONGCAT = "--size sd3_medium", "--size longcat"
CANDIDATES = (
    Candidate("step_time_sd3_medium", "as it is", SD3),
    Candidate("step_time_sd3_medium_compiled", "compiled blocks", f"{SD3} --compile"),
    Candidate(
        "step_time_sd3_medium_keep_attention",
        "compiled, attention not computed again",
        f"{SD3} --compile --keep-attention",
    ),
    Candidate(
        "step_time_sd3_medium_half",
        "compiled, 4 parts, half of the blocks recompute",
        f"{SD3} --compile --accumulate 4 --recompute 0.5",
    ),
    Candidate(
        "step_time_sd3_medium_none",
        "compiled, 8 parts, no recomputation",
        f"{SD3} --compile --accumulate 8 --recompute 0",
    ),
    Candidate("step_time_sd3_medium_cudnn", "attention by cuDNN", f"{SD3} --attention cudnn"),
    Candidate("step_time_longcat", "LongCat-Image, as it is", LONGCAT),
    Candidate("step_time_longcat_compiled", "LongCat-Image, compiled blocks", f"{LONGCAT} --compile"),
    Candidate("inference_sd3_medium", "inference", f"{SD3} --compile --batch 4", "benchmarks.inference"),
)


def run(candidates: Sequence[Candidate], publish: bool = False) -> dict[str, str]:
    """Run them in turn; why those that failed did, by name. Each writes its own files, whole or not at all."""
    where = ["--publish"] if publish else []
    failures = {}
    for candidate in candidates:
        print(f"{candidate.name}: {candidate.tries}", flush=True)
        done = subprocess.run([*candidate.command, *where], capture_output=True, text=True, check=False)
        if done.returncode:
            failures[candidate.name] = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            print(f"  failed: {failures[candidate.name]}", flush=True)
    return failures


def table(candidates: Sequence[Candidate], failures: Mapping[str, str], publish: bool = False) -> list[dict[str, str]]:
    """A row for each that measures a step and has failed now or left its file, now or at an earlier time."""
    folder, rows = folder_of(publish), []
    for candidate in candidates:
        file = folder / f"{candidate.name}.json"
        if candidate.name in failures:
            rows.append(row(candidate, None, failures[candidate.name]))
        elif candidate.module == "benchmarks.step_time" and file.is_file():
            rows.append(row(candidate, json.loads(file.read_text(encoding="utf-8"))))
    return rows


def row(candidate: Candidate, result: dict[str, Any] | None, failure: str = "") -> dict[str, str]:
    """A candidate's figures, or why there are none."""
    names = ("samples/s", "times the authors'", "memory, GB", "of theirs", "of the ceiling", "commit")
    figures = dict.fromkeys(names, "")
    if result is not None:
        ours = result["ours"]
        figures = {
            "samples/s": f"{ours['samples_per_second']:.3g}",
            "times the authors'": f"{result['speed_ratio']:.3g} ({min(result['ratios']):.3g} to {max(result['ratios']):.3g})",
            "memory, GB": f"{ours['peak_bytes'] / 1e9:.3g}",
            "of theirs": f"{result['memory_ratio']:.3g}",
            "of the ceiling": f"{ours['flops_per_second'] / result['ceiling']:.0%}",
            "commit": result["facts"]["commit"],
        }
    return {"candidate": candidate.tries, **figures, "failed": failure.replace("|", " ")}


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tables", description="All tables that need a GPU, some minutes each."
    )
    names = ", ".join(candidate.name for candidate in CANDIDATES)
    made.add_argument("only", nargs="*", metavar="NAME", help=f"some of them: {names} (default: all)")
    add_publish(made)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_args(arguments)
    only, publish = options.only, options.publish
    names = [candidate.name for candidate in CANDIDATES]
    for name in only:
        if name not in names:
            parser().error(f"there is no table {name}; those that there are: {', '.join(names)}")
    import torch

    from benchmarks.machine import command_of, facts, write_results

    if not torch.cuda.is_available():
        parser().error("there is no GPU here; for a CPU take python -m benchmarks.step_time --size small")
    where = facts("cuda", command_of("benchmarks.gpu_tables"))
    failures: dict[str, str] = {}
    for candidate in CANDIDATES:
        if not only or candidate.name in only:
            failures |= run([candidate], publish)
            rows = table(CANDIDATES, failures, publish)  # anew after each: a lease may end at any time
            if rows:
                result = {"facts": where, "rows": rows}
                write_results("gpu_candidates", "Candidates on a GPU", result, {"Step time": rows}, publish)


if __name__ == "__main__":
    main()
