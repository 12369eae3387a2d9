"""Run cases, each in a process that a server with everything imported forks, and say what came of each."""

import importlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from processes import FORKS, PRELOADED, environment, fork_workers

from faults.cases import Case, printable

FORKS.set_forkserver_preload([*PRELOADED, "faults.preload"])

HOME = {"thesis/chapter.tmp": b"ten years of work", "notes.txt": b"mine", ".cache.tmp": b"mine too"}
CANARY = "pwned"  # foreign code makes a file of this name
MOST_MEMORY = 12 << 30  # bytes of address space of one case, well above what the libraries map
MOST_FILE = 1 << 30  # bytes of a file that a case may write
MOST_NOTICES = 3  # lines before an error that count as notices
LEFT_OUT = "left out"  # the outcome of a case that could not be made here
FAULTS = {  # in the order of the table's columns
    "lost": "a file of somebody else, or a finished checkpoint, was changed or is gone",
    "foreign code": "code from an input was executed",
    "outside": "a file was written outside of the folders that were named",
    "leaked": "a secret was printed or stored",
    "traceback": "a traceback",
    "hang": "no end within the time limit",
    "accepted": "accepted although senseless",
    "late": "refused only after training had begun",
    "not one line": "refused with more than one line",
    "refused wrongly": "refused although it is a good input",
    "ended": "ended by a signal or with another exit status",
}


@dataclass
class Result:
    """What came of a case: "ran", "refused", "saved", "failed" or "left out"; the faults; and what it printed last."""

    key: str
    kind: str
    line: str
    outcome: str
    faults: list[str] = field(default_factory=list)
    said: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        """For a file of results."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.key}\n  faults: {', '.join(self.faults)}\n  {self.line}\n  said: {self.said}"


def run_all(
    cases: Iterable[Case],
    place: Path,
    stock: Path,
    workers: int = 1,
    report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run the cases, `workers` at a time, each in a box of its own below `place`; `report` is called after each."""

    def one(numbered: tuple[int, Case]) -> Result:
        number, case = numbered
        result = run(case, place / f"box_{os.getpid()}_{number}", stock)
        report(result)
        return result

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, enumerate(cases)))


def run(case: Case, box: Path, stock: Path) -> Result:
    """Run one case in the folder `box`, which is made and removed."""
    work, home = box / "work", box / "home"
    for folder in (work, home, box / "tmp"):
        folder.mkdir(parents=True)
    for name, content in HOME.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(content)
    if case.prepare is not None:
        try:
            case.prepare(work, stock)
        except (OSError, KeyError, IndexError, TypeError) as error:  # the stock does not have what it breaks (any more)
            shutil.rmtree(box)
            return Result(case.key, case.kind, case.line, LEFT_OUT, said=f"cannot be made: {error!r}")
    arguments = [text.replace("STOCK", str(stock)) for text in case.arguments]
    before, special = _listing(box), {name: _form(work / name) for name in case.keeps}
    begin = time.monotonic()
    status = execute(case, arguments, box)
    result = _judge(case, box, status)
    result.seconds = time.monotonic() - begin
    result.faults += [f for f in _damage(case, box, before) if f not in result.faults]
    if any(_form(work / name) != form for name, form in special.items()) and "lost" not in result.faults:
        result.faults.insert(0, "lost")
    if result.faults:
        result.outcome = "failed"
    shutil.rmtree(box, ignore_errors=True)
    return result


def execute(case: Case, arguments: Sequence[str], box: Path) -> int | None:
    """The exit status of the command (negative: the signal), or None if it had to be killed."""
    if case.fresh:
        return _execute_anew(case, arguments, box)
    process = FORKS.Process(target=_child, args=(str(box), case.command, arguments, dict(case.environment)))
    process.start()
    process.join(case.seconds)
    status = process.exitcode
    with suppress(ProcessLookupError):  # its data workers are in its group
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return status


def _execute_anew(case: Case, arguments: Sequence[str], box: Path) -> int | None:
    variables = environment(**_variables(str(box)), **case.environment)
    command = [sys.executable, "-m", _module(case.command), *arguments]
    with (box / "out.txt").open("wb") as out, (box / "err.txt").open("wb") as error:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            cwd=box / "work",
            env=variables,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(case.seconds + 60)  # for the imports
        status = process.poll()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status


def _module(command: str) -> str:
    return command if "." in command else f"cdm_lightning.{command}"


def _variables(box: str) -> dict[str, str]:
    """The environment of a case: all that libraries look up is in its box."""
    return {
        "HOME": os.path.join(box, "home"),
        "TMPDIR": os.path.join(box, "tmp"),
        "XDG_CACHE_HOME": os.path.join(box, "tmp", "cache"),
        "HF_HOME": os.path.join(box, "tmp", "huggingface"),
        "MPLCONFIGDIR": os.path.join(box, "tmp", "matplotlib"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def _child(box: str, command: str, arguments: Sequence[str], variables: dict[str, str]) -> None:
    os.setsid()
    fork_workers()
    work = os.path.join(box, "work")
    os.chdir(work)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out.txt", os.O_WRONLY), (2, "err.txt", os.O_WRONLY)):
        opened = os.open(os.path.join(box, name) if number else name, flags | (os.O_CREAT if number else 0), 0o644)
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update({**_variables(box), **variables})
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE, MOST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _tell_of_training(os.path.join(box, "trained"))
    sys.argv = [f"{command}.py", *arguments]
    importlib.import_module(_module(command)).main()


def _tell_of_training(path: str) -> None:
    """Leave a file at `path` once an iteration is done."""
    import torch

    from cdm_lightning.module import CDMModule

    torch.set_num_threads(1)
    original = CDMModule.training_step

    def telling(self, *batch):
        original(self, *batch)
        os.close(os.open(path, os.O_CREAT))

    CDMModule.training_step = telling


def _judge(case: Case, box: Path, status: int | None) -> Result:
    """The outcome by exit status and stderr alone."""
    error = (box / "err.txt").read_text(errors="replace") if (box / "err.txt").exists() else ""
    lines = [line for line in error.splitlines() if line.strip()]
    faults, outcome = [], {0: "ran", 2: "refused", 75: "saved"}.get(status, "failed")
    if status is None:
        faults.append("hang")
    if "Traceback (most recent call last)" in error:
        faults.append("traceback")
    elif outcome == "failed" and status is not None:
        faults.append("ended")
    if outcome == "refused" and not faults:
        by_argparse = bool(lines) and lines[0].startswith("usage: ") and ": error: " in lines[-1]
        if not by_argparse and not _is_one_line(lines):
            faults.append("not one line")
        if (box / "trained").exists():
            faults.append("late")
        if case.expects == "runs":
            faults.append("refused wrongly")
    if outcome in ("ran", "saved") and case.expects == "refused":
        faults.append("accepted")
    said = printable(lines[-1]) if lines else ""
    if "not one line" in faults:
        said = printable(" | ".join(lines))
    return Result(case.key, case.kind, case.line, "failed" if faults else outcome, faults, said)


def _is_one_line(lines: Sequence[str]) -> bool:
    """Whether there is one error, at the end, after a few notices of one line each."""
    *before, last = lines or [""]
    is_notice = [len(line) < 500 and not line.lower().startswith("error") for line in before]
    return last.startswith("error: ") and len(before) <= MOST_NOTICES and all(is_notice)


def _damage(case: Case, box: Path, before: set[str]) -> list[str]:
    """Faults that show on the disk."""
    home, found, after = box / "home", [], _listing(box)
    if any(not (home / name).is_file() or (home / name).read_bytes() != held for name, held in HOME.items()):
        found.append("lost")
    new = after - before
    if any(CANARY in Path(name).name for name in new):
        found.append("foreign code")
    allowed = ("work", "tmp", *(("home",) if case.into_home else ()))
    own = {"out.txt", "err.txt", "trained"}
    if any(Path(name).parts[0] not in allowed and name not in own for name in new):
        found.append("outside")
    if case.secrets and any(_holds(box / name, case.secrets) for name in new):
        found.append("leaked")
    return found


def _listing(folder: Path) -> set[str]:
    found = set()
    for parent, folders, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(parent, name), folder) for name in (*folders, *files)}
    return found


def _holds(file: Path, secrets: Sequence[str]) -> bool:
    if not stat.S_ISREG(file.lstat().st_mode):
        return False
    content = file.read_bytes()
    return any(secret.encode() in content for secret in secrets)


def _form(path: Path) -> tuple[Any, ...] | None:
    """What a name stands for: a link with the name in it; else kind, device and place, and the content of a regular file.

    None if it is gone. What a link points to is another name, which a case lists too if it has to stay.
    """
    try:
        found = path.lstat()
    except OSError:
        return None
    if stat.S_ISLNK(found.st_mode):
        return ("link", os.readlink(path))
    content = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
    return (stat.S_IFMT(found.st_mode), found.st_rdev, found.st_ino, content)
