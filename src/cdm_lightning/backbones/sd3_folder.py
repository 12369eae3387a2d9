"""Writing a distilled SD3 network as a pipeline folder that diffusers loads and runs by the plain call."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from cdm_lightning.backbones.baked_schedule import UNBAKED, bake
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
    baked.save_pretrained(folder / "scheduler")
    scheduler.save_pretrained(folder / UNBAKED)
    call = {"num_inference_steps": nfe, "guidance_scale": 1.0, **sizes}
    (folder / CALL).write_text(json.dumps(call, indent=2) + "\n", encoding="utf-8")
    usage = USAGE.format(
        folder="FOLDER",
        nfe=nfe,
        plural="" if nfe == 1 else "s",
        arguments=", ".join(f"{name}={value}" for name, value in call.items()),
        sigmas=" > ".join(f"{sigma:.4g}" for sigma in baked.sigmas.tolist()),
        recipe=f"shift {baked.config.shift:.6g}, shift_terminal {baked.config.shift_terminal}",
    )
    (folder / "README.md").write_text(model_card.rstrip() + "\n" + usage, encoding="utf-8")


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
