"""LoRA in every family: the same gradients with and without checkpointing, files that plain diffusers reads."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import FAMILIES

from cdm_lightning import export
from cdm_lightning.backbones.base import BoundField
from cdm_lightning.backbones.packing import pack
from cdm_lightning.core.rng import evaluation_noise
from cdm_lightning.evaluation.samplers import SamplerSpec, generate
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.sample import sample_images
from cdm_lightning.training.gradient_checkpointing import Recomputation
from cdm_lightning.training.networks import Networks

CDM_ROLES = CDMObjective().roles

PROMPTS = ["a large red circle", "a small blue square above a green ring", "a ring"]
ADAPTER = Adapter(rank=2, alpha=4)


def grads(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Zero for what does not reach the output, such as the last text stream of Qwen-Image."""
    named = network.named_parameters()
    return {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in named}


def moved(networks: Networks) -> Networks:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*networks.student.parameters(), *networks.fake_score.parameters()]:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return networks


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny_folder):
    """(family, its tiny folder, our backbone)."""
    family = FAMILIES[request.param]
    folder = tiny_folder(family.name)
    backbone = family.backbone(str(folder), **family.options)
    backbone.setup(torch.device("cpu"))
    return family, folder, backbone


def test_checkpointing_recomputes_with_the_adapter_of_the_forward_pass(case):
    _, _, backbone = case
    cond, sigma = backbone.encode_prompts(PROMPTS), torch.tensor([0.2, 0.6, 0.9])
    x, found = evaluation_noise(0, range(3), backbone.latent_shape, "cpu"), []
    for checkpointing in (False, True):
        networks = moved(
            Networks(
                backbone, CDM_ROLES, Recomputation(float(checkpointing)), LoRAPlan(student=ADAPTER, fake_score=ADAPTER)
            )
        )
        loss = BoundField(backbone, networks.student, cond)(x, sigma).square().mean()
        with torch.no_grad():
            other = BoundField(backbone, networks.fake_score, cond)(x, sigma).square().mean()
        assert abs(other - loss) > 1e-6
        with networks.student.shared.running("fake_score"):
            loss.backward()
        found.append(grads(networks.student))
    largest = max(value.norm() for value in found[0].values())
    assert largest > 0
    for name, value in found[0].items():
        assert (found[1][name] - value).norm() <= 1e-4 * largest, name


def test_an_exported_lora_is_read_by_the_familys_own_loader(case, tmp_path):
    family, folder, backbone = case
    student = moved(Networks(backbone, CDM_ROLES, lora=LoRAPlan(student=ADAPTER, fake_score=ADAPTER))).student
    exported = export.export_pipeline(backbone, student, tmp_path / "lora", form="lora")
    spec = SamplerSpec("student", nfe=4)
    ours = generate(backbone, student, spec, PROMPTS, range(3), seed=0, batch_size=3)
    code = (exported / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("image = ")[0]
    scope: dict = {}
    exec(code.replace("BASE", str(folder)).replace("FOLDER", str(exported)), scope)
    pipeline: DiffusionPipeline = scope["pipe"]
    pipeline.set_progress_bar_config(disable=True)
    noise = evaluation_noise(0, range(3), backbone.latent_shape, "cpu")
    call = json.loads((exported / "call.json").read_text())
    latents = pack(noise) if family.packed else noise
    theirs = pipeline(list(PROMPTS), latents=latents, output_type="pt", **call).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    plain = generate(backbone, backbone.build_teacher(), spec, PROMPTS, range(3), seed=0, batch_size=3)
    assert (ours - plain).abs().mean() > 1e-3
    fused = sample_images(str(folder), PROMPTS, seed=0, lora=str(exported))  # as a LoRA of the teacher's own
    assert fused.steps == 4
    torch.testing.assert_close(fused.images, ours, rtol=0, atol=1e-4)
