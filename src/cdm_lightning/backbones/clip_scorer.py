"""Load a CLIP model of transformers with its preprocessing, for scorers of images that are stored in that form."""

from typing import Any

import torch
from transformers import CLIPModel, CLIPProcessor

from cdm_lightning.backbones.hub_folder import WEIGHTS, locate_model
from cdm_lightning.backbones.loaded_weights import load_model
from cdm_lightning.backbones.pipeline_folder import loading

TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "processor_config.json")


def load_clip(pretrained: str, processor: str, option: str) -> tuple[Any, Any]:
    """Return the CLIP model `pretrained`, frozen and in float32, and the processor of transformers in `processor`.

    Both are a folder or a hub id, which is downloaded: the first with config.json and safetensors weights, the second with
    preprocessor_config.json and a tokenizer. `option` is what messages put before the names of the options. Raises
    `UserError` if one of them is neither, or if its files cannot be used.
    """
    weights = locate_model(pretrained, ("config.json", WEIGHTS), "CLIP", f"{option}.pretrained")
    needed = ("preprocessor_config.json", "tokenizer_config.json")
    prepared = locate_model(processor, needed, "CLIP processor", f"{option}.processor", TOKENIZER)
    with loading(prepared):
        found = CLIPProcessor.from_pretrained(prepared, trust_remote_code=False)
    return load_model(CLIPModel, weights, torch.float32).eval().requires_grad_(False), found
