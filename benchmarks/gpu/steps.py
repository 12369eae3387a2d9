"""The commands `step` and `compiled`: cycles of training at real sizes, without and with compiled blocks."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.bench import Bench, Session, peak_on_cpu
from benchmarks.gpu.plans import Plans
from benchmarks.gpu.record import Record
from benchmarks.gpu.sizes import NETWORKS, Networks, label, peak_of
from benchmarks.sizes import Size

COMPILATION = "Compilation"
CYCLES = 2  # timed ones of each row
FOR_PLANS = 90.0  # seconds to wait for plans at the end, if they are left


def step(record: Record, size: str, device: str) -> None:
    """Without compilation: kernels, then each network at each batch, its waits and its profile, and the authors' order."""
    _commands(record, size, device, _eager, None)


def compiled(record: Record, size: str, device: str, backend: str) -> None:
    """With compiled blocks beside the same step without: seconds of compilation, recompilations, and what options gain."""
    _commands(record, size, device, _compiled, backend)


def _commands(
    record: Record, size: str, device: str, measure: Callable[[Session, Networks], None], backend: str | None
) -> None:
    networks = NETWORKS[size]
    sizes = [(one.name, chosen) for one in networks for chosen in one.sizes(device)]
    plans, peak = Plans(sizes), peak_of(record.facts["hardware"])
    try:
        ceiling = kernels.ceiling(record, device, size, peak)
        if backend is None:
            kernels.attentions(record, device, size)
        for one in networks:
            record.attempt(
                one.name, lambda o=one: measure(_session(record, o, device, backend, ceiling, peak, plans), o)
            )
        if sessions := [s for s in _SESSIONS if s.record is record]:
            sessions[-1].plan_rows(min(FOR_PLANS, max(record.left, 0)))
    finally:
        _SESSIONS.clear()
        plans.close()


_SESSIONS: list[Session] = []  # of this command; the networks of earlier ones are gone


def _session(
    record: Record, one: Networks, device: str, backend: str | None, ceiling: float, peak: float | None, plans: Plans
) -> Session:
    for earlier in _SESSIONS:
        del earlier.bench  # its networks, before the next are built
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    began = time.perf_counter()
    bench = Bench(replace(one.sizes(device)[0], compile_backend=backend))
    record.put("Set-up", one.name, seconds=time.perf_counter() - began)
    session = Session(record, bench, one.name, ceiling, peak, plans)
    _SESSIONS.append(session)
    return session


def _eager(session: Session, one: Networks) -> None:
    bench, record = session.bench, session.record
    fitting: list[Size] = []
    for size in one.sizes(bench.size.device):
        bench.use(size)
        if session.measure("eager", CYCLES):
            fitting.append(size)
            _peak_on_cpu(session, "eager")
            _once(session, size, fitting)
    if fitting:
        bench.use(fitting[0])
        session.measure("authors", CYCLES)
        _peak_on_cpu(session, "authors")
        _ratios(session, fitting[0], ("eager",))
    record.put("Set-up", one.name, done=True)


def _once(session: Session, size: Size, fitting: list[Size]) -> None:
    """Host waits and the profile, at the first size that fits."""
    if len(fitting) > 1:
        return
    bench, record = session.bench, session.record
    needed = 2 * max(session.times[session.row("eager")].seconds)
    record.attempt(f"{session.name}: host waits", lambda: session.waits("eager"), needed)
    name = f"{session.name}, {label(size)}, student forward and backward"
    record.attempt(name, lambda: kernels.profiled(record, name, _student_call(bench), size.device), needed)


def _student_call(bench: Bench) -> Callable[[], Any]:
    """One call of the student on a batch, forward and backward."""
    module, size = bench.module, bench.size
    prompts = [f"prompt {number}" for number in range(size.batch)]
    x = torch.randn(size.batch, *module.backbone.latent_shape, device=size.device)
    sigma = torch.full((size.batch,), 0.5, device=size.device)

    def call() -> None:
        module.bind(prompts).student(x, sigma).square().mean().backward()
        bench.clean()

    return call


def _compiled(session: Session, one: Networks) -> None:
    bench = session.bench
    device = bench.size.device
    largest: Size | None = None
    for size in one.sizes(device):
        bench.use(replace(size, compile_backend=bench.size.compile_backend))
        session.record.attempt(f"{session.row('ours')}: compilation", partial(_compilation, session))
        if session.measure("ours", CYCLES, warm_up=0):
            largest = size
            _recompilations(session)
            _peak_on_cpu(session, "ours")
            session.measure("eager", 1)
            _ratios(session, size, ("ours", "eager"))
    if largest is None:
        return
    for name, change in OPTIONS.items():
        bench.use(replace(largest, **change))
        session.name = f"{one.name} ({name})"
        session.measure("ours", CYCLES)
    session.name = one.name
    bench.use(one.sizes(device)[0])
    session.measure("authors", 1)
    _ratios(session, bench.size, ("ours", "eager"))


OPTIONS: dict[str, dict[str, Any]] = {
    "attention kept": {"recompute_attention": False},
    "half of the blocks recompute": {"recompute": 0.5},
    "8 parts, nothing recomputes": {"recompute": 0.0, "accumulate": 8},
}


def _compilation(session: Session) -> None:
    """Run the cycles that will be timed, once, so that all their numbers of rows have been seen; seconds and variants."""
    began = time.perf_counter()
    for number in range(CYCLES):
        session.bench.cycle("ours", number)
    if session.bench.size.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    session.bench.module.timer.seconds.clear()
    figures = {"seconds of the first cycles": time.perf_counter() - began, **_variants()}
    session.record.put(COMPILATION, session.row("ours"), **figures)


def _variants() -> dict[str, int]:
    from torch._dynamo.utils import counters

    frames = counters["frames"]
    return {"variants": counters["stats"]["unique_graphs"], "calls given up": frames["total"] - frames["ok"]}


def _recompilations(session: Session) -> None:
    """How many variants the timed cycles compiled anew: none, where all that a run does is compiled once."""
    row = session.record.tables[COMPILATION].get(session.row("ours"), {})
    now = _variants()
    session.record.put(COMPILATION, session.row("ours"), recompiled=now["variants"] - row.get("variants", 0), **now)


def _peak_on_cpu(session: Session, order: str) -> None:
    if session.bench.size.device == "cpu":
        row = session.row(order)
        session.record.attempt(f"{row}: peak", lambda: session.peaks(row, peak_on_cpu(session.bench, order)))


def _ratios(session: Session, size: Size, orders: tuple[str, ...]) -> None:
    """How many times as fast as the slower order beside it each order is, at one size."""
    found = {order: session.times.get(f"{session.name}, {label(size)}, {order}") for order in (*orders, "authors")}
    seconds = {order: timed.per_iteration for order, timed in found.items() if timed is not None and timed.seconds}
    ratios = {
        f"{a} against {b}": seconds[b] / seconds[a]
        for a, b in (("ours", "eager"), ("ours", "authors"), ("eager", "authors"))
        if a in seconds and b in seconds
    }
    if ratios:
        session.record.put("Times as fast", f"{session.name}, {label(size)}", **ratios)
