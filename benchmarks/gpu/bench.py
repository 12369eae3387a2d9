"""The networks of a size under measurement: cycles of each order with seconds, operations, memory, host waits and compilations."""

import statistics
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import Comparison
from benchmarks.gpu.plans import Plans
from benchmarks.gpu.record import Record
from benchmarks.gpu.sizes import label
from benchmarks.machine import peak_bytes, seconds_of
from benchmarks.set_up import compute_of
from benchmarks.sizes import Size

STEP, PHASES, PEAK, WAITS = "Step time", "Seconds of an iteration by phase", "Peak memory", "Host waits"
SYNCHRONIZING = "called a synchronizing CUDA operation"  # in the warning of torch.cuda.set_sync_debug_mode


class Bench(Comparison):
    """A `Comparison` whose batch and options may change between measurements; also in the order "eager", ours not compiled."""

    def use(self, size: Size) -> None:
        """Measure with the batch, the parts and the recomputation of another size from now on; the networks stay."""
        self.size = size
        self.module.compute = compute_of(size)
        self.module.rollouts = self.module.make_rollouts(self.module.device)
        self.clean()

    def clean(self) -> None:
        """Drop what an iteration leaves behind that ended in an error."""
        self.module.rollouts.forget()
        for optimizer in (*self.optimizers.values(), *self.authors.optimizers.values()):
            optimizer.zero_grad(set_to_none=True)
        if self.size.device.startswith("cuda"):
            torch.cuda.empty_cache()


@dataclass
class Timed:
    """Cycles of one order at one size, as they come: seconds of each cycle, and what they did in all."""

    bench: Bench
    order: str
    seconds: list[float] = field(default_factory=list)
    calls: int = 0

    @property
    def per_iteration(self) -> float:
        """The mean seconds of an iteration."""
        return statistics.fmean(self.seconds) / self.bench.objective.student_every

    def cycle(self, number: int) -> None:
        """Run and time one cycle."""
        before = self.bench.calls
        self.seconds.append(seconds_of(partial(self.bench.cycle, self.order, number), self.bench.size.device))
        self.calls += self.bench.calls - before

    def figures(self, flops: float, ceiling: float, peak: float | None) -> dict[str, Any]:
        """What the table says of the cycles so far; `flops` are those of a call by one sample."""
        size, every = self.bench.size, self.bench.objective.student_every
        samples, total = len(self.seconds) * every * size.batch, sum(self.seconds)
        rate = self.calls * flops / total
        shares = {"MFU": rate / peak} if peak else {}
        return {
            "cycles": len(self.seconds),
            "seconds an iteration": self.per_iteration,
            "least": min(self.seconds) / every,
            "most": max(self.seconds) / every,
            "samples/s": samples / total,
            "calls a sample": self.calls / samples,
            "model TFLOP/s": rate / 1e12,
            **shares,
            "of the ceiling": rate / ceiling,
        }


@dataclass
class Session:
    """The measurements of one command on one kind of networks: where they are written, and what they are compared with."""

    record: Record
    bench: Bench
    name: str  # in benchmarks/sizes.py
    ceiling: float
    peak: float | None
    plans: Plans
    flops: float = 0.0
    times: dict[str, Timed] = field(default_factory=dict)

    def row(self, order: str) -> str:
        """What the present size's row of an order is called."""
        return f"{self.name}, {label(self.bench.size)}, {order}"

    def measure(self, order: str, cycles: int, warm_up: int = 1) -> bool:
        """Time an order at the present size, with its phases and its peak; whether at least one cycle was timed."""
        timed = self.times.setdefault(self.row(order), Timed(self.bench, order))
        made = self.record.attempt(f"{self.row(order)}: warm-up", lambda: self._warm(order, warm_up))
        for number in range(cycles if made else 0):
            needed = 1.5 * (timed.seconds or [0.0])[-1]
            if not self.record.attempt(
                f"{self.row(order)}: cycle {number}", lambda n=number: self._timed(timed, n), needed
            ):
                break
        self.bench.clean()
        return bool(timed.seconds)

    def _warm(self, order: str, cycles: int) -> None:
        self.flops = self.flops or self.bench.forward_flops()
        for number in range(cycles):
            self.bench.cycle(order, number)
        self.bench.authors.seconds.clear()
        self.bench.module.timer.seconds.clear()
        if self.bench.size.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()

    def _timed(self, timed: Timed, number: int) -> None:
        timed.cycle(number)
        row, module = self.row(timed.order), self.bench.module
        self.record.put(STEP, row, **timed.figures(self.flops, self.ceiling, self.peak))
        seconds = self.bench.authors.seconds if timed.order == "authors" else module.timer.seconds
        iterations = len(timed.seconds) * self.bench.objective.student_every
        phases = {name: value / iterations for name, value in seconds.items()}
        self.record.put(PHASES, row, **phases, rest=timed.per_iteration - sum(phases.values()))
        if self.bench.size.device.startswith("cuda"):
            self.peaks(row, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())

    def peaks(self, row: str, allocated: float, reserved: float | None = None) -> None:
        """Write measured bytes beside the plan, if it is there by now."""
        size, others = self.bench.size, {} if reserved is None else {"reserved, GB": reserved / 1e9}
        plan = self.plans.found().get((self.name, size.batch, size.accumulate))
        if plan is not None and not row.endswith("authors"):
            others |= {"planned, GB": plan["all"] / 1e9, "planned / measured": plan["all"] / allocated}
        self.record.put(PEAK, row, **{"measured, GB": allocated / 1e9, **others})

    def waits(self, order: str) -> None:
        """Count where the host waits for the device in one cycle; the timer, which waits on purpose, is off."""
        timer, device = self.bench.module.timer, self.bench.module.timer.device
        timer.device = None
        try:
            found = host_waits(partial(self.bench.cycle, order, 0))
        finally:
            timer.device = device
        every = self.bench.objective.student_every
        places = "; ".join(f"{count} {place}" for place, count in found.most_common(5))
        self.record.put(
            WAITS, self.row(order), **{"an iteration": sum(found.values()) / every, "places": places or "none"}
        )

    def plan_rows(self, seconds: float) -> None:
        """Write the plans that were not ready when their peaks were measured; waits for them."""
        found, table = self.plans.found(seconds), self.record.tables.get(PEAK, {})
        for key, row in list(table.items()):
            for (name, batch, parts), plan in found.items():
                of = f"{name}, batch {batch}" + (f" in {parts} parts" if parts > 1 else "") + ","
                if key.startswith(of) and not key.endswith("authors") and "planned, GB" not in row:
                    ratio = plan["all"] / 1e9 / row["measured, GB"]
                    self.record.put(PEAK, key, **{"planned, GB": plan["all"] / 1e9, "planned / measured": ratio})


def host_waits(work: Any) -> Counter[str]:
    """Where torch says that the host waited for a CUDA device: place of the project -> times; empty without a device."""
    if not torch.cuda.is_available():
        work()
        return Counter()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if SYNCHRONIZING in str(w.message))


def peak_on_cpu(bench: Bench, order: str) -> float:
    """On a CPU, which counts from zero: the live tensors of a cycle, with networks and Adam states."""
    return bench.static_bytes() + peak_bytes(partial(bench.cycle, order, 0), "cpu")
