"""A stage of `cdm_lightning.pretrain`: train the judge, a classifier of what a storybook scene shows.

The judge and the VAE of the storybook pipeline are then measured on held-out drawings, which have combinations of
attributes that the teacher never sees in training.
"""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from safetensors.torch import save_file
from torch import FloatTensor, Tensor

from cdm_lightning.kinds import Share
from cdm_lightning.metrics.scenes_judge import HEADS, ScenesJudge, expected
from cdm_lightning.pretraining.loop import Recipe, optimise
from cdm_lightning.pretraining.scorers import perturb
from cdm_lightning.pretraining.storybook import SAVE_EVERY, drawings, number
from cdm_lightning.pretraining.vae import posterior_of

HELD_OUT_SEED = 10**9  # of the drawings on which judge and VAE are measured
NOT_SHOWN = -100  # the class of a head that does not apply; cross_entropy ignores it


def train_judge(recipe: Recipe, folder: Path, output: Path, *, pairs: Share = 0.6) -> ScenesJudge:
    """Train the judge on drawings that are new in every batch, write it to the safetensors file `output` and return it.

    The drawings show all combinations of attributes, also combinations that the teacher never sees in training. A
    drawing shows two things with probability `pairs`, and otherwise one. The state of the training is saved in
    `folder`, from which an interrupted training resumes.
    """
    torch.manual_seed(recipe.seed)
    judge = ScenesJudge()

    def loss(iteration: int, rng: torch.Generator) -> Tensor:
        images, _, scenes = drawings(recipe.batch_size, number(rng), "all", pairs)
        shown = [expected(scene) for scene in scenes]
        targets = {name: torch.tensor([classes.get(name, NOT_SHOWN) for classes in shown]) for name in HEADS}
        logits = judge(perturb(images, rng))
        losses = [
            F.cross_entropy(logits[name], target, ignore_index=NOT_SHOWN)
            for name, target in targets.items()
            if (target != NOT_SHOWN).any()
        ]
        return cast(Tensor, sum(losses))

    optimise("judge", judge, loss, recipe, folder=folder, save_every=SAVE_EVERY)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in judge.state_dict().items()}, output)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def measure_judge(judge: ScenesJudge, count: int) -> dict[str, float]:
    """Return the judge's accuracies on `count` held-out drawings with one thing, and on `count` others with two things.

    The judge has several heads, and each of them classifies one attribute. "single/HEAD" and "pair/HEAD" are the
    accuracies of the head with the name HEAD; a key is absent if no drawing shows the head's attribute. "single/all"
    and "pair/all" are the shares of the drawings on which all heads are right. Every attribute that a drawing shows is
    counted, also an attribute that its caption leaves out.
    """
    figures = {}
    for kind, pairs in (("single", 0.0), ("pair", 1.0)):
        images, _, scenes = drawings(count, HELD_OUT_SEED, "heldout", pairs)
        shown = [expected(scene) for scene in scenes]
        for name in HEADS:
            wanted = [{name: classes[name]} if name in classes else {} for classes in shown]
            if any(wanted):
                right = judge.agreement(images, wanted)
                counted = torch.tensor([bool(want) for want in wanted])
                figures[f"{kind}/{name}"] = right[counted].float().mean().item()
        figures[f"{kind}/all"] = judge.agreement(images, shown).float().mean().item()
    return figures


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, judge: ScenesJudge | None, count: int) -> dict[str, float]:
    """Return figures of the VAE's reconstructions of `count` held-out drawings: "psnr" and "judged_right".

    "psnr" is the mean PSNR in dB. "judged_right" is the share of the reconstructions in which `judge` recognizes every
    attribute that the drawing shows; without a `judge` this key is absent.
    """
    images, _, scenes = drawings(count, HELD_OUT_SEED + 1, "heldout", 0.4)
    rebuilt = []
    for chunk in images.split(64):
        latents = posterior_of(vae, chunk * 2 - 1).mean
        rebuilt.append(cast(DecoderOutput, vae.decode(cast(FloatTensor, latents))).sample)
    pictures = (torch.cat(rebuilt) / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (pictures - images).square().mean((1, 2, 3)).log10()
    figures = {"psnr": psnr.mean().item()}
    if judge is not None:
        figures["judged_right"] = judge.agreement(pictures, [expected(scene) for scene in scenes]).float().mean().item()
    return figures
