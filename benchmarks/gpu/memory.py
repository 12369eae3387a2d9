"""The command `memory`: the peak of each phase of training and of decoding, beside what the planner says."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plans import Plans
from benchmarks.gpu.record import LEFT_OUT, Record
from benchmarks.gpu.sizes import CODECS, NETWORKS, Networks, label
from benchmarks.machine import peak_bytes
from benchmarks.sizes import Size
from cdm_lightning.training.phases import PhaseTimer

TRAINING, DECODING, RESTS = "Peak of each phase, GB", "Decoding, GB", "What rests, GB"
ADAM = "optimizer step"  # it is a part of the updates here, and a phase of its own in the plan
BATCHES = (1, 4, 16)
FOR_PLANS = 90.0  # seconds


class PeakTimer(PhaseTimer):
    """In the place of the phase timer: the most bytes that were allocated in each phase, in all."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.on_gpu = device.startswith("cuda")
        self.bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Note the peak of the `with` block."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.on_gpu:
            self.bytes[phase] = max(self.bytes.get(phase, 0), torch.cuda.max_memory_allocated())


def memory(record: Record, size: str, device: str) -> None:
    """Decoding first, which needs no training; then each network at each batch, as long as there is time."""
    networks = NETWORKS[size]
    plans = Plans([(one.name, chosen) for one in networks for chosen in one.sizes(device)])
    try:
        for codec in CODECS[size] or ("tiny",):
            record.attempt(f"decoding by the codec of {codec}", partial(_decoding, record, codec, device))
        for one in networks:
            record.attempt(one.name, lambda o=one: _training(record, o, device))
        _planned(record, plans.found(min(FOR_PLANS, max(record.left, 0))))
    finally:
        plans.close()


def _training(record: Record, one: Networks, device: str) -> None:
    sizes = one.sizes(device)
    bench = Bench(sizes[0])
    rests = sum(t.nbytes for t in (*bench.module.networks.parameters(), *bench.module.networks.teacher.parameters()))
    allocated = {"allocated": torch.cuda.memory_allocated() / 1e9} if device.startswith("cuda") else {}
    record.put(RESTS, f"{one.name}, weights", computed=rests / 1e9, **allocated)
    for size in sizes:
        bench.module.timer = timer = PeakTimer(device)
        bench.use(size)
        row = f"{one.name}, {label(size)}"
        # twice: the first cycle makes the optimizers' states
        record.attempt(row, lambda: (bench.cycle("eager", 0), bench.cycle("eager", 0)))
        peaks = timer.bytes if device.startswith("cuda") else {"all": _peak_on_cpu(bench)}
        record.put(TRAINING, row, **{f"{phase}, measured": found / 1e9 for phase, found in peaks.items()})
        bench.clean()


def _peak_on_cpu(bench: Bench) -> float:
    return bench.static_bytes() + peak_bytes(partial(bench.cycle, "eager", 0), "cpu")


def _planned(record: Record, plans: dict[tuple[str, int, int], dict[str, float]]) -> None:
    """Put the plan of each phase beside its measurement."""
    rows = record.tables.get(TRAINING, {})
    if len(plans) < len(rows):
        told = f"{len(plans)} of {len(rows)} plans were ready in time; the planner runs in a process of its own"
        record.put(LEFT_OUT, "plans", reason=told)
    for (name, batch, parts), plan in plans.items():
        row = f"{name}, {label(Size(batch=batch, accumulate=parts))}"
        if row in rows:
            phases = {phase: size for phase, size in plan.items() if "tflop" not in phase}
            record.put(TRAINING, row, **{f"{phase}, planned": size / 1e9 for phase, size in phases.items()})


def _decoding(record: Record, name: str, device: str) -> None:
    """The peak of decoding some images of 1024 x 1024 at once and one by one, above the codec's weights."""
    from cdm_lightning.backbones.frozen_parts import decode_sparingly

    vae, shape = _codec(name, device)
    for dtype in (torch.float32, torch.bfloat16):
        vae.to(dtype)
        for sparing in (True, False):
            if sparing:
                decode_sparingly(vae)
            else:
                vae.disable_slicing()
            for batch in BATCHES:
                row = f"{name}, {batch} images, {str(dtype).removeprefix('torch.')}" + (
                    ", one by one" if sparing else ""
                )
                if not record.attempt(row, partial(_decode, record, row, vae, (batch, *shape), dtype, device)):
                    break


@torch.no_grad()
def _decode(record: Record, row: str, vae: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    latents = torch.randn(shape, device=device, dtype=dtype)
    before = torch.cuda.memory_allocated() if device.startswith("cuda") else 0
    peak = peak_bytes(lambda: vae.decode(latents, return_dict=False), device) - before
    record.put(DECODING, row, peak=peak / 1e9)


def _codec(name: str, device: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A family's codec with random weights, and the shape of one latent; "tiny" is the bundled pipeline's."""
    import json

    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage

    from cdm_lightning.config import asset_path

    if name == "tiny":
        config = json.loads((Path(asset_path("tiny_sd3")) / "vae" / "config.json").read_text(encoding="utf-8"))
        arguments, kind, latent = {k: v for k, v in config.items() if not k.startswith("_")}, AutoencoderKL, (16, 16)
    else:
        file = Path(asset_path("architectures")) / f"{name}.json"
        arguments = json.loads(file.read_text(encoding="utf-8"))["vae"]
        kinds = {"sana": (AutoencoderDC, (32, 32)), "qwen_image": (AutoencoderKLQwenImage, (1, 128, 128))}
        kind, latent = kinds.get(name, (AutoencoderKL, (128, 128)))
    with torch.device(device):
        vae = kind(**arguments).eval().requires_grad_(False)
    channels = arguments.get("latent_channels") or arguments.get("z_dim") or 16
    return vae, (channels, *latent)
