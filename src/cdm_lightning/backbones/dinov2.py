"""Load a DINOv2 model (Oquab et al., arXiv:2304.07193) and its preprocessing, for the features of metrics."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import Dinov2Model
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from cdm_lightning.backbones.loaded_weights import load_model
from cdm_lightning.backbones.pipeline_folder import HUB_ID, loading, require_plain
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

NEEDED = ("config.json", "preprocessor_config.json")


def load_dinov2(pretrained: str) -> tuple[nn.Module, Any]:
    """Return the DINOv2 model `pretrained`, frozen and in float32, and its image processor of transformers.

    `pretrained` is a folder with config.json, preprocessor_config.json and safetensors weights, or a hub id, which is
    downloaded. Raises `UserError` if it is neither, or if its files cannot be used.
    """
    folder = _locate(pretrained)
    with loading(folder):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    return load_model(Dinov2Model, folder, torch.float32).eval().requires_grad_(False), processor


def _locate(pretrained: str) -> Path:
    """Return the folder of the model `pretrained`, a folder or a hub id. Raises `UserError` if it cannot be used."""
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(pretrained):
            raise UserError(f"the DINOv2 folder {pretrained} does not exist; pass a folder or a hub id (owner/name)")
        try:
            folder = Path(snapshot_download(pretrained, allow_patterns=[*NEEDED, "*.safetensors"]))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{pretrained} is not a local folder and cannot be downloaded from the Hugging Face hub ({first_line(error)}); without "
                "a network, copy the model to this machine and pass its folder: feature.dinov2.pretrained=FOLDER"
            ) from error
    require_plain(folder, pretrained)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    missing += [] if any(folder.glob("*.safetensors")) else ["model.safetensors"]
    if missing:
        raise UserError(f"{pretrained} has no {missing[0]}; copy the DINOv2 model again, with all of its files")
    return folder
