"""What a run was measured on: its matrix-product ceiling, the memory of a piece of work, and the facts of a result file."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import evidence


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of a piece of work, the device waited for."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matrix_ceiling(device: str, dtype: torch.dtype, repeats: int = 5, side: int | None = None) -> float:
    """The most FLOP/s that a square matrix product of some side reaches here: the best of some repeats."""
    side = side or (8192 if device.startswith("cuda") else 1024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    times = 10 if device.startswith("cuda") else 2

    def products() -> None:
        for _ in range(times):
            a @ b

    return max(2 * side**3 * times / seconds_of(products, device) for _ in range(repeats))


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention in a piece of work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """The most that was allocated at a time during the work: on CUDA in all, on a CPU beyond what was there before."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    sizes = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if hasattr(event.extra_fields, "alloc_size"):
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        held += size
        peak = max(peak, held)
    return peak


def facts(device: str, command: str) -> dict[str, str]:
    """Date, hardware, versions, commit and command."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    hardware = f"{os.cpu_count()} CPU cores ({processor()}), {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        hardware = f"{torch.cuda.get_device_name()}, {hardware}"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware,
        "load before": f"{os.getloadavg()[0]:.1f} processes",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": git.stdout.strip() or "unknown",
        "command": command,
    }


def processor() -> str:
    """The name of the processor, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def command_of(module: str) -> str:
    """The command line as it was given."""
    return " ".join([f"python -m {module}", *sys.argv[1:]])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a table."""
    head = list(rows[0])
    lines = [head, [" --- "] * len(head), *([str(row[name]) for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)


def write_results(
    name: str, title: str, result: dict[str, Any], tables: dict[str, Sequence[dict[str, Any]]], publish: bool
) -> Path:
    """Write the result as JSON, and its facts and tables as Markdown, where `evidence.write` does; the latter's path."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in result["facts"].items())]
    for heading, rows in tables.items():
        lines += ["", f"## {heading}", "", markdown(rows)]
    return evidence.write(name, json.dumps(result, indent=2) + "\n", "\n".join(lines) + "\n", publish)
