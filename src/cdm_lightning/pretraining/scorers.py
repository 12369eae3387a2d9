"""Stages 3 and 4 of `cdm_lightning.pretrain`: a classifier of shapes and a tiny CLIP, which measure generated images.

Both are trained on renderings of the shapes set (see `data.shapes`) and not on generated images.
"""

import json
from pathlib import Path
from typing import cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from cdm_lightning.data.shapes import all_words, draw_scenes, lay_out, render, render_layout
from cdm_lightning.metrics.shapes_classifier import HEADS, ShapesClassifier
from cdm_lightning.pretraining.loop import Recipe, optimise
from cdm_lightning.pretraining.tiny_sd3 import CLIP_TOKENS, build_clip_tokenizer


def perturb(images: Tensor, rng: torch.Generator) -> Tensor:
    """Add noise to the images (B, 3, H, W) in [0, 1], blur about half of them slightly, and return the result.

    A network that is trained on the result cannot rely on exact edges.
    """
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    weight = (torch.rand(len(images), 1, 1, 1, generator=rng) - 0.5).clamp(min=0) * 1.6
    noise = 0.04 * torch.rand(len(images), 1, 1, 1, generator=rng) * torch.randn(images.shape, generator=rng)
    return (images + weight * (blurred - images) + noise).clamp(0, 1)


def train_classifier(recipe: Recipe, folder: Path, output: Path, pool: int = 49152) -> ShapesClassifier:
    """Train the classifier on `pool` renderings, write it to the safetensors file `output`, and return it in eval mode.

    The renderings show all combinations of attributes, also combinations that the teacher never sees in training. The
    state of the training is saved in `folder`, from which an interrupted training resumes.
    """
    scenes = draw_scenes(pool, recipe.seed + 1000, "all", pairs=0.5)
    layout = lay_out(scenes, recipe.seed + 1000)
    images = render_layout(layout, recipe.seed + 1000)
    targets = {"arrangement": layout.arrangement, "place": layout.place}
    for slot in (0, 1):
        targets |= {f"{what}_{slot}": getattr(layout, what)[:, slot] for what in ("colour", "shape", "size")}
    torch.manual_seed(recipe.seed)
    model = ShapesClassifier()

    def loss(iteration: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(pool, (recipe.batch_size,), generator=rng)
        logits = model(perturb(images[rows], rng))
        losses = (F.cross_entropy(logits[name], targets[name][rows], ignore_index=-1) for name in HEADS)
        return cast(Tensor, sum(losses))

    optimise("classifier", model, loss, recipe, folder=folder)
    save_file(model.state_dict(), output)
    return model.eval()


def clip_config(vocabulary: int, eos: int) -> dict:
    """Return the content of `open_clip_config.json` for the tiny CLIP.

    The tiny CLIP reads images of 32 x 32 pixels in patches of 4 x 4, and texts of 12 tokens. `vocabulary` is the number
    of different tokens, and `eos` is the id of the end token.
    """
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 64, "layers": 3, "head_width": 32},
            "text_cfg": {
                "context_length": CLIP_TOKENS,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "local",
                "width": 64,
                "heads": 2,
                "layers": 2,
                "pool_type": "eos",
                "eos_id": eos,
                "pad_id": eos,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def train_clip(recipe: Recipe, folder: Path, output: Path, pool: int = 49152) -> None:
    """Train the tiny CLIP contrastively on `pool` training captions, each with one rendering, and write it to `output`.

    `output` is a folder in the format of open_clip. The state of the training is saved in `folder`, from which an
    interrupted training resumes.
    """
    tokenizer: CLIPTokenizer = build_clip_tokenizer(all_words())
    config = clip_config(len(tokenizer), tokenizer.eos_token_id)
    torch.manual_seed(recipe.seed)
    model = open_clip.CLIP(**config["model_cfg"])
    scenes = draw_scenes(pool, recipe.seed + 2000, "train")
    images = render(scenes, recipe.seed + 2000)
    captions = tokenizer([scene.caption for scene in scenes], padding="max_length", return_tensors="pt").input_ids
    contrast = ClipLoss()

    def loss(iteration: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(pool, (recipe.batch_size,), generator=rng)
        pictures = images[rows] * 2 - 1
        features = model.encode_image(pictures, normalize=True), model.encode_text(captions[rows], normalize=True)
        return contrast(*features, model.logit_scale.clamp(max=4.6).exp())

    optimise("clip", model, loss, recipe, folder=folder)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        output / "open_clip_model.safetensors",
    )
