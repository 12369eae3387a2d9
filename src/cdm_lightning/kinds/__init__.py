"""The types that options can have, with their allowed values, such as `Count = Annotated[int, Ge(1), Le(10**9)]`.

Such a type is called a kind. It says in which range a number must be, or what a string or path stands for. Constructors
annotate their parameters with kinds, and pydantic checks the options of a configuration against these annotations (see
`config.arguments`). Commands check their command-line arguments against kinds (see `kinds.command_line`). NaN is always
refused, and infinity is refused unless the kind has the mark `Infinite`. See CONTRIBUTING.md.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

LONGEST_PART = 255  # bytes of one part of a path, on all common file systems


@dataclass(frozen=True)
class AnyFinite:
    """A mark in `Annotated[float, AnyFinite()]`: every number is allowed except NaN and infinity."""


@dataclass(frozen=True)
class Infinite:
    """A mark in `Annotated[float, Gt(0), Infinite()]`: infinity is allowed in addition to the numbers of the range."""


@dataclass(frozen=True)
class Text:
    """A mark in `Annotated[str, Text("a prompt")]`: it describes the strings that are allowed.

    `what` describes such a string in error messages. An empty string is allowed only with `may_be_empty`. If `pattern` is
    given, the whole string must match this regular expression.
    """

    what: str
    may_be_empty: bool = False
    pattern: str | None = None  # a regular expression for the whole text

    def problem(self, value: str) -> str | None:
        """Return what is wrong with the string `value`, such as "it is empty", or None if it is allowed."""
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            return "it is not one of these"
        if not value.strip() and not self.may_be_empty:
            return "it is empty"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "it has half a character or bytes that are not UTF-8"
        return "it has a NUL character" if "\0" in value else None


@dataclass(frozen=True)
class PathKind:
    """A mark in `Annotated[str | Path, PathKind("a folder")]`: it describes the paths that are allowed.

    `what` describes such a path in error messages. If `inside` is True, the path must be relative and must not contain
    "." or "..", so that it stays inside a folder. If `written` is True, a run writes to the path, so `config.folders`
    checks at every start of a run whether the path can be written. Whether a path exists is checked later, by the
    constructor that reads it.
    """

    what: str
    written: bool = False
    inside: bool = False

    def problem(self, value: str) -> str | None:
        """Return what is wrong with the path `value`, such as "it is empty", or None if it is allowed."""
        if not value.strip():
            return "it is empty"
        if "\0" in value:
            return "it has a NUL character"
        if any(len(part.encode("utf-8", "surrogatepass")) > LONGEST_PART for part in Path(value).parts):
            return f"a name in it is longer than {LONGEST_PART} bytes"
        if self.inside and (Path(value).is_absolute() or {".", ".."} & {*value.split("/")} or not Path(value).parts):
            return "it must be a name, or names joined by /, without . and .."
        return None


# ---- whole numbers

Count = Annotated[int, Ge(1), Le(10**9)]  # how many there are
CountOrNone = Annotated[int, Ge(0), Le(10**9)]  # 0 is none
Several = Annotated[int, Ge(2), Le(10**9)]  # for example the images of a set: a distance between sets needs at least 2
Iterations = Annotated[int, Ge(1), Le(10**12)]
Iteration = Annotated[int, Ge(0), Le(10**12)]  # the number of an iteration, or a duration that may be 0
BatchSize = Annotated[int, Ge(1), Le(10**6)]
Workers = Annotated[int, Ge(0), Le(1024)]
Processes = Annotated[int, Ge(1), Le(10**5)]
Pixels = Annotated[int, Ge(1), Le(32768)]  # a side of an image
Steps = Annotated[int, Ge(1), Le(1000)]  # of a path from noise to an image
Seed = Annotated[int, Ge(0), Lt(2**32)]
Width = Annotated[int, Ge(1), Le(65536)]  # of a layer
Tokens = Annotated[int, Ge(1), Le(65536)]
LayerCount = Annotated[int, Ge(0), Le(10_000)]
Pictures = Annotated[int, Ge(1), Le(256)]  # side by side in one picture
Index = Annotated[int, Ge(0)]  # of a prompt
BlockIndex = Annotated[int, Ge(-10_000), Le(10_000)]  # negative numbers count from the last block
DeviceIndex = Annotated[int, Ge(0), Le(10**5)]

# ---- numbers

Finite = Annotated[float, AnyFinite()]
Weight = Annotated[float, Ge(0), Le(1e6)]  # the factor of a loss term; a negative one would train away from the target
NotNegative = Annotated[float, Ge(0), Le(1e12)]
Positive = Annotated[float, Gt(0), Le(1e12)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
TeraFlops = Annotated[float, Ge(1e-3), Le(1e6)]  # TFLOP/s of one GPU; a planned time stays finite
Utilisation = Annotated[float, Ge(1e-4), Le(1)]
Sigma = Annotated[float, Gt(0), Le(1)]
InnerSigma = Annotated[float, Gt(0), Lt(1)]
Guidance = Annotated[float, Ge(0), Le(1000)]
Scale = Annotated[float, Ge(-1000), Le(1000)]  # of a LoRA; 0 is off, a negative one subtracts it
Rate = Annotated[float, Ge(0), Le(1000)]  # a learning rate
GradientNorm = Annotated[float, Gt(0), Infinite()]  # infinite: no clipping
Megabytes = Annotated[float, Ge(0), Le(1e9)]
Seconds = Annotated[float, Gt(0), Le(1e6)]  # a time limit; larger ones overflow in the operating system

# ---- texts

Name = Annotated[str, Text("a name")]
Prompt = Annotated[str, Text("a prompt", may_be_empty=True)]
Field = Annotated[str, Text("the name of a field or column")]
Revision = Annotated[str, Text("a revision: a branch, a tag or a commit")]
MetricName = Annotated[str, Text("the name of a validation metric, such as val/clip_score/student_4")]
FeatureName = Annotated[str, Text("the name of a feature extractor")]
Model = Annotated[str, Text("the id of a model or its folder")]
Weights = Annotated[str, Text("a file of weights or the name of one that the library knows")]
LayerEnding = Annotated[str, Text("the end of a layer's name, or a preset")]
Network = Annotated[str, Text("the name of a network")]
Choice = Annotated[str, Text("a name that the library knows")]
DeviceList = Annotated[str, Text("auto, or device numbers such as 0,1", pattern=r"auto|-1|\d+|(\d+,)+\d*")]
DevicesOption = Literal[-1] | Processes | DeviceList | Annotated[Sequence[DeviceIndex], MinLen(1)]
Overlong = Literal["skip", "refuse"]
ComputeDtype = Literal["float32", "bfloat16"]
DtypeName = Literal["float32", "bfloat16", "float16"]

# ---- paths

FileToRead = Annotated[str | Path, PathKind("a file")]
FolderToRead = Annotated[str | Path, PathKind("a folder")]
FileOrFolder = Annotated[str | Path, PathKind("a file or folder")]
FolderToWrite = Annotated[str | Path, PathKind("a folder to write", written=True)]
FolderOfRun = Annotated[str, PathKind("a folder inside the run's folder", written=True, inside=True)]
FolderInside = Annotated[
    str, PathKind("a name, or names joined by /", inside=True)
]  # inside a folder that another option names

NotEmpty = MinLen(1)
