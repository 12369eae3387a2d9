"""The table of tried, refused, saved and lost, with the facts of where it was made."""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks import evidence
from faults.engine import FAULTS, LEFT_OUT, Result

ROOT = Path(__file__).parents[2]
COLUMNS = ("ran", "refused", "saved", *FAULTS, LEFT_OUT)


def table(results: Sequence[Result]) -> str:
    """A row for each kind and one for all, as Markdown."""
    kinds = {
        kind: [result for result in results if result.kind == kind] for kind in dict.fromkeys(r.kind for r in results)
    }
    lines = [f"| kind | tried | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for kind, some in (*kinds.items(), ("**all**", list(results))):
        counts = [sum(result.outcome == name or name in result.faults for result in some) for name in COLUMNS]
        lines.append(f"| {kind} | {len(some)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def lost(results: Sequence[Result]) -> int:
    """How many cases lost something."""
    return sum("lost" in result.faults for result in results)


def facts(command: str) -> dict[str, str]:
    """Date, commit, command and machine."""
    changed = "" if not _git("status", "--porcelain") else " with changes"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short=10", "HEAD") + changed,
        "command": command,
        "machine": f"{os.cpu_count()} CPU cores ({_processor()})",
        "software": f"torch {version('torch')}, Python {platform.python_version()}",
    }


def write(results: Sequence[Result], about: dict[str, str], publish: bool) -> Path:
    """Write the table, what the columns mean and each fault, as the benchmarks do."""
    lines = ["# Faults", "", *(f"- {name}: {value}" for name, value in about.items()), "", table(results), ""]
    lines += [
        "`ran`, `refused` (in one line, exit status 2) and `saved` (exit status 75) are free of faults. The faults:"
    ]
    lines += [f"- {name}: {text}" for name, text in FAULTS.items()]
    lines += [f"- {LEFT_OUT}: {result.key} ({result.said})" for result in results if result.outcome == LEFT_OUT]
    bad = [result for result in results if not result.good]
    if bad:
        lines += ["", "## Cases with faults"]
    for result in bad:
        lines += ["", f"- {result.key}: **{', '.join(result.faults)}**", f"  - `{result.line}`", f"  - {result.said}"]
    content = {"facts": about, "results": [result.as_json() for result in results]}
    return evidence.write(
        "faults", plain(json.dumps(content, indent=1)) + "\n", plain("\n".join(lines)) + "\n", publish, "faults"
    )


def plain(text: str) -> str:
    """A text without the folders of this machine: those of the cases, and that of the project."""
    root = re.escape(str(Path(__file__).parents[2]))
    text = re.sub(rf"{root}/outputs/faults/work_\w+/(box_\w+/(work/)?|disk/|stock/?)?", "", text)
    return re.sub(rf"{root}/", "", text)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
