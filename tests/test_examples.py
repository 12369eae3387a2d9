"""docs/examples: the style LoRA that docs/recipes.md distils is a LoRA of the bundled pipeline that the project reads."""

import importlib.util
from pathlib import Path

import pytest
import torch

from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.config import asset_path

SCRIPT = Path(__file__).parents[1] / "docs/examples/style_lora.py"


def test_the_example_s_lora_in_the_teacher_is_the_example_s_pipeline(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("style_lora", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(tmp_path, steps=2)

    base = SD3Backbone(asset_path("tiny_sd3")).build_network().state_dict()
    lora = str(tmp_path / "lora/pytorch_lora_weights.safetensors")
    with_lora = SD3Backbone(asset_path("tiny_sd3"), teacher_lora=lora).build_network().state_dict()
    tuned = SD3Backbone(str(tmp_path / "pipeline")).build_network().state_dict()
    changed = [name for name in base if not torch.equal(base[name], tuned[name])]
    assert any("attn.to_q" in name for name in changed)
    assert any("ff.net" in name for name in changed)
    for name in base:
        torch.testing.assert_close(with_lora[name], tuned[name], rtol=1e-5, atol=1e-6)
    half = SD3Backbone(asset_path("tiny_sd3"), teacher_lora=lora, teacher_lora_scale=0.5).build_network().state_dict()
    name = changed[0]
    assert half[name].sub(base[name]).norm() == pytest.approx(float(tuned[name].sub(base[name]).norm()) / 2, rel=1e-3)
