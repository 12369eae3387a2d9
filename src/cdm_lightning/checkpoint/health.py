"""Checks that weights are finite. A checkpoint with NaN or infinity in its weights is never written and never resumed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cdm_lightning.distributed import ranks

CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHTS = "networks."  # the beginning of the names of weights in a checkpoint


def not_finite(tensors: Mapping[str, Tensor], networks: nn.Module) -> str | None:
    """Return the name of the first weight that is not finite on at least one process, or None.

    `tensors` are the tensors of a checkpoint by name, whole or as this process's shards. Optimizer states, and buffers
    of `networks`, are not checked. All processes must call this together, and all get the same name.
    """
    buffers = {f"{WEIGHTS}{name}" for name, _ in networks.named_buffers()}
    flags: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(WEIGHTS) and name not in buffers and tensor.dtype in CHECKED:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            flags[name.removeprefix(WEIGHTS)] = local.detach().isfinite().all()
    good: dict[str, bool] = {}
    for device in {flag.device for flag in flags.values()}:  # some networks may be in host memory
        here = [name for name, flag in flags.items() if flag.device == device]
        good |= zip(here, torch.stack([flags[name] for name in here]).tolist(), strict=True)  # one wait for the device
    mine = next((name for name in flags if not good[name]), None)
    return next((name for name in ranks.gather(mine) if name), None)


def not_finite_in(files: Iterable[Path]) -> str | None:
    """Return the name of the first weight that is not finite in a checkpoint's .safetensors files, or None."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in cast(list[str], file.keys()):
                tensor = file.get_tensor(name) if name.startswith(WEIGHTS) else None
                if tensor is not None and tensor.dtype in CHECKED and not tensor.isfinite().all():
                    return name.removeprefix(WEIGHTS)
    return None
