"""The choice of the device that a command uses."""

import torch

from cdm_lightning.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device for a command's `--device` option; "auto" is CUDA if available, otherwise the CPU.

    Raises `UserError` if torch cannot use the device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name)
        device.tolist()  # a device such as "meta" has no values
        return device.device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise UserError(f"--device {name} cannot be used here; pass cpu, or cuda where torch finds a GPU") from error
