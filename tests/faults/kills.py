"""Runs that are killed or told to stop at chosen and at random moments, over all layouts, and what they lost by it.

A moment is the count of a process's file events (files opened, renamed and removed), so the same seed gives the same
moments on every machine; or seconds, for what happens between them.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from killable import POINTS, Run, die, die_at, start

from cdm_lightning.checkpoint.folder import checkpoints_in, iteration_of
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.errors import UserError
from faults.bases import SD3
from faults.engine import Result

EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "os.link",
    "os.symlink",
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LEFTOVERS = (".saving_", ".removing_", ".tmp", ".old")
LOST_PROCESS = "another process of this run has ended"
ENDS_WITHIN = 180.0  # seconds until processes whose sibling was killed have to be gone
TOY = (
    "experiment=toy2d_cdm",
    "trainer.accelerator=cpu",
    "backbone.hidden=8",
    "backbone.depth=1",
    "backbone.fit_steps=2",
    "data=prompts",
    "data.num_workers=1",
    "data.val_batch_size=4",
    "data.val_prompts=4",
    "trainer.max_steps=24",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=2",
    "checkpoint.every=3",
    "checkpoint.best=val/energy_distance/student_4",
    "callbacks=ladder",
    "callbacks.ladder.evaluation.count=4",
)
PIPELINE = (
    *(text for text in SD3 if text.partition("=")[0] not in ("run_name", "callbacks", "trainer.limit_val_batches")),
    "data.num_workers=1",
    "trainer.max_steps=6",
    "trainer.val_check_interval=2",
    "checkpoint.every=2",
    "callbacks=ladder",
    "callbacks.ladder.evaluation.count=2",
    "callbacks.ladder.evaluation.samplers="
    "[{_target_: cdm_lightning.evaluation.samplers.SamplerSpec, name: student 1 step, nfe: 1}]",
    "validation.samplers=[{_target_: cdm_lightning.evaluation.samplers.SamplerSpec, name: student_1, nfe: 1}]",
)


@dataclass(frozen=True)
class Layout:
    """A command, and the number of processes that run it."""

    name: str
    overrides: Sequence[str]
    processes: int = 1


# These processes have no launcher that ends one when the other is gone, so the timeout is what bounds the wait.
SPREAD = (*TOY, "trainer.devices=2", "data.batch_size=2", "strategy.timeout=60")
LAYOUTS = (
    Layout("single, exporting", PIPELINE),
    Layout("single", (*TOY, "strategy=single", "data.batch_size=4")),
    Layout("ddp", (*SPREAD, "strategy=ddp"), 2),
    Layout("fsdp2", (*SPREAD, "strategy=fsdp2"), 2),
)


def die_at_event(rank: int, place: str, count: int, of_rank: int, tally: str) -> None:
    """Let the process of `of_rank` kill itself at its `count`-th file event below `place`; all events go to `tally`."""
    os.setsid()
    if rank != of_rank:
        return
    seen, process = [0], os.getpid()
    descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def watch(event: str, arguments: tuple) -> None:
        if event not in EVENTS or os.getpid() != process or not arguments:
            return
        path = arguments[0]
        if isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(place):
            seen[0] += 1
            os.pwrite(descriptor, str(seen[0]).encode(), 0)
            if seen[0] == count:
                die()

    sys.addaudithook(watch)


def die_at_point(rank: int, point: str, count: int, of_rank: int) -> None:
    """`die_at` in a session of its own, so that what is left of it can be found."""
    os.setsid()
    die_at(rank, point, count, of_rank)


class Soak:
    """A run in one layout that is disturbed again and again, and its undisturbed twin."""

    def __init__(self, layout: Layout, place: Path, rng: random.Random) -> None:
        self.layout, self.place, self.rng = layout, place, rng
        self.straight, self.round = place / "straight", 0
        self.straight.mkdir(parents=True)
        began = time.monotonic()
        run = self._start(self.straight, 0, 0)
        if run.wait(600) != [0] * layout.processes:
            raise RuntimeError(f"the undisturbed run of {layout.name} fails:\n{run.output}")
        self.seconds = time.monotonic() - began
        self.events = int((self.straight.parent / "tally").read_text() or 0)

    def rounds(self, disturbances: int, kinds: Sequence[str]) -> list[Result]:
        """Disturb runs so often, a few times each; every run then has to end as the undisturbed one."""
        results: list[Result] = []
        while len(results) < disturbances:
            self.round += 1
            folder = self.place / f"round_{self.round}"
            folder.mkdir()
            some = [self._disturb(folder, self.rng.choice(kinds)) for _ in range(min(4, disturbances - len(results)))]
            problem = self._end(folder)
            if problem is not None:
                for result in some:
                    result.faults.append(problem[0])
                    result.outcome, result.said = "failed", problem[1]
            results += some
        return results

    def _disturb(self, folder: Path, kind: str) -> Result:
        victim = self.rng.randrange(self.layout.processes)
        if kind == "kill at a file event":
            count = self.rng.randint(1, max(2, self.events))
            what = f"event {count}"
            run = self._start(folder, count, victim)
        elif kind == "kill at a point of a save":
            point, count = self.rng.choice(POINTS), self.rng.randint(1, 3)
            victim = victim if point in ("step", "shard") else 0  # the first process alone does the rest
            what = f"{point} {count}"
            run = start(self.layout.overrides, folder, self.layout.processes, die_at_point, (point, count, victim))
        else:
            run = self._start(folder, 0, victim)
            seconds = self.rng.uniform(0, self.seconds)
            what = f"{seconds:.2f} s"
            end = time.monotonic() + seconds
            while time.monotonic() < end and run.processes[victim].is_alive():
                run.processes[victim].join(0.02)
            self._deliver(run, kind, victim)
        return self._judge(folder, kind, f"{what} of process {victim}", run, victim)

    def _deliver(self, run: Run, kind: str, victim: int) -> None:
        number = signal.SIGKILL if kind.startswith("kill") else signal.Signals[kind.split(" ")[0]]
        for rank, process in enumerate(run.processes):
            if "all" in kind or "group" in kind or rank == victim:
                try:
                    (os.killpg if "group" in kind else os.kill)(process.pid, number)
                except ProcessLookupError:
                    continue

    def _judge(self, folder: Path, kind: str, moment: str, run: Run, victim: int) -> Result:
        line = f"{kind} at {moment}, seed {self.layout.name}: train {' '.join(self.layout.overrides)}"
        result = Result(
            f"{self.layout.name}: {self.round}, {kind} at {moment}", f"kills: {self.layout.name}", line, "saved"
        )
        begin = time.monotonic()
        try:
            codes = run.wait(ENDS_WITHIN)
        except AssertionError as hanging:
            codes, result.faults = [], ["hang"]
            result.said = str(hanging)[-300:]
        result.seconds = time.monotonic() - begin
        if "Traceback" in run.output and not kind.startswith("kill"):
            result.faults.append("traceback")
            result.said = run.output.strip().splitlines()[-1]
        expected = {0, 75}
        if kind.endswith("to one") and 75 in codes and LOST_PROCESS in run.output:
            expected.add(2)  # of the others, if the one was stopped while it was loading (docs/resume.md)
        if not kind.startswith("kill") and not set(codes) <= expected:
            result.faults.append("ended")
            result.said = f"exit statuses {codes}: {run.output.strip()[-300:]}"
        if left := survivors(run):
            result.faults.append("hang")
            result.said = f"{len(left)} processes of the run are still there"
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        for path in checkpoints_in(folder / "checkpoints"):
            if read_checkpoint(path).find_fault():
                result.faults.append("lost")
                result.said = f"{path.name} is damaged"
        newest = max([iteration_of(path) for path in checkpoints_in(folder / "checkpoints")], default=0)
        before = int((folder / "newest").read_text()) if (folder / "newest").exists() else 0
        (folder / "newest").write_text(str(newest))
        if newest < before:
            result.faults.append("lost")
            result.said = f"iteration {before} was there before, and now {newest} is the newest"
        result.outcome = "failed" if result.faults else "saved"
        return result

    def _end(self, folder: Path) -> tuple[str, str] | None:
        """Let the run go on to its end; what is wrong with it then."""
        run = self._start(folder, 0, 0)
        try:
            codes = run.wait(600)
        except AssertionError as hanging:
            return "hang", str(hanging)[-300:]
        if any(codes):
            return "lost", f"the same command ended with {codes}: {run.output.strip()[-400:]}"
        difference = first_difference(self.straight, folder)
        if difference is not None:
            return "lost", difference
        left = [
            path.name
            for path in folder.rglob("*")
            if path.name.startswith(LEFTOVERS[:2]) or path.name.endswith(LEFTOVERS[2:])
        ]
        return ("outside", f"left over: {', '.join(left)}") if left else None

    def _start(self, folder: Path, count: int, victim: int) -> Run:
        tally = str(self.place / "tally")
        arguments = (str(folder), count, victim, tally)
        return start(self.layout.overrides, folder, self.layout.processes, die_at_event, arguments)


def survivors(run: Run, seconds: float = 60.0) -> list[int]:
    """Processes of the run's sessions that are still there after some time: its data workers, for example."""
    sessions, end = {process.pid for process in run.processes}, time.monotonic() + seconds
    while True:
        found = [pid for pid, session in _sessions() if session in sessions]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def _sessions() -> list[tuple[int, int]]:
    """Each living process and its session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found.append((int(path.parent.name), int(fields[3])))
    return found


def first_difference(straight: Path, other: Path) -> str | None:
    """What differs between the last checkpoints, exports and reports of two runs; None if all is equal bit for bit."""
    ends = [checkpoints_in(folder / "checkpoints") for folder in (straight, other)]
    if not all(ends):
        return "there is no checkpoint"
    try:
        left, right = (read_checkpoint(paths[-1]) for paths in ends)
    except UserError as error:
        return str(error)
    if left.record != right.record:
        return f"the records differ: {left.record} and {right.record}"
    tensors, others = left.tensors(), right.tensors()
    if tensors.keys() != others.keys():
        return "the names of tensors differ"
    unequal = [name for name, value in tensors.items() if not torch.equal(value, others[name])]
    if unequal:
        return f"{unequal[0]} differs"
    for name in ("best.json", "../metrics.json", "../table.md", "../student/model_index.json"):
        files = [folder / "checkpoints" / name for folder in (straight, other)]
        if [file.exists() for file in files] != [files[0].exists()] * 2:
            return f"{name} is missing"
    weights = [sorted((folder / "student").rglob("*.safetensors")) for folder in (straight, other)]
    for one, two in zip(*weights, strict=True):
        if one.read_bytes() != two.read_bytes():
            return f"student/{one.name} differs"
    return None


KINDS = (
    "kill at a file event",
    "kill at a file event",
    "kill at a point of a save",
    "kill at a point of a save",
    "kill one",
    "kill all",
    *(f"{number.name} to {whom}" for number in SIGNALS for whom in ("one", "group")),
)


def disturb(
    kills: int,
    seed: int,
    place: Path,
    report: Callable[[Result], None],
    layouts: Sequence[Layout] = LAYOUTS,
    done: Sequence[Result] = (),
) -> list[str]:
    """So many disturbances, spread over the layouts; `report` is called with each round's. The keys of all.

    A layout is left out if as many of its disturbances are among those `done`.
    """
    keys: list[str] = []
    for number, layout in enumerate(layouts):
        share = kills // len(layouts) + (number < kills % len(layouts))
        before = [result.key for result in done if result.kind == f"kills: {layout.name}"]
        if len(before) >= share:
            keys += before[:share]
            continue
        folder = place / layout.name.replace(", ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            found = Soak(layout, folder, random.Random(f"{seed} {layout.name}")).rounds(share, KINDS)
        except (RuntimeError, AssertionError) as error:  # the undisturbed run itself fails; the other layouts go on
            found = [
                Result(
                    f"{layout.name}: undisturbed", f"kills: {layout.name}", "", "failed", ["ended"], str(error)[-500:]
                )
            ]
        for result in found:
            report(result)
            keys.append(result.key)
    return keys
