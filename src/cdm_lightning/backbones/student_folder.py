"""Export a distilled network (the student) as a pipeline folder or as a LoRA that diffusers can load."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import Tensor, nn

from cdm_lightning.backbones.lora_file import WEIGHTS, write_lora_file
from cdm_lightning.backbones.pipeline_folder import copy_parts, files_to_copy
from cdm_lightning.backbones.plain_scheduler import KEPT
from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.backbones.whole_folder import INDEX
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Guidance, Pixels, Steps, Tokens
from cdm_lightning.kinds.values import problem_of, told

CALL_KINDS = {
    "height": Pixels,
    "width": Pixels,
    "max_sequence_length": Tokens,
    "num_inference_steps": Steps,
    "guidance_scale": Guidance,
    "true_cfg_scale": Guidance,
}
REPLACED = ("transformer", "scheduler")  # the parts that an export does not copy
CALL = "call.json"  # file with the call arguments, other than the prompt, for the student's own images
USAGE = """
## Usage

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("FOLDER")
image = pipe("a prompt", {arguments}).images[0]
```

{notes}
"""
LORA_USAGE = """
## Usage

```python
from diffusers import {scheduler}, {pipeline}

pipe = {pipeline}.from_pretrained("BASE")
{load}
pipe.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
image = pipe("a prompt", {arguments}).images[0]
```

- `BASE` is the pipeline that the LoRA was distilled from. `FOLDER` is this folder.{own}
- Use the LoRA at scale 1.
{notes}
"""
LOAD = 'pipe.load_lora_weights("FOLDER", weight_name="{weights}")'
LOAD_PART = 'pipe.transformer.load_lora_adapter("FOLDER", prefix=None, weight_name="{weights}")'
LOAD_BOTH = """pipe.load_lora_weights("{name}", adapter_name="own")
pipe.load_lora_weights("FOLDER", weight_name="{weights}", adapter_name="cdm")
pipe.set_adapters(["own", "cdm"], [{scale:g}, 1.0])"""
LOAD_BOTH_PARTS = """pipe.transformer.load_lora_adapter("{name}", prefix=None, adapter_name="own")
pipe.transformer.load_lora_adapter("FOLDER", prefix=None, weight_name="{weights}", adapter_name="cdm")
pipe.transformer.set_adapters(["own", "cdm"], [{scale:g}, 1.0])"""
OWN = """The scheduler uses the student's sigmas for every number of steps n: the shifted values of 1, 1 - 1/n, ..., 1/n. For {nfe}
  step{plural} they are {sigmas} ({recipe}). Values that you pass as `sigmas` are shifted as well."""
STOCK = """For {nfe} step{plural} at this image size, the pipeline's own scheduler uses the sigmas {sigmas}. For other numbers of
  steps and other sizes, it uses the sigmas of the original pipeline."""
TERMINAL = """For one step, first switch off the terminal sigma, with which the scheduler would divide 0 by 0:
  `pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=None)`."""
ONE_STEP = """The scheduler is for one step. For more steps, load the scheduler of training from the folder `{kept}`:
  `pipe.scheduler = type(pipe.scheduler).from_pretrained("FOLDER", subfolder="{kept}")`."""


@dataclass(frozen=True)
class StudentCall:
    """A description of the call by which an exported pipeline makes the student's images in `nfe` steps.

    - `pipeline`: name of the pipeline's class.
    - `scheduler`: the scheduler that was used in training.
    - `exported`: the scheduler of the exported pipeline. It is `scheduler`, or another scheduler with which the
      pipeline uses the same sigmas.
    - `sigmas`: (nfe + 1,) the sigmas of the `nfe` steps, and the final 0.
    - `arguments`: the arguments of the call, apart from the prompt.
    - `notes`: explanations of the arguments, to be written into the model card.
    """

    pipeline: str
    scheduler: FlowMatchEulerDiscreteScheduler
    exported: FlowMatchEulerDiscreteScheduler | FlowMapEulerDiscreteScheduler
    sigmas: Tensor
    arguments: Mapping[str, Any]
    notes: Sequence[str]

    def with_(self, **changes: Any) -> "StudentCall":
        """Return a copy with the given fields changed."""
        return replace(self, **changes)

    @property
    def keeps_scheduler(self) -> bool:
        """Whether the export must also contain `scheduler`, because `scheduler` cannot be rebuilt from `exported`."""
        return self.exported is not self.scheduler and not isinstance(self.exported, FlowMapEulerDiscreteScheduler)

    def usage(self) -> str:
        """Return the Markdown section "Usage" for a pipeline's model card: how to call the pipeline."""
        return USAGE.format(**self.facts())

    def lora_usage(self, family: type[DiffusionPipeline], own: "OwnLoRA | None") -> str:
        """Return the Markdown section "Usage" for a LoRA's model card: how to load the LoRA and call the pipeline.

        `own` is the user's LoRA that was fused into the teacher, if any. `family` is the pipeline's class.
        """
        whole = hasattr(family, "load_lora_weights")
        if own is None:
            load, note = (LOAD if whole else LOAD_PART).format(weights=WEIGHTS), ""
        else:
            both = LOAD_BOTH if whole else LOAD_BOTH_PARTS
            load = both.format(name=own.file, scale=own.scale, weights=WEIGHTS)
            note = f" The teacher was that pipeline with `{own.file}` at scale {own.scale:g}."
        return LORA_USAGE.format(scheduler=type(self.exported).__name__, load=load, own=note, **self.facts())

    def facts(self) -> dict[str, str]:
        """Return the texts for "pipeline", "arguments" and "notes" in the templates of the section "Usage"."""
        nfe = len(self.sigmas) - 1
        config: Any = self.exported.config  # a FrozenDict, whose keys are attributes
        is_own = isinstance(self.exported, FlowMapEulerDiscreteScheduler)
        schedule = (OWN if is_own else STOCK).format(
            nfe=nfe,
            plural="" if nfe == 1 else "s",
            sigmas=" > ".join(f"{sigma:.4g}" for sigma in self.sigmas.tolist()),
            recipe=f"shift {config.shift:.6g}",
        )
        more = [TERMINAL] if not is_own and config.shift_terminal else []
        more += [ONE_STEP.format(kept=KEPT)] if self.keeps_scheduler else []
        return {
            "pipeline": self.pipeline,
            "arguments": ", ".join(f"{name}={value}" for name, value in self.arguments.items()),
            "notes": "\n".join(f"- {note}" for note in (*self.notes, schedule, *more)),
        }


@dataclass(frozen=True)
class OwnLoRA:
    """The file name and the scale of the user's LoRA that was fused into the teacher."""

    file: str
    scale: float


def write_pipeline(source: Path, network: nn.Module, folder: Path, model_card: str, call: StudentCall) -> None:
    """Write a pipeline into `folder`: `network` as its transformer, and the scheduler and arguments of `call`.

    The other parts are copied from the pipeline folder `source`. The model card is the text `model_card`, to which the
    section "Usage" is added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_parts(source, folder, without=REPLACED)
    cast(ModelMixin, network).save_pretrained(folder / "transformer")
    _tidy(folder / "transformer")
    _name_scheduler(folder / INDEX, type(call.exported).__name__)
    _write_call(folder, call, model_card, call.usage())


def rehearse_pipeline(source: Path, folder: Path, model_card: str, call: StudentCall) -> None:
    """Write what `write_pipeline` writes into an existing `folder`, but no weights and no copies of parts.

    Raises `UserError` if a file that `write_pipeline` would copy cannot be read.
    """
    for file in files_to_copy(source, REPLACED):
        if not os.access(file, os.R_OK):
            raise UserError(f"{file}: the export at the end of the run cannot read this file; make it readable")
    shutil.copyfile(source / INDEX, folder / INDEX)
    _name_scheduler(folder / INDEX, type(call.exported).__name__)
    _write_call(folder, call, model_card, call.usage())


def write_lora(
    family: type[DiffusionPipeline],
    tensors: Mapping[str, Tensor],
    folder: Path,
    model_card: str,
    call: StudentCall,
    own: OwnLoRA | None,
) -> None:
    """Write a LoRA file with `tensors`, and the scheduler and arguments of `call`, into `folder`.

    The model card is the text `model_card`, to which the section "Usage" is added. `family` is the pipeline's class.
    `own` is the user's LoRA that was fused into the teacher, if any.
    """
    write_lora_file(family, tensors, folder)
    _write_call(folder, call, model_card, call.lora_usage(family, own))


def _write_call(folder: Path, call: StudentCall, model_card: str, usage: str) -> None:
    """Write the schedulers, the arguments of the call and the model card."""
    call.exported.save_pretrained(folder / "scheduler")
    if call.keeps_scheduler:
        call.scheduler.save_pretrained(folder / KEPT)
    (folder / CALL).write_text(json.dumps(dict(call.arguments), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card.rstrip() + "\n" + usage, encoding="utf-8")


def read_call(folder: Path) -> dict[str, Any]:
    """Return the arguments for calling the exported student in `folder`, or {} if `folder` contains no call.json.

    Raises `UserError` if a size, a number of steps or a guidance scale in call.json has a wrong type or is out of its
    range (see `CALL_KINDS`).
    """
    path = folder / CALL
    call = read_settings(path) if path.is_file() else {}
    for name, kind in CALL_KINDS.items():
        if name in call and problem_of(call[name], [kind]) is not None:
            raise UserError(f"{path}: {name}={call[name]!r:.80} must be {told([kind])}; export the student again")
    return call


def _name_scheduler(index: Path, name: str) -> None:
    """Write the class of the exported scheduler into the pipeline's index."""
    entries = read_settings(index)
    if entries["scheduler"] != ["diffusers", name]:
        entries["scheduler"] = ["diffusers", name]
        index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _tidy(folder: Path) -> None:
    """Remove the training machine's path from config.json, and give the weights the file mode of config.json."""
    config = folder / "config.json"
    entries = read_settings(config)
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):  # safetensors makes its files readable by the owner only
        weights.chmod(config.stat().st_mode)
