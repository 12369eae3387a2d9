"""How a run is spread over processes."""

import os
from collections.abc import Sequence

import torch

from cdm_lightning.errors import UserError


def single_process(devices: int | str | Sequence[int] = 1, num_nodes: int = 1) -> str:
    """The strategy of one process on one device, by its name for `Trainer`; UserError if more than one is asked for.

    `devices` is what `Trainer` takes: a count, a list of indices, "auto", or one of these as text. A launcher that
    started several processes (`WORLD_SIZE`) counts too: they would write to one folder.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    processes = max(device_count(devices) * num_nodes, launched)
    if processes != 1:
        raise UserError(f"strategy=single runs one process, {processes} were asked for; set trainer.devices=1")
    return "auto"


def device_count(devices: int | str | Sequence[int]) -> int:
    """Number of devices that `Trainer(devices=...)` would use."""
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) for index in devices.split(",") if index.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if devices in ("auto", "-1", -1):
        return max(1, torch.cuda.device_count())
    return int(devices)
