"""LoRA files of one's own: the same weights as diffusers' own loader in every family, or one line that names the file."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_pipelines import FAMILIES
from torch import Tensor, nn

from cdm_lightning.backbones.lora_file import WEIGHTS, write_lora_file
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.errors import UserError

RANK, ALPHA = 4, 10.0


def factors_of(network: nn.Module) -> dict[str, Tensor]:
    """Random factors of the attention's linear layers."""
    generator, factors = torch.Generator().manual_seed(0), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_v")):
            out_features, in_features = module.weight.shape
            factors[f"{name}.lora_A.weight"] = 0.2 * torch.randn(RANK, in_features, generator=generator)
            factors[f"{name}.lora_B.weight"] = 0.2 * torch.randn(out_features, RANK, generator=generator)
    return factors


@pytest.mark.parametrize("alpha", [None, ALPHA], ids=["plain", "alpha"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_of_ones_own_is_what_diffusers_loads(tiny_folder, tmp_path, name, alpha):
    family, folder = FAMILIES[name], tiny_folder(name)
    plain = family.backbone(str(folder), **family.options)
    before = plain.build_network()
    file = write_lora_file(plain.pipeline_class, factors_of(before), tmp_path)
    if alpha is not None:
        tensors = load_file(file)
        layers = dict.fromkeys(key.partition(".lora_")[0] for key in tensors)
        tensors |= {f"{layer}.alpha": torch.tensor(alpha) for layer in layers}
        if name in ("qwen_image", "z_image"):  # files with alphas have this prefix there
            tensors = {key.replace("transformer.", "diffusion_model.", 1): value for key, value in tensors.items()}
        save_file(tensors, file)

    pipeline, refused = family.backbone.pipeline_class.from_pretrained(folder), False
    try:
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(tmp_path, weight_name=WEIGHTS)
        elif alpha is None:
            pipeline.transformer.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS)
        else:
            refused = True
        pipeline.transformer.fuse_lora()
        pipeline.transformer.unload_lora()
    except ValueError:  # "Invalid LoRA checkpoint": this family's files have no alphas
        refused = True

    own = family.backbone(str(folder), **family.options, teacher_lora=str(file))
    if refused:
        assert alpha is not None
        with pytest.raises(UserError, match="is not a LoRA: it contains"):
            own.build_network()
        return
    ours, theirs, changed = own.build_network().state_dict(), pipeline.transformer.state_dict(), 0.0
    for key, value in before.state_dict().items():
        assert torch.equal(ours[key], theirs[key]), key
        changed = max(changed, (theirs[key] - value).abs().max().item())
    assert changed > 0.1


def test_an_alpha_of_flux_has_the_strength_that_it_says(tiny_folder, tmp_path):
    """Alpha 10 at rank 4 is 2.5 times the factors' product; without the alphas it was fused at 1."""
    family = FAMILIES["flux"] if "flux" in FAMILIES else next(f for name, f in FAMILIES.items() if "flux" in name)
    folder = tiny_folder(family.name)
    network = family.backbone(str(folder), **family.options).build_network()
    factors = factors_of(network)
    layer = next(iter(factors)).partition(".lora_")[0]
    save_file(
        {f"transformer.{key}": value for key, value in factors.items()}
        | {f"transformer.{name}.alpha": torch.tensor(ALPHA) for name in {k.partition(".lora_")[0] for k in factors}},
        tmp_path / "own.safetensors",
    )
    fused = family.backbone(str(folder), **family.options, teacher_lora=str(tmp_path / "own.safetensors"))
    change = (fused.build_network().get_submodule(layer).weight - network.get_submodule(layer).weight).detach()
    product = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(change, ALPHA / RANK * product, rtol=1e-4, atol=1e-5)


A, B = "lora_A.weight", "lora_B.weight"
FAULTS = {
    "A without B": (lambda t: {k: v for k, v in t.items() if not k.endswith(B)}, "without lora_B.weight"),
    "one B is missing": (
        lambda t: {k: v for k, v in t.items() if k != next(n for n in t if n.endswith(B))},
        "without lora_B",
    ),
    "B without A": (lambda t: {k: v for k, v in t.items() if not k.endswith(A)}, "without lora_A.weight"),
    "rank 0": (lambda t: {k: v[:0] if k.endswith(A) else v[:, :0] for k, v in t.items()}, "whose ranks differ"),
    "two ranks": (lambda t: {k: v[:2].clone() if k.endswith(A) else v for k, v in t.items()}, "whose ranks differ"),
    "vectors": (lambda t: {k: v.flatten() for k, v in t.items()}, "which are not matrices"),
    "scalars": (lambda t: {k: v.sum() for k, v in t.items()}, "which are not matrices"),
    "convolutions": (lambda t: {k: v[..., None, None] for k, v in t.items()}, "LoRA of another model"),
    "NaN": (lambda t: {k: v * float("nan") for k, v in t.items()}, "not finite"),
    "huge": (lambda t: {k: torch.full_like(v, 3e38) for k, v in t.items()}, "with values above 1e+06"),
    "infinity": (lambda t: {k: v / 0 for k, v in t.items()}, "not finite"),
    "whole numbers": (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "whole numbers"),
    "alpha": (
        lambda t: t | {"transformer.x.alpha": torch.tensor(1.0)},
        "is not a LoRA: it contains the tensor transformer.x.alpha",
    ),
    "nothing": (
        lambda t: {"transformer.note": torch.zeros(1)},
        "is not a LoRA: it contains the tensor transformer.note",
    ),
}


@pytest.fixture(scope="module")
def style(tiny_pipeline_folder, tmp_path_factory) -> Path:
    network = SD3Backbone(str(tiny_pipeline_folder)).build_network()
    return write_lora_file(StableDiffusion3Pipeline, factors_of(network), tmp_path_factory.mktemp("style"))


def line_about(file: Path, backbone: SD3Backbone) -> str:
    """The one line, naming the LoRA file, with which the teacher is refused."""
    with pytest.raises(UserError) as caught:
        backbone.build_teacher()
    line = str(caught.value)
    assert str(file) in line
    assert "\n" not in line
    return line


@pytest.mark.parametrize("fault", FAULTS)
def test_factors_that_do_not_belong_together_are_one_line(tiny_pipeline_folder, style, tmp_path, monkeypatch, fault):
    spoil, message = FAULTS[fault]
    file = tmp_path / "own.safetensors"
    save_file({key: value.contiguous() for key, value in spoil(load_file(style)).items()}, file)
    backbone = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(file))
    monkeypatch.setattr(backbone, "_load_pretrained", lambda *_: pytest.fail("weights were read"))
    assert message in line_about(file, backbone)


@pytest.mark.parametrize(
    "settings", ["{", "[]", '{"transformer.r": "four"}', '{"transformer.r": 0}', '{"transformer.nonsense": 1}']
)
def test_settings_of_a_lora_file_that_peft_cannot_use_are_one_line(tiny_pipeline_folder, style, tmp_path, settings):
    file = tmp_path / "own.safetensors"
    save_file(load_file(style), file, metadata={"format": "pt", "lora_adapter_metadata": settings})
    line_about(file, SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(file)))


NEVER = "(([a-z_0-9.]*)*)*!"  # a regular expression that takes years on a layer's name
SETTINGS = {
    "a pattern of ranks": ({"r": RANK, "rank_pattern": {NEVER: RANK}}, "in rank_pattern is not the name of a layer"),
    "a pattern of alphas": ({"r": RANK, "alpha_pattern": {NEVER: 1}}, "in alpha_pattern is not the name of a layer"),
    "no mapping": ({"r": RANK, "alpha_pattern": [1]}, "alpha_pattern must be a mapping"),
    "a rank that needs memory": ({"r": 10_000_000}, "contradicts the tensors in the file, which have rank 4"),
    "a list as rank": ({"r": [RANK]}, "contradicts the tensors in the file"),
    "NaN": ({"r": RANK, "lora_alpha": float("nan")}, "must be finite"),
    "a text as alpha": ({"r": RANK, "alpha_pattern": {"to_q": "x"}}, "must be a number"),
    "pissa": ({"r": RANK, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    "eva": ({"r": RANK, "init_lora_weights": "eva"}, "init_lora_weights='eva' is not supported"),
    "qalora": ({"r": RANK, "use_qalora": True}, "use_qalora=True is not supported"),
    "dora without its tensors": ({"r": RANK, "use_dora": True}, "use_dora=True contradicts the tensors in the file"),
    "a text as switch": ({"r": RANK, "use_rslora": "x"}, "use_rslora='x' must be true or false"),
    "a list": ([1], "must be a JSON object"),
    "a text": ("x", "must be a JSON object"),
}


def with_settings(style: Path, file: Path, settings: object) -> Path:
    """A copy of a LoRA file that has these settings of peft for its transformer."""
    if isinstance(settings, dict):
        settings = {f"transformer.{key}": value for key, value in settings.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file(load_file(style), file, metadata=header)
    return file


@pytest.mark.parametrize("fault", SETTINGS)
def test_the_settings_of_peft_are_a_closed_set(tiny_pipeline_folder, style, tmp_path, monkeypatch, fault):
    settings, message = SETTINGS[fault]
    file = with_settings(style, tmp_path / "own.safetensors", settings)
    backbone = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(file))
    monkeypatch.setattr(backbone, "_load_pretrained", lambda *_: pytest.fail("weights were read"))
    assert message in line_about(file, backbone)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_settings_that_peft_itself_writes_have_the_strength_that_they_say(
    tiny_pipeline_folder, style, tmp_path, use_rslora
):
    made = LoraConfig(
        r=RANK,
        lora_alpha=10,
        target_modules=NEVER,  # the layers come from the tensors: this is never run
        init_lora_weights="gaussian",
        use_rslora=use_rslora,
        alpha_pattern={"to_v": 2},
    ).to_dict() | {"peft_type": "LORA"}
    file = with_settings(style, tmp_path / "own.safetensors", made)
    before = SD3Backbone(str(tiny_pipeline_folder)).build_teacher()
    after = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(file)).build_teacher()
    factors = load_file(file)
    layers = [key.removeprefix("transformer.").removesuffix(f".{A}") for key in factors if key.endswith(A)]
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "to_v"}
    for name in layers:
        scale = (2 if name.endswith("to_v") else 10) / (RANK**0.5 if use_rslora else RANK)
        change = after.get_submodule(name).weight - before.get_submodule(name).weight
        product = factors[f"transformer.{name}.{B}"] @ factors[f"transformer.{name}.{A}"]
        torch.testing.assert_close(change, scale * product, rtol=1e-3, atol=1e-4)
