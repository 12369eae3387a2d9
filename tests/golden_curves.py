"""Golden curves: the losses of twenty iterations and checksums of the final weights, bit for bit on one kind of CPU.

A commit that is not meant to change arithmetic leaves them as they are. One that is meant to writes them anew and says in its
message why, with the difference: `python tests/golden_curves.py --write [NAME ...]` (without --write: print what differs).
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cdm_lightning.checkpoint.stored import newest_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.train import train

FOLDER = Path(__file__).parent / "golden"
COMMAND = "python tests/golden_curves.py --write"
ITERATIONS = 20
FIGURES = ("/loss", "/grad_norm")
COMMON = (
    "callbacks=none",
    "logger=csv",
    "data.num_workers=0",
    "trainer.limit_val_batches=0",
    f"trainer.max_steps={ITERATIONS}",
    "trainer.log_every_n_steps=1",
)
TOY = ("experiment=toy2d_cdm", "backbone.hidden=32", "backbone.fit_steps=50", "data.batch_size=16")
SD3 = ("experiment=tiny_sd3_cdm", "data.batch_size=8", "objective.student_every=2", "objective.fake_score_steps=2")
LORA = ("lora=lora", "lora.student.rank=4", "lora.fake_score.rank=4")
PARTS = ("compute.accumulate=2",)
BLOCKS = ("lora.student.targets=blocks", "lora.fake_score.targets=blocks")
CURVES: dict[str, tuple[str, ...]] = {
    "toy2d_full": TOY,
    "toy2d_lora": (*TOY, *LORA, *BLOCKS),
    "toy2d_accumulate": (*TOY, *PARTS),
    "tiny_sd3_full": SD3,
    "tiny_sd3_lora": (*SD3, *LORA),
    "tiny_sd3_accumulate": (*SD3, *PARTS),
}
# On another processor or build of torch, kernels add up in another order. Between AVX-512 and AVX2 kernels on one machine the
# figures of these curves differed by at most 1.4e-5 of their values, the sums of weights by 2e-9: bounds with a wide margin.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 1e-6


def logged(folder: Path) -> list[dict[str, float]]:
    """The losses and gradient norms of each iteration, exactly as logged; a role that was not updated shows its last ones."""
    (file,) = (folder / "logs").rglob("metrics.csv")
    with file.open(encoding="utf-8", newline="") as rows:
        return [
            {name: float(value) for name, value in sorted(row.items()) if name.endswith(FIGURES) and value}
            for row in csv.DictReader(rows)
        ]


def facts() -> dict[str, str]:
    """What decides the order of floating-point operations."""
    return {"torch": torch.__version__, "processor": processor(), "kernels": torch.backends.cpu.get_cpu_capability()}


def processor() -> str:
    """Name, family, model and stepping of the processor, as Linux knows them: the name alone covers several generations."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        return ", ".join(known[key] for key in ("model name", "cpu family", "model", "stepping") if key in known)
    return platform.machine()


def measure(name: str) -> dict[str, Any]:
    """Run a curve; its losses and the checksums and sums of absolute values of each network's final weights."""
    with tempfile.TemporaryDirectory() as folder, one_thread(), contextlib.redirect_stderr(io.StringIO()):
        quiet_libraries()
        config = compose([*COMMON, *CURVES[name], f"output_dir={folder}"])
        train(config)
        losses = logged(Path(folder))
        tensors = newest_checkpoint(Path(folder) / "checkpoints").tensors("networks.")
    return {
        "command": f"{COMMAND} {name}",
        "overrides": [*COMMON, *CURVES[name]],
        "facts": facts(),
        "losses": losses,
        "checksums": {role: checksum(weights) for role, weights in by_role(tensors).items()},
        "sums": {role: total(weights) for role, weights in by_role(tensors).items()},
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block torch computes on one thread: sums over threads depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_role(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each network, by name."""
    roles = sorted({name.partition(".")[0] for name in tensors})
    return {role: {n: t for n, t in sorted(tensors.items()) if n.startswith(f"{role}.")} for role in roles}


def checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def total(weights: Mapping[str, torch.Tensor]) -> float:
    """The sum of absolute values in float64, for a comparison across kinds of CPUs."""
    return sum(float(tensor.double().abs().sum()) for tensor in weights.values())


def stored(name: str) -> dict[str, Any]:
    """The golden curve of that name."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def difference(golden: Mapping[str, Any], measured: Mapping[str, Any]) -> str | None:
    """What differs first, None if nothing does: bit for bit on the same kind of CPU and torch, else within tolerances."""
    exact = golden["facts"] == measured["facts"]
    kind = "bit for bit" if exact else f"within {LOSS_TOLERANCE} on another processor or torch"
    if len(golden["losses"]) != len(measured["losses"]):
        return f"{len(measured['losses'])} iterations, golden {len(golden['losses'])}"
    for iteration, (theirs, ours) in enumerate(zip(golden["losses"], measured["losses"]), start=1):
        if theirs.keys() != ours.keys():
            return f"iteration {iteration}: figures {sorted(ours)}, golden {sorted(theirs)}"
        for figure, value in theirs.items():
            if not same(ours[figure], value, 0.0 if exact else LOSS_TOLERANCE):
                return f"iteration {iteration}, {figure} ({kind}): {ours[figure]!r}, golden {value!r}"
    if golden["sums"].keys() != measured["sums"].keys():
        return f"networks {sorted(measured['sums'])}, golden {sorted(golden['sums'])}"
    for role, value in golden["sums"].items():
        if not same(measured["sums"][role], value, 0.0 if exact else WEIGHT_TOLERANCE):
            return f"weights of {role} ({kind}): sum {measured['sums'][role]!r}, golden {value!r}"
    changed = [role for role, value in golden["checksums"].items() if measured["checksums"][role] != value]
    if exact and changed:
        return f"weights of {', '.join(changed)} (bit for bit): the checksums differ"
    return None


def same(a: float, b: float, tolerance: float) -> bool:
    """Whether two numbers differ by no more than a share of the second."""
    return a == b or abs(a - b) <= tolerance * abs(b)


def main() -> None:
    """Compare, or with --write replace."""
    parser = argparse.ArgumentParser(description="Golden curves: compare, or write them anew.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all of {', '.join(CURVES)})")
    parser.add_argument("--write", action="store_true", help="replace the stored curves")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name in options.names or CURVES:
        measured, file = measure(name), FOLDER / f"{name}.json"
        print(f"{name}: {difference(stored(name), measured) if file.is_file() else 'new'}", flush=True)
        if options.write:
            file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
