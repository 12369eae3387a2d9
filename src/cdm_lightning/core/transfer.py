"""Copies from the host to a GPU for which the host does not wait."""

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Return the values on `device`. The host does not wait for a copy from the CPU to a GPU.

    Such a copy goes through pinned memory. A plain copy would wait until the GPU has done all earlier work.
    """
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
