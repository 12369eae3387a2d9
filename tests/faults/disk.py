"""A disk that is full at the N-th write of a run, for every N: once, for a while, or from then on.

A tiny C library before the system's own fails the writes below the run's folder, so no privileges are needed. It is
compiled here; without a compiler this part is left out by name.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from processes import ROOT, environment

from faults.engine import LEFT_OUT, Result
from faults.kills import PIPELINE, first_difference

SOURCE = Path(__file__).with_name("disk_full.c")
WHILE = 15  # writes that fail in "for a while"
ENDLESS = 10**9
SECONDS = 240.0
OVERRIDES = (
    *(
        text
        for text in PIPELINE
        if text.partition("=")[0] not in ("callbacks", "trainer.max_steps", "data.num_workers")
    ),
    "callbacks=demo",
    "callbacks.ladder.evaluation.real_images=null",
    "callbacks.ladder.evaluation.batch_size=2",
    "callbacks.sample_grid.num_prompts=1",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=4",
)


def library(place: Path) -> Path | None:
    """Compile the library into `place`; None without a compiler."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return None
    made = place / "disk_full.so"
    done = subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"], capture_output=True, check=False
    )
    return made if done.returncode == 0 else None


def fill(
    points: int, seed: int, place: Path, report: Callable[[Result], None], done: frozenset[str] = frozenset()
) -> list[str]:
    """Let the disk be full at so many points, spread over all writes; `report` is called with each. The keys of all."""
    place.mkdir(parents=True, exist_ok=True)
    loaded = library(place)
    if loaded is None:
        report(skipped := Result("disk full: no C compiler", "disk full", "", LEFT_OUT))
        return [skipped.key]
    variables = environment(LD_PRELOAD=str(loaded), HF_HUB_OFFLINE="1")
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), variables["PYTHONPATH"]])
    command = [sys.executable, "-m", "faults.disk", str(loaded), str(place), str(points), str(seed)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    server.stdin.write(json.dumps(sorted(done)))
    server.stdin.close()
    keys = []
    for line in server.stdout:
        found = json.loads(line)
        keys.append(found["key"])
        if found["outcome"] != "done before":
            report(Result(**found))
    if server.wait():
        raise RuntimeError("the process that tries full disks has failed; its last lines are above")
    return keys


def serve(loaded: Path, place: Path, points: int, seed: int) -> None:
    """Fork a run for each point; a line of JSON for each on stdout."""
    done = set(json.load(sys.stdin))
    import faults.preload  # noqa: F401

    disk = ctypes.CDLL(str(loaded))
    straight = place / "straight"
    straight.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(straight)
    count = place / "count"
    status = _fork(disk, straight, ENDLESS, ENDLESS, count)
    if status:
        raise SystemExit(f"the undisturbed run fails:\n{(straight.parent / 'straight.err').read_text()}")
    writes = int(count.read_text())
    for number in range(points):
        at = 1 + (number * writes + seed % writes) // points
        kind, length = (("once", 0), ("for a while", WHILE), ("from then on", ENDLESS))[number % 3]
        key = f"disk full: at write {at} of {writes}, {kind}"
        skipped = Result(key, "disk full", "", "done before")
        result = skipped if key in done else _try(disk, key, place, straight, at, at + length)
        print(json.dumps(result.as_json()), flush=True)


def _try(disk: ctypes.CDLL, key: str, place: Path, straight: Path, first: int, last: int) -> Result:
    folder, error = place / "tried", place / "tried.err"
    shutil.rmtree(folder, ignore_errors=True)
    result = Result(key, "disk full", f"train {' '.join(OVERRIDES)}", "saved")
    begin = time.monotonic()
    status = _fork(disk, folder, first, last, None)
    text = error.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    result.said = f"exit status {status}: {lines[-1][:300] if lines else ''}"
    if status is None:
        result.faults.append("hang")
    elif "Traceback" in text:
        result.faults.append("traceback")
    elif status not in (0, 2, 75):
        result.faults.append("ended")
    elif status == 2 and not (lines and lines[-1].startswith("error: ")):
        result.faults.append("not one line")
    again = _fork(disk, folder, ENDLESS, ENDLESS, None)
    if again:
        result.faults.append("lost")
        result.said += f"; with room it ends with {again}: {error.read_text(errors='replace').strip()[-300:]}"
    elif (difference := first_difference(straight, folder)) is not None:
        result.faults.append("lost")
        result.said += f"; with room: {difference}"
    result.outcome = "failed" if result.faults else "saved"
    result.seconds = time.monotonic() - begin
    return result


def _fork(disk: ctypes.CDLL, folder: Path, first: int, last: int, count: Path | None) -> int | None:
    """Train in `folder` with a disk that is full from the `first` to the `last` write; the exit status, None for a hang."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        _train(disk, folder, first, last, count)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


def _train(disk: ctypes.CDLL, folder: Path, first: int, last: int, count: Path | None) -> None:
    import traceback

    import torch

    from cdm_lightning.train import main

    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder.parent)
    sys.argv = ["train", *OVERRIDES, f"hydra.run.dir={folder}"]
    disk.disk_full(f"{folder}/".encode(), ctypes.c_long(first), ctypes.c_long(last))
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    if count is not None:
        count.write_text(str(disk.disk_writes()))
    os._exit(status)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
