"""The plan counts validation, and proves that two experiments fit their one GPU."""

import json

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage

from cdm_lightning import plan as planner
from cdm_lightning.planning.live import LiveBytes, storages
from cdm_lightning.planning.skeleton import ARCHITECTURES

FOLDER = "backbone.pretrained={}"


def test_decoding_takes_what_is_planned(tiny_folder):
    from cdm_lightning.backbones.sd3 import SD3Backbone

    backbone = SD3Backbone(str(tiny_folder("sd3")))
    backbone.setup(torch.device("cpu"))
    latents, weights = torch.zeros(3, *backbone.latent_shape), list(storages(backbone._codec.vae))
    with LiveBytes(weights) as live:
        backbone.decode_latents(latents)
    arguments = ["experiment=sd3_cdm", FOLDER.format(tiny_folder("sd3")), "gpus=1x24", "data.val_batch_size=3"]
    (plan,) = planner.plan(arguments)
    planned = plan.sizes.validation
    assert planned.peak(None, 16, 1.0) == pytest.approx(live.timeline.peak(0), rel=0.1)
    phases = plan.as_json()["phase_bytes"]
    assert phases["validation"] >= planned.peak(None, 16, 1.0)
    assert f"; {max(phases, key=phases.get)} takes most" in str(plan)
    (without,) = planner.plan([*arguments, "trainer.limit_val_batches=0"])
    assert "validation" not in without.as_json()["phase_bytes"]


@pytest.mark.parametrize("file", sorted(ARCHITECTURES.glob("*.json")), ids=lambda file: file.stem)
def test_the_shipped_image_codecs_are_complete(file):
    entry = json.loads(file.read_text())
    kind = {"sana": AutoencoderDC, "qwen_image": AutoencoderKLQwenImage}.get(file.stem, AutoencoderKL)
    with torch.device("meta"):
        codec = kind(**entry["vae"])
    assert sum(parameter.numel() for parameter in codec.parameters()) == entry["parameters"]["vae"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "gpus", "strategy"), [("sd3_cdm_80gb", "1x80", "fsdp2"), ("sd3_cdm_lora", "1x24", "single")]
)
def test_an_experiment_fits_its_one_gpu_with_validation(experiment, gpus, strategy):
    (plan,) = planner.plan([f"experiment={experiment}", f"gpus={gpus}"])
    assert plan.layout.strategy == strategy
    assert plan.total < plan.gpus.usable
    assert plan.sizes.validation.first > 3e9  # the codec works on a picture of 1024 x 1024 pixels
    assert "validation" in plan.as_json()["phase_bytes"]


def test_adapters_are_planned_with_validation(tiny_folder):
    (plan,) = planner.plan(["experiment=sd3_cdm_lora", FOLDER.format(tiny_folder("sd3")), "gpus=1x24"])
    assert plan.sizes.held_whole >= {"student", "fake_score"}
    assert "validation" in plan.as_json()["phase_bytes"]
