"""Where benchmarks write: into `outputs/benchmarks/`, and with --publish into `benchmarks/results/`, which git tracks.

The fault harness (tests/faults) writes into `outputs/faults/` in the same way.

No other file of this folder writes results, so that no measurement replaces a published one unasked; see tests/test_habits.py.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from cdm_lightning.files import write_text

OUTPUTS = Path(__file__).parents[1] / "outputs" / "benchmarks"
PUBLISHED = Path(__file__).parent / "results"


def add_publish(parser: argparse.ArgumentParser) -> None:
    """Give a command the switch `--publish`, which is off by default."""
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write into benchmarks/results/, which git tracks (default: outputs/)",
    )


def folder_of(publish: bool, topic: str | None = None) -> Path:
    """The folder that a command writes into; `topic` names another one beside `OUTPUTS`."""
    return PUBLISHED if publish else OUTPUTS.with_name(topic) if topic else OUTPUTS


def write(name: str, json_text: str, markdown_text: str, publish: bool, topic: str | None = None) -> Path:
    """Write `name`.json and `name`.md, each whole or not at all, and print the latter; the path of the latter."""
    folder = folder_of(publish, topic)
    put(folder, {f"{name}.json": json_text, f"{name}.md": markdown_text})
    path = folder / f"{name}.md"
    print(f"{markdown_text}\nwritten to: {path}")
    return path


def put(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write texts and pictures into a folder by file name, each whole or not at all: a process may be killed after any of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        temporary.replace(folder / name)


def keep(path: Path, text: str) -> None:
    """Write a file of a measurement in parts, whole or not at all, below `OUTPUTS`; ValueError for another place."""
    if not path.absolute().is_relative_to(OUTPUTS):
        raise ValueError(f"{path} does not lie in {OUTPUTS}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
