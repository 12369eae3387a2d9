"""Load a DINOv2 model (Oquab et al., arXiv:2304.07193) and its preprocessing, for the features of metrics."""

from typing import Any

import torch
from torch import nn
from transformers import Dinov2Model
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from cdm_lightning.backbones.hub_folder import WEIGHTS, locate_model
from cdm_lightning.backbones.loaded_weights import load_model
from cdm_lightning.backbones.pipeline_folder import loading

NEEDED = ("config.json", "preprocessor_config.json", WEIGHTS)


def load_dinov2(pretrained: str) -> tuple[nn.Module, Any]:
    """Return the DINOv2 model `pretrained`, frozen and in float32, and its image processor of transformers.

    `pretrained` is a folder with config.json, preprocessor_config.json and safetensors weights, or a hub id, which is
    downloaded. Raises `UserError` if it is neither, or if its files cannot be used.
    """
    folder = locate_model(pretrained, NEEDED, "DINOv2", "feature.dinov2.pretrained")
    with loading(folder):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    return load_model(Dinov2Model, folder, torch.float32).eval().requires_grad_(False), processor
