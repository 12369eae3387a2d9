"""A tiny open_clip model with random weights as a `local-dir:` folder."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from cdm_lightning.data.shapes import all_words
from cdm_lightning.pretraining.scorers import clip_config
from cdm_lightning.pretraining.tiny_sd3 import build_clip_tokenizer


def write_clip_folder(folder: Path) -> Path:
    """Write the folder, in the form of the bundled one."""
    tokenizer = build_clip_tokenizer(all_words())
    config = clip_config(len(tokenizer), tokenizer.eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config["model_cfg"])
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder
