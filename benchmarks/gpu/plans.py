"""`python -m benchmarks.gpu.plans NAME BATCH PARTS ...`: what the planner says of the benchmarks' networks, a line of JSON each.

It runs beside the measurements, in a process of its own that needs no GPU, since a plan of a real size takes a minute.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

from benchmarks.sizes import SIZES, Size


def plan(size: Size) -> dict[str, float]:
    """The planned bytes of a size: the peak by phase with what rests ("PHASE"), and the most ("all"), on one GPU."""
    import torch

    from benchmarks.set_up import module_of
    from cdm_lightning.planning.layout import Layout
    from cdm_lightning.planning.memory import phase_peaks, resting, total
    from cdm_lightning.planning.recipe import traced_recipe
    from cdm_lightning.planning.skeleton import FrozenParts

    module = module_of(replace(size, device="meta"))
    _ = module.backbone.scheduler, module.backbone.latent_shape  # under `FakeTensorMode` numbers have no values
    shapes = size.text or {}
    module.backbone.blank_conditioning = lambda batch: {
        name: torch.empty(batch, *shape) for name, shape in shapes.items()
    }
    recipe = traced_recipe(module, FrozenParts({}, 0, "random weights"), text_cached=True)
    layout, rests = Layout("single"), sum(resting(recipe.sizes, Layout("single")).values())
    peaks = phase_peaks(recipe.sizes, layout, size.batch, size.accumulate)
    phases = {name: rests + peak for name, peak in peaks.items()}
    work = {"tflop a sample and iteration": recipe.work.total / 1e12}
    return phases | {"all": total(recipe.sizes, layout, size.batch, size.accumulate)} | work


class Plans:
    """Plans that a process beside this one computes, in the order of `sizes` (name in benchmarks/sizes.py, size)."""

    def __init__(self, sizes: list[tuple[str, Size]]) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process runs
        named = [str(part) for name, size in sizes for part in (name, size.batch, size.accumulate)]
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "benchmarks.gpu.plans", *named]
        self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.DEVNULL, env=hidden)

    def found(self, seconds: float = 0.0) -> dict[tuple[str, int, int], dict[str, float]]:
        """The plans that are ready, by (name, batch, parts); waits up to `seconds` for all of them."""
        end = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        self._output.seek(0)
        lines = [json.loads(line) for line in self._output if line.endswith("\n")]
        return {tuple(line["size"]): line["bytes"] for line in lines}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def main(arguments: list[str]) -> None:
    """Plan each size of the command line."""
    from cdm_lightning.terminal.quiet import quiet_libraries

    quiet_libraries()
    for name, batch, parts in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
        size = replace(SIZES[name], batch=int(batch), accumulate=int(parts))
        line: dict[str, Any] = {"size": (name, size.batch, size.accumulate), "bytes": plan(size)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
