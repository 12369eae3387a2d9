"""Asynchronous copies between the host and a GPU: the host does not wait until they have ended."""

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Return `values` on `device`. If they are copied from the CPU to a GPU, the host does not wait for the copy.

    The copy goes through pinned memory. A plain copy would make the host wait until the GPU has done all earlier work.
    """
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Fetched:
    """A copy of a small tensor from a GPU to the host. The copy begins when this object is made.

    Reading the attribute `values` waits until the copy has arrived, but not for later work of the GPU. A tensor that is
    on the CPU already is not copied.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def values(self) -> Tensor:
        """The tensor on the CPU. The host waits until the copy has arrived."""
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()
        return self._values
