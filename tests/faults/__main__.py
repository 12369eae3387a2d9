"""`make faults`: the long form. It can be stopped and started again: what is done on this commit is not done twice.

It writes `outputs/faults/faults.md`, or with --publish the same into benchmarks/results, and exits with 1 if anything was lost.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.evidence import add_publish
from faults import report
from faults.engine import Result

PARTS = ("inputs", "kills", "disk")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog="make faults", description="Bad inputs, kills and full disks, and what was lost."
    )
    made.add_argument("--inputs", type=int, default=500, metavar="N", help="bad inputs (default: %(default)s)")
    made.add_argument("--kills", type=int, default=50, metavar="N", help="kills (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the cases and moments (default: 0)")
    made.add_argument("--workers", type=int, default=2, metavar="N", help="cases at a time (default: %(default)s)")
    made.add_argument("--part", choices=PARTS, action="append", help="only this; may be given several times")
    made.add_argument(
        "--kind", action="append", metavar="KIND", help="only bad inputs of this kind, for example 'run folders'"
    )
    made.add_argument("--again", action="store_true", help="forget what an earlier start has done")
    add_publish(made)
    return made


class Progress:
    """The results so far, in a file with a line for each, so that a start goes on where another one ended."""

    def __init__(self, path: Path, again: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if again:
            path.unlink(missing_ok=True)
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = {(found := Result(**json.loads(line))).key: found for line in lines if line.endswith("}")}

    def add(self, result: Result) -> None:
        """Keep a result and show it if it is a fault."""
        self.results[result.key] = result
        with self._path.open("a") as file:
            file.write(json.dumps(result.as_json()) + "\n")
        if not result.good:
            print(result, file=sys.stderr, flush=True)
        elif len(self.results) % 50 == 0:
            print(f"{len(self.results)} tried", file=sys.stderr, flush=True)


def inputs(options: argparse.Namespace, place: Path, progress: Progress) -> list[str]:
    """Run the bad inputs that are not done yet; the keys of all."""
    from faults.bases import make_stock
    from faults.engine import run_all
    from faults.plans import SHARES, plan

    cases = plan(options.inputs, options.seed, tuple(options.kind or SHARES))
    left = [case for case in cases if case.key not in progress.results]
    if left:
        run_all(left, place, make_stock(place), options.workers, progress.add)
    return [case.key for case in cases]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    command = "make faults" + (f" FAULTS_ARGS='{' '.join(sys.argv[1:])}'" if sys.argv[1:] else "")
    about = report.facts(command, 0)
    commit = about["commit"].replace(" ", "_")
    folder = report.evidence.folder_of(False, "faults")
    place = folder / f"work_{commit}"
    place.mkdir(parents=True, exist_ok=True)
    again = options.again or "changes" in commit  # the same name stands for other code
    if again:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    progress = Progress(folder / f"done_{commit}_seed{options.seed}.jsonl", again)
    parts: dict[str, Callable[..., list[str]]] = {"inputs": inputs}
    begin, keys = time.monotonic(), []
    for name in options.part or PARTS:
        if name in parts:
            keys += parts[name](options, place, progress)
    results = [progress.results[key] for key in keys]
    shutil.rmtree(place, ignore_errors=True)
    report.write(results, about | {"minutes": f"{(time.monotonic() - begin) / 60:.1f}"}, options.publish)
    sys.exit(1 if report.lost(results) else 0)


if __name__ == "__main__":
    main()
