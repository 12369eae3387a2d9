"""LoRAs that come from outside or from full weights: the teacher's own LoRA, and extraction by SVD."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdm_lightning import export, extract_lora
from cdm_lightning.backbones.lora_file import WEIGHTS, write_lora_file
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.errors import UserError
from cdm_lightning.lora.extract import truncated_factors
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.training.networks import Networks

CDM_ROLES = CDMObjective().roles


def factors_of(network: nn.Module, rank: int, endings: tuple[str, ...] = ("to_q", "ff.net.2")) -> dict[str, Tensor]:
    """Random factors of the linear layers with these endings."""
    generator, factors = torch.Generator().manual_seed(0), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(endings):
            out_features, in_features = module.weight.shape
            factors[f"{name}.lora_A.weight"] = 0.2 * torch.randn(rank, in_features, generator=generator)
            factors[f"{name}.lora_B.weight"] = 0.2 * torch.randn(out_features, rank, generator=generator)
    return factors


@pytest.fixture(scope="module")
def style(tiny_pipeline_folder, tmp_path_factory) -> Path:
    """A user's LoRA of rank 2."""
    network = SD3Backbone(str(tiny_pipeline_folder)).build_network()
    return write_lora_file(StableDiffusion3Pipeline, factors_of(network, 2), tmp_path_factory.mktemp("style"))


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# ---- the teacher's own LoRA


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_all_networks_start_from_what_diffusers_fuses(tiny_pipeline_folder, style, scale):
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_folder)
    pretrained = pipeline.transformer.proj_out.weight.detach().clone()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(style.parent, weight_name=WEIGHTS)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    backbone = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(style.parent), teacher_lora_scale=scale)
    networks = Networks(backbone, CDM_ROLES)
    for network in (networks.teacher, networks.student, networks.fake_score, networks.student_ema):
        assert_same_weights(network, pipeline.transformer)
    changed = [name for name, value in networks.teacher.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == len(load_file(style)) // 2
    assert torch.equal(networks.teacher.proj_out.weight, pretrained)
    assert all(parameter.requires_grad for parameter in networks.student.parameters())


def test_it_is_rounded_once_for_a_bfloat16_teacher(tiny_pipeline_folder, style):
    exact = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(style)).build_teacher()
    rounded = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(style), teacher_dtype="bfloat16").build_teacher()
    assert_same_weights(rounded, exact.to(torch.bfloat16))


def test_exports_contain_it_or_say_that_it_is_to_be_loaded(tiny_pipeline_folder, style, tmp_path):
    backbone = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(style), teacher_lora_scale=0.5)
    student = Networks(backbone, CDM_ROLES, lora=LoRAPlan(student=Adapter(rank=1), fake_score=None)).student
    fused = export.export_pipeline(backbone, student, tmp_path / "fused")
    assert_same_weights(SD3Backbone(str(fused)).build_network(), backbone.build_network())
    card = (export.export_pipeline(backbone, student, tmp_path / "lora", form="lora") / "README.md").read_text()
    assert f'load_lora_weights("{WEIGHTS}", adapter_name="own")' in card
    assert 'set_adapters(["own", "cdm"], [0.5, 1.0])' in card
    assert str(style.parent) not in card


def broken(style: Path, folder: Path, kind: str) -> Path:
    """A LoRA file with one thing wrong."""
    tensors, file = load_file(style), folder / "broken.safetensors"
    first = next(iter(tensors))
    if kind == "truncated":
        file.write_bytes(style.read_bytes()[:1000])
        return file
    if kind == "other model":
        tensors = {name.replace("transformer_blocks", "layers"): value for name, value in tensors.items()}
    if kind == "other size":
        tensors = {
            name: torch.cat([value, value], dim=1) if "lora_A" in name else value for name, value in tensors.items()
        }
    if kind == "text":
        tensors["text_encoder.text_model.lora_A.weight"] = tensors[first].clone()
    if kind == "weights":
        tensors = {"transformer.proj_out.weight": tensors[first]}
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot be read as a LoRA"),
        ("other model", r"LoRA of another model: \d+ of its \d+ layers, such as layers.0"),
        ("other size", r"LoRA of another model: its layer .* is \d+ x \d+, but this network needs \d+ x \d+"),
        ("text", "also changes the text encoder"),
        ("weights", "is not a LoRA: it contains the tensor transformer.proj_out.weight"),
    ],
)
def test_bad_files_are_one_line_before_weights_are_read(
    tiny_pipeline_folder, style, tmp_path, monkeypatch, kind, message
):
    backbone = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(broken(style, tmp_path, kind)))
    monkeypatch.setattr(backbone, "_load_pretrained", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message) as caught:
        backbone.build_teacher()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"the LoRA file .* does not exist"):
        SD3Backbone("somewhere/else", teacher_lora=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match=r"the LoRA file .* does not exist"):
        SD3Backbone("somewhere/else", teacher_lora=str(tmp_path))
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"is not a \.safetensors file"):
        SD3Backbone("somewhere/else", teacher_lora=str(tmp_path / "lora.bin"))


# ---- extraction


@pytest.fixture(scope="module")
def tuned(tiny_pipeline_folder, tmp_path_factory) -> Path:
    """The tiny pipeline after training that changed some layers by matrices of rank 3."""
    folder = tmp_path_factory.mktemp("tuned") / "pipeline"
    shutil.copytree(tiny_pipeline_folder, folder)
    backbone = SD3Backbone(str(folder))
    network, factors = backbone.build_network(), factors_of(backbone.build_network(), 3)
    with torch.no_grad():
        for name, a in factors.items():
            if ".lora_A." in name:
                weight = network.get_parameter(name.replace(".lora_A", ""))
                weight += factors[name.replace("lora_A", "lora_B")] @ a
    network.save_pretrained(folder / "transformer")
    return folder


def test_a_difference_of_low_rank_is_extracted_exactly(tiny_pipeline_folder, tuned, tmp_path):
    found = extract_lora.extract_lora(str(tiny_pipeline_folder), str(tuned), 3, tmp_path / "deep" / "lora.safetensors")
    assert found.error < 1e-5
    assert found.outside == []
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["lora.safetensors"]
    with_lora = SD3Backbone(str(tiny_pipeline_folder), teacher_lora=str(tmp_path / "deep/lora.safetensors"))
    expected = SD3Backbone(str(tuned)).build_network().state_dict()
    for name, value in with_lora.build_network().state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_the_error_falls_with_the_rank_and_counts_what_no_lora_holds(tiny_pipeline_folder, tuned, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    shutil.copytree(tuned, folder)
    network = SD3Backbone(str(tuned)).build_network()
    with torch.no_grad():
        network.proj_out.bias += 0.1
    network.save_pretrained(folder / "transformer")
    errors = []
    for rank in (1, 2, 3):
        found = extract_lora.extract_lora(str(tiny_pipeline_folder), str(folder), rank, tmp_path / "lora.safetensors")
        errors.append(found.error)
        assert found.outside == ["proj_out.bias"]
        assert dict(found.errors())["proj_out.bias"] == 1
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    bias = 0.1 * network.proj_out.bias.numel() ** 0.5
    whole = sum(norm**2 for norm, _ in found.norms.values()) ** 0.5
    assert errors[2] == pytest.approx(bias / whole, rel=1e-3)
    options = ["--base", str(tiny_pipeline_folder), "--tuned", str(folder), "--rank", "3", "--output"]
    extract_lora.main([*options, str(tmp_path / "lora.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["1.00e+00", "proj_out.bias"]
    assert "not a linear layer: left out" in lines[0]
    assert lines[-2].split()[0] == f"{errors[2]:.2e}"
    assert len(lines) == len(found.norms) + 2


def test_the_cut_is_the_nearest_matrix():
    difference = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for rank in (1, 3, 9):
        a, b, lost = truncated_factors(difference, rank)
        assert a.shape == (min(rank, 5), 5)
        assert b.shape == (7, min(rank, 5))
        assert lost == pytest.approx(float((difference - b @ a).norm()), abs=1e-5)
        assert lost == pytest.approx(float(torch.linalg.svdvals(difference)[rank:].norm()), abs=1e-5)


def test_mistakes_are_one_line(tiny_pipeline_folder, tuned, tmp_path, capsys):
    base, output = str(tiny_pipeline_folder), str(tmp_path / "lora.safetensors")
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    tensors = load_file(other / "transformer/diffusion_pytorch_model.safetensors")
    tensors.pop("proj_out.bias")
    save_file(tensors, other / "transformer/diffusion_pytorch_model.safetensors")
    for arguments, message in [
        ((base, base, 4, output), "are equal in all linear layers"),
        ((base, str(other), 4, output), "the tensor proj_out.bias differs in shape"),
        ((base, str(tmp_path / "nowhere"), 4, output), "does not exist"),
        ((base, str(tmp_path), 4, output), "transformer has no diffusion_pytorch_model.safetensors"),
        ((base, str(tuned), 0, output), "--rank: '0' must be a whole number of at least 1"),
        ((base, str(tuned), 4, str(tmp_path)), "must be the name of a file that ends in .safetensors"),
    ]:
        options = zip(("--base", "--tuned", "--rank", "--output"), map(str, arguments))
        with pytest.raises(SystemExit) as stopped:
            extract_lora.main([word for pair in options for word in pair])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not Path(output).exists()
