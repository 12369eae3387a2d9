"""Writing a distilled SD3 network as a pipeline folder that diffusers loads and runs by the plain call."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor, nn

from cdm_lightning.backbones.baked_schedule import UNBAKED, bake
from cdm_lightning.backbones.lora_file import WEIGHTS, write_lora_file
from cdm_lightning.backbones.pipeline_folder import copy_parts

CALL = "call.json"  # the arguments of the plain call, besides the prompt, that make the student's own images
USAGE = """
## Usage

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{folder}")
image = pipe("a prompt", {arguments}).images[0]
```

- `guidance_scale` is 0 or 1: one network call a step.
- The schedule of {nfe} step{plural}, {sigmas}, is baked into the scheduler's configuration
  ({recipe}): do not pass `sigmas`, they would be bent by it.
- Another number of steps runs a schedule that the student was not made for. The scheduler of training, for those who want
  to set sigmas themselves, is `scheduler/unbaked`.
"""

LORA_USAGE = """
## Usage

```python
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("BASE")
{load}
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("FOLDER", subfolder="scheduler")
image = pipe("a prompt", {arguments}).images[0]
```

- `BASE` is the pipeline that it was distilled from, `FOLDER` this folder.{note}
- `guidance_scale` is 0 or 1: one network call a step.
- The scheduler runs {sigmas} for {nfe} step{plural}: do not pass `sigmas`, they would be bent by it.
- The file's scale is 1, whatever reads it; combine it with a style LoRA by `pipe.set_adapters`.
"""
OWN_LORA = """pipe.load_lora_weights("{name}", adapter_name="own")
pipe.load_lora_weights("FOLDER", weight_name="{weights}", adapter_name="cdm")
pipe.set_adapters(["own", "cdm"], [{scale:g}, 1.0])"""


def write_pipeline(
    source: Path,
    network: nn.Module,
    scheduler: FlowMatchEulerDiscreteScheduler,
    folder: Path,
    nfe: int,
    model_card: str,
    sizes: Mapping[str, int],
) -> None:
    """Fill `folder`: `network` (SD3 transformer) and the baked schedule anew, all other parts copied from `source`.

    `sizes` are what a call must pass to get what was trained where that is not the default, such as the image's height.
    """
    baked = bake(scheduler, nfe)
    folder.mkdir(parents=True, exist_ok=True)
    copy_parts(source, folder, without=("transformer", "scheduler"))
    network.save_pretrained(folder / "transformer")
    _tidy(folder / "transformer")
    facts = _write_schedule(scheduler, baked, folder, nfe, sizes)
    (folder / "README.md").write_text(model_card.rstrip() + "\n" + USAGE.format(**facts), encoding="utf-8")


def write_lora(
    tensors: Mapping[str, Tensor],
    scheduler: FlowMatchEulerDiscreteScheduler,
    folder: Path,
    nfe: int,
    model_card: str,
    sizes: Mapping[str, int],
    own: tuple[str, float] | None,
) -> None:
    """Fill `folder` with the LoRA file of `tensors`, the baked schedule and the card; the other parts are the base's.

    `own` is (file, scale) of the LoRA that was part of the teacher, and so has to be loaded too.
    """
    baked = bake(scheduler, nfe)
    write_lora_file(StableDiffusion3Pipeline, tensors, folder)
    facts = _write_schedule(scheduler, baked, folder, nfe, sizes)
    load, note = f'pipe.load_lora_weights("FOLDER", weight_name="{WEIGHTS}")', ""
    if own is not None:
        load = OWN_LORA.format(name=own[0], scale=own[1], weights=WEIGHTS)
        note = f" The teacher was that pipeline with `{own[0]}` at scale {own[1]:g}."
    usage = LORA_USAGE.format(load=load, note=note, **facts)
    (folder / "README.md").write_text(model_card.rstrip() + "\n" + usage, encoding="utf-8")


def _write_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler,
    baked: FlowMatchEulerDiscreteScheduler,
    folder: Path,
    nfe: int,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Write both schedulers and the arguments of the call; what a card says of them."""
    baked.save_pretrained(folder / "scheduler")
    scheduler.save_pretrained(folder / UNBAKED)
    call = {"num_inference_steps": nfe, "guidance_scale": 1.0, **sizes}
    (folder / CALL).write_text(json.dumps(call, indent=2) + "\n", encoding="utf-8")
    return {
        "folder": "FOLDER",
        "nfe": nfe,
        "plural": "" if nfe == 1 else "s",
        "arguments": ", ".join(f"{name}={value}" for name, value in call.items()),
        "sigmas": " > ".join(f"{sigma:.4g}" for sigma in baked.sigmas.tolist()),
        "recipe": f"shift {baked.config.shift:.6g}, shift_terminal {baked.config.shift_terminal}",
    }


def read_call(folder: Path) -> dict[str, Any]:
    """The arguments of the plain call of an exported folder; none of them for another pipeline."""
    path = folder / CALL
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tidy(folder: Path) -> None:
    """Drop the path of the training machine from the configuration and let others read the weights."""
    config = folder / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8"))
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):  # safetensors creates its files readable by the owner alone
        weights.chmod(config.stat().st_mode)
