"""Single kernels and single calls: the ceiling of products, torch's attentions, and where the time of a call goes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.record import Record
from benchmarks.gpu.sizes import ATTENTION_SHAPES
from benchmarks.machine import matrix_ceiling, seconds_of

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
REPEATS = 10
KINDS = {  # of kernels, by parts of their names; what has none of them is element-wise
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "::mm", "::bmm", "matmul"),
    "copies": ("memcpy", "memset"),
}


def ceiling(record: Record, device: str, size: str, peak: float | None) -> float:
    """Measure the best square product in bfloat16, and write it; FLOP/s."""
    found = matrix_ceiling(device, torch.bfloat16, repeats=3, side=256 if size == "toy" else None)
    share = {} if peak is None else {"of the data sheet": found / peak}
    record.put("Ceiling", "square product, bfloat16", **{"TFLOP/s": found / 1e12}, **share)
    return found


def attentions(record: Record, device: str, size: str) -> None:
    """Time each of torch's attentions forward and backward at the shapes of the networks, in bfloat16."""
    for name, shape in ATTENTION_SHAPES[size].items():
        for backend in BACKENDS:
            record.attempt(
                f"{name}, {backend.lower()}", lambda n=name, s=shape, b=backend: _attention(record, device, n, s, b)
            )


def _attention(record: Record, device: str, name: str, shape: tuple[int, ...], backend: str) -> None:
    samples, heads, tokens, width = shape
    flops = 4 * samples * heads * tokens**2 * width
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        forward = milliseconds(lambda: scaled_dot_product_attention(q, k, v), device)
        out = scaled_dot_product_attention(q, k, v)
        backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True), device)
    record.put(
        "Attention",
        f"{name}, {backend.removesuffix('_ATTENTION').lower()}",
        **{
            "forward, ms": forward,
            "forward, TFLOP/s": flops / forward / 1e9,
            "backward, ms": backward,
            "backward, TFLOP/s": 2.5 * flops / backward / 1e9,
        },
    )


def milliseconds(work: Callable[[], Any], device: str, repeats: int = REPEATS) -> float:
    """The mean time of `work`, after two calls that are not timed."""
    work(), work()

    def several() -> None:
        for _ in range(repeats):
            work()

    return 1e3 * seconds_of(several, device) / repeats


def profiled(record: Record, name: str, work: Callable[[], Any], device: str) -> None:
    """Profile a piece of work that has run before: a row of shares by kind, and the table of kernels in a file of its own."""
    on_gpu = device.startswith("cuda") and ProfilerActivity.CUDA in torch.profiler.supported_activities()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        seconds_of(work, device)
    events = profiler.key_averages()
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    by_kind: Counter[str] = Counter()
    for key, time in times.items():
        by_kind[kind_of(key)] += time
    total = sum(by_kind.values()) or 1
    record.put("Where the time goes", name, **{kind: by_kind[kind] / total for kind in (*KINDS, "element-wise")})
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    record.text(f"profile_{name.replace(' ', '_').replace(',', '')}", events.table(sort_by=order, row_limit=40))


def kind_of(kernel: str) -> str:
    """Which of `KINDS` a kernel is by its name."""
    lowered = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lowered for part in parts)), "element-wise")
