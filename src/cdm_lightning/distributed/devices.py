"""Choose the device that a command uses."""

import os
import re

import torch

from cdm_lightning.errors import UserError

KNOWN = re.compile(r"cpu|mps|(cuda|xpu)(:\d{1,3})?")  # torch imports modules for other names, such as hpu


def choose_device(name: str) -> torch.device:
    """Return the device `name`, which is the value of a command's option `--device`.

    "auto" means CUDA if available, and otherwise the CPU. Raises `UserError` if `name` is not "auto", "cpu", "mps",
    "cuda" or "xpu" (the last two with or without a number, as in "cuda:1"), or if torch cannot use the device on this
    machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:  # torchrun's processes share the GPUs
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    try:
        if not KNOWN.fullmatch(name):
            raise RuntimeError(name)
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise UserError(f"--device {name} cannot be used here; pass cpu, or cuda where torch finds a GPU") from error
