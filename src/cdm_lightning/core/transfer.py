"""Copies from the host to a GPU that the host does not wait for."""

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Return the values on `device`; a copy from the CPU to a GPU goes through pinned memory, so that the host does not wait.

    A plain copy of pageable memory makes the host wait until the GPU has done all earlier work.
    """
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
