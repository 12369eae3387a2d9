"""Scores of single images that another program has computed, as metrics of an evaluation.

A file of scores is a table (CSV, or JSON objects on lines). A row belongs to one image, which `file` names, or `model` (the
name of a sampler) and `prompt_index`. Every other column is a score, and its name is that of the metric.
"""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.ladder import LadderEvaluation
from cdm_lightning.evaluation.store import file_name
from cdm_lightning.files import first_line, open_regular
from cdm_lightning.metrics.base import Metric
from cdm_lightning.metrics.suite import COLUMNS, Collected, MetricSuite

MOST_BYTES = 1 << 28  # of a file: a million rows with their prompts
MOST_COLUMNS = 64
LARGEST = 1e30  # a mean of larger numbers could overflow
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,59}")
KEYS = ("file", "model", "prompt_index", "prompt", "seed", "images")  # columns that say which image it is
Place = tuple[str, int]  # the sampler's name and the prompt's index


class GivenScore(Metric):
    """A metric whose scores come from a file. Its figure is their mean."""


@dataclass(frozen=True)
class Images:
    """The images of an evaluation that may have scores: those of `samplers` for `prompts`, from noise of `seed`."""

    samplers: Sequence[str]
    prompts: Sequence[str]
    seed: int

    @classmethod
    def of(cls, ladder: LadderEvaluation) -> "Images":
        """Return the images of an evaluation."""
        prompts = [ladder.prompts[index] for index in range(ladder.size)]
        return cls([spec.name for spec in ladder.samplers], prompts, ladder.seed)


@dataclass
class GivenScores:
    """The scores in all files: `values[column][sampler]` is a list with a score for each prompt.

    `marks` maps the name of a sampler to the mark of its images, which the column `images` of a file repeats (see
    `store.ImageFiles`), and to the file and line that says so. `facts` says which files were read, with their hashes.
    """

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    marks: dict[str, tuple[str, str]] = field(default_factory=dict)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def require_images(self, marks: Mapping[str, str]) -> None:
        """Raise `UserError` if scores belong to other images of a sampler than those with its mark in `marks`."""
        for sampler, (mark, where) in self.marks.items():
            if marks[sampler] != mark:
                raise UserError(
                    f"{where}: the scores are of other images of {sampler!r}, made with other weights or settings; score the "
                    "images of this evaluation, with the manifest.jsonl beside them"
                )

    def join(self, metrics: MetricSuite, samplers: Mapping[str, Collected]) -> MetricSuite:
        """Return `metrics` with one more for each column, and add the scores to the measurements in `samplers`."""
        for column, by_sampler in self.values.items():
            for sampler, collected in samplers.items():
                scores = torch.tensor(by_sampler[sampler], dtype=torch.float64)
                collected.scores[column] = [scores[collected.indices]]
        return MetricSuite({**metrics.metrics, **{name: GivenScore() for name in self.values}}, metrics.extractors)


def read_scores(files: Sequence[str | Path], images: Images, metrics: Sequence[str]) -> GivenScores:
    """Return the scores in `files`, which must have one for each of `images` in each column.

    `metrics` are the names of the metrics of the evaluation, which no column may have. Raises `UserError` that names file and
    line for anything else.
    """
    found, table = GivenScores(), _Table(images, list(metrics))
    for path in map(Path, files):
        content = _content(path)
        columns = table.add(path, _rows(path, content))
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        found.facts.append({"file": str(path), "hash": digest, "columns": columns})
    for column, scores in table.scores.items():
        for sampler in images.samplers:
            rows = [scores.get((sampler, index)) for index in range(len(images.prompts))]
            if None in rows:
                raise UserError(
                    f"{table.origins[column]}: {column} has no score of {sampler!r} for prompt {rows.index(None)}; score all "
                    f"{len(rows)} images of each sampler, or leave this model out"
                )
            found.values.setdefault(column, {})[sampler] = [score for score in rows if score is not None]
    found.marks = table.marks
    return found


def _content(path: Path) -> bytes:
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"--scores {path} must be a .csv or .jsonl file")
    try:
        with open_regular(path, MOST_BYTES) as file:
            return file.read()
    except OSError as error:
        reason = (error.strerror or first_line(error)).rstrip(".")
        raise UserError(f"--scores {path} cannot be read ({reason}); pass a file of at most 256 MB") from error


def _rows(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of the line and the cells by column of each row. Raises `UserError` for what is no table."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: it is not UTF-8; save the file as UTF-8") from error
    yield from _objects(path, text) if path.suffix.lower() == ".jsonl" else _cells(path, text)


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: it is not JSON; write one object on each line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: it must be an object such as {{...}}; write one on each line")
        yield number, row


def _cells(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if names is None:
                names = [name.strip() for name in cells]
                if twice := [name for name in names if names.count(name) > 1]:
                    raise UserError(f"{path}, line 1: the column {twice[0][:80]!r} is there twice; rename one")
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{path}, line {reader.line_num}: it has {len(cells)} cells, but the first line names {len(names)} columns"
                    "; write one cell for each column"
                )
            yield reader.line_num, dict(zip(names, cells))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: it is not CSV ({first_line(error)}); write it anew"
        ) from error


class _Table:
    """The scores that were read so far: `scores[column]` maps a sampler and an index to a score."""

    def __init__(self, images: Images, metrics: Sequence[str]) -> None:
        self.images, self.metrics = images, metrics
        self.folders = {file_name(sampler): sampler for sampler in images.samplers}
        self.scores: dict[str, dict[Place, float]] = {}
        self.origins: dict[str, Path] = {}
        self.marks: dict[str, tuple[str, str]] = {}

    def add(self, path: Path, rows: Iterator[tuple[int, dict[str, Any]]]) -> list[str]:
        """Add the rows of a file, and return the names of its columns with scores."""
        columns: list[str] = []
        for number, row in rows:
            where = f"{path}, line {number}"
            own = [name for name in row if name not in KEYS]
            if not columns:
                columns = self._checked(own, where, path)
            if own != columns and set(own) != set(columns):
                name = min(set(own) ^ set(columns))
                raise UserError(f"{where}: it must have the columns of the rows before it, unlike {name[:80]!r}")
            place = self._place(row, where)
            for column in columns:
                if place in self.scores[column]:
                    raise UserError(
                        f"{where}: {column} has a score of {place[0]!r} for prompt {place[1]} already; remove one"
                    )
                self.scores[column][place] = _number(row[column], f"{where}: {column}")
        if not columns:
            raise UserError(f"--scores {path} has no rows; write a line for each image")
        return columns

    def _checked(self, columns: list[str], where: str, path: Path) -> list[str]:
        for name in columns:
            shown = f"{where}: the column {name[:80]!r}"
            if not NAME.fullmatch(name):
                raise UserError(f"{shown} must have a name of at most 60 letters, digits, _, . and -, from a letter on")
            taken = name in COLUMNS or any(name == other or name.startswith(f"{other}_") for other in self.metrics)
            if taken:
                raise UserError(f"{shown} has the name of a figure of this evaluation; rename it")
            self.scores.setdefault(name, {})
            self.origins[name] = path
        if not columns:
            raise UserError(f"{where}: there is no column with scores beside {', '.join(KEYS)}; add one")
        if len(self.scores) > MOST_COLUMNS:
            raise UserError(f"{where}: there are more than {MOST_COLUMNS} columns of scores; leave some out")
        return columns

    def _place(self, row: Mapping[str, Any], where: str) -> Place:
        """Return the sampler and the prompt's index of a row, after all that the row says of its image is compared."""
        model, index = _known(row, "model"), _known(row, "prompt_index")
        named = self._of_file(_known(row, "file"), where)
        if named is None and (model is None or index is None):
            raise UserError(f"{where}: it needs file, or model and prompt_index, of the manifest.jsonl of the images")
        if model is not None and model not in self.images.samplers:
            raise UserError(
                f"{where}: there is no sampler {str(model)[:80]!r}, but {', '.join(map(repr, self.images.samplers))}"
            )
        place = named or (str(model), _index(index, where))
        if (model is not None and model != place[0]) or (index is not None and _index(index, where) != place[1]):
            raise UserError(f"{where}: file is of another image than model and prompt_index; correct one")
        self._compare(row, place, where)
        return place

    def _compare(self, row: Mapping[str, Any], place: Place, where: str) -> None:
        """Raise `UserError` if the row's prompt, seed or mark is not that of its image."""
        if place[1] >= len(self.images.prompts):
            raise UserError(f"{where}: there is no prompt {place[1]}, but only {len(self.images.prompts)} prompts")
        prompt, seed, mark = (_known(row, name) for name in ("prompt", "seed", "images"))
        if prompt is not None and prompt != self.images.prompts[place[1]]:
            raise UserError(
                f"{where}: the score is for {str(prompt)[:60]!r}, but prompt {place[1]} is "
                f"{self.images.prompts[place[1]][:60]!r}; pass the --prompts of the images"
            )
        if seed is not None and str(seed).strip() != str(self.images.seed):
            raise UserError(f"{where}: seed is {str(seed)[:40]!r}, but this evaluation has --seed {self.images.seed}")
        if mark is not None and self.marks.setdefault(place[0], (str(mark), where))[0] != str(mark):
            raise UserError(f"{where}: images differs from that of other rows of {place[0]!r}; score all images anew")

    def _of_file(self, name: Any, where: str) -> Place | None:
        """Return the sampler and the prompt's index that the image's path SAMPLER/NUMBER.png says, or None without a path."""
        if name is None:
            return None
        folder, _, number = "/".join(PurePosixPath(str(name)).parts[-2:]).partition("/")
        found = re.fullmatch(r"([0-9]{6,9})\.png", number)
        if folder not in self.folders or found is None:
            raise UserError(f"{where}: the file {str(name)[:200]!r} is in no manifest.jsonl of this evaluation")
        return self.folders[folder], int(found[1])


def _known(row: Mapping[str, Any], name: str) -> Any:
    """Return a cell, or None if it is missing or empty."""
    value = row.get(name)
    return None if value is None or (isinstance(value, str) and not value.strip() and name != "prompt") else value


def _index(value: Any, where: str) -> int:
    text = str(value).strip()
    if isinstance(value, bool | float) or not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{where}: prompt_index is {text[:40]!r}, but must be a number from 0")
    return int(text)


def _number(value: Any, what: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:  # NaN compares as false
        raise UserError(f"{what} is {str(value)[:40]!r}, but must be a finite number")
    return number
