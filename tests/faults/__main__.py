"""`make faults`: the long form. It can be stopped and started again: what is done on this commit is not done twice.

It writes `outputs/faults/faults.md`, or with --publish the same into benchmarks/results, and exits with 1 if anything was lost.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.evidence import add_publish
from faults import report
from faults.engine import Result
from faults.plans import SHARES, plan


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog="make faults", description="Bad inputs, kills and full disks, and what was lost."
    )
    made.add_argument("--inputs", type=int, default=500, metavar="N", help="bad inputs (default: %(default)s)")
    made.add_argument("--kills", type=int, default=50, metavar="N", help="kills (default: %(default)s)")
    made.add_argument("--points", type=int, default=30, metavar="N", help="full disks (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the cases and moments (default: 0)")
    made.add_argument("--workers", type=int, default=2, metavar="N", help="cases at a time (default: %(default)s)")
    made.add_argument(
        "--part", choices=("inputs", "kills", "disk"), action="append", help="only this; may be given several times"
    )
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
        self._path, self._lock = path, threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = {(found := Result(**json.loads(line))).key: found for line in lines if line.endswith("}")}

    @property
    def has_begun(self) -> bool:
        """Whether an earlier start has left results."""
        return bool(self.results)

    def add(self, result: Result) -> None:
        """Keep a result and show it if it is a fault."""
        with self._lock:
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

    cases = plan(options.inputs, options.seed, tuple(options.kind or SHARES))
    left = [case for case in cases if case.key not in progress.results]
    if left:
        run_all(left, place, make_stock(place), options.workers, progress.add)
    return [case.key for case in cases]


def kills(options: argparse.Namespace, place: Path, progress: Progress) -> list[str]:
    """Disturb the runs of the layouts that are not done yet; the keys of all."""
    from faults.kills import disturb

    done = tuple(progress.results.values())
    return disturb(options.kills, options.seed, place / "kills", progress.add, done=done)


def disk(options: argparse.Namespace, place: Path, progress: Progress) -> list[str]:
    """Let the disk be full at the points that are not done yet; the keys of all."""
    from faults.disk import fill

    return fill(options.points, options.seed, place / "disk", progress.add, frozenset(progress.results))


PARTS: dict[str, Callable[..., list[str]]] = {"inputs": inputs, "kills": kills, "disk": disk}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    command = "make faults" + (f" FAULTS_ARGS='{' '.join(sys.argv[1:])}'" if sys.argv[1:] else "")
    begin, about = time.monotonic(), report.facts(command)
    folder, commit = report.evidence.folder_of(False, "faults"), about["commit"].replace(" ", "_")
    place = folder / f"work_{commit}"
    again = options.again or "changes" in commit  # the same name stands for other code
    if again:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder / f"done_{commit}_seed{options.seed}.jsonl", again)
    continued = progress.has_begun
    keys = run_parts(options.part or tuple(PARTS), options, place, progress)
    results = [progress.results[key] for key in keys]
    shutil.rmtree(place, ignore_errors=True)
    minutes = f"{(time.monotonic() - begin) / 60:.1f}{' (of the last start)' if continued else ''}"
    report.write(results, about | {"minutes": minutes}, options.publish)
    sys.exit(1 if report.lost(results) else 0)


def run_parts(names: Sequence[str], options: argparse.Namespace, place: Path, progress: Progress) -> list[str]:
    """Run the inputs, and then kills and full disks side by side; the keys of all. A part that fails is a row of its own."""

    def guarded(name: str) -> list[str]:
        try:
            return PARTS[name](options, place, progress)
        except Exception as error:
            failed = Result(f"{name}: the harness failed", name, "", "failed", ["ended"], f"{error!r}"[:2000])
            progress.add(failed)
            kinds = tuple(SHARES) if name == "inputs" else (name,)
            done = [key for key, result in progress.results.items() if result.kind.startswith(kinds)]
            return list(dict.fromkeys([*done, failed.key]))

    keys = guarded("inputs") if "inputs" in names else []
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(guarded, name) for name in names if name != "inputs"]
        return keys + [key for other in others for key in other.result()]


if __name__ == "__main__":
    main()
