"""Find the dtype of a network's weights."""

from typing import cast

import torch
from diffusers import ModelMixin
from torch import nn


def weights_dtype(network: nn.Module) -> torch.dtype:
    """Return the floating-point dtype of a network's weights.

    `network` is a diffusers model, or a LoRA view (LoRA adapters on a shared base network). Use this function instead
    of the property `ModelMixin.dtype`, which visits every module each time it is read. That takes a millisecond for a
    tiny network and several for a large one.
    """
    if isinstance(network, ModelMixin):
        return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    return cast(torch.dtype, network.dtype)  # the attribute of a view of a shared base
