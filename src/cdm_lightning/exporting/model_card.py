"""The model card (README.md) of an exported student: description, training configuration and metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from cdm_lightning.run.same import decides

PAPER = "Continuous-Time Distribution Matching (arXiv:2605.06376)"

TAGS = ["distillation", "few-step"]
TEMPLATE = """---
{header}
---

# {name}

A student that makes an image in {calls}, without guidance. It was distilled from `{base}` by
{method} with `cdm_lightning`. The licence is that of the pipeline it was distilled from.

| | |
| --- | --- |
| weights | {weights} |
| iterations of training | {iteration} |
| precision of the network's file | {dtype} |
| network calls for an image | {nfe} |

## Metrics

{metrics}

## Recipe

```yaml
{recipe}```
"""


@dataclass(frozen=True)
class ModelCard:
    """The facts in the model card of a student called `name`.

    `nfe` is the number of network calls for an image. `weights` names the exported network, "student_ema" or "student".
    `iteration` is the number of training iterations, and `dtype` is the dtype of the weights' file. `config` is the
    run's configuration. `metrics` is the content of the run's metrics.json, or None if there is none.
    """

    name: str
    nfe: int
    weights: str
    iteration: int
    dtype: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Any = None

    @property
    def method(self) -> str:
        """The training method in words: CDM with its paper, or "the objective `CLASS`" for another objective."""
        name = str(self.config.get("objective", {}).get("_target_", "CDMObjective")).rpartition(".")[2]
        return PAPER if name == "CDMObjective" else f"the objective `{name}`"

    def text(self) -> str:
        """Return the card as Markdown, with the YAML header that model hubs read."""
        base = self.config.get("backbone", {}).get("pretrained")
        base = None if base is None else str(base)  # a number is the name of a folder
        is_hub_id = base is not None and base.count("/") == 1 and not Path(base).exists()
        is_pipeline = base is not None  # not the two-dimensional toy model, which is no pipeline of diffusers
        header = ModelCardData(
            library_name="diffusers" if is_pipeline else None,
            pipeline_tag="text-to-image" if is_pipeline else None,
            base_model=base if is_hub_id else None,
            tags=TAGS,
        )
        average = "EMA of the student" if self.weights == "student_ema" else "the student as last trained"
        return TEMPLATE.format(
            header=header.to_yaml(),
            name=f"{self.name}, {self.nfe} step{'' if self.nfe == 1 else 's'}",
            calls="one network call" if self.nfe == 1 else f"{self.nfe} network calls",
            base=base if is_hub_id else Path(base or "its pretrained network").name,
            method=self.method,
            weights=f"{average} (`{self.weights}`)",
            iteration=self.iteration,
            dtype=self.dtype,
            nfe=self.nfe,
            metrics=metrics_table(self.metrics),
            recipe=yaml.safe_dump(recipe(self.config), sort_keys=False),
        )


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run's configuration that affect the trained weights, and trainer.max_steps, as nested dicts.

    `run.same` decides which options affect the weights. The backbone's options are left out. Because cards may be public,
    `_target_: a.b.C` is replaced by `class: C`, and an absolute path by its last component.
    """
    chosen = _deciding({key: value for key, value in config.items() if key not in ("backbone", "module")}, "")
    module = {
        key: value for key, value in (config.get("module") or {}).items() if not isinstance(value, Mapping | list)
    }
    if module := _deciding(module, "module."):
        chosen["module"] = module
    if "max_steps" in (config.get("trainer") or {}):
        chosen["trainer"] = {"max_steps": config["trainer"]["max_steps"]}
    return _readable(chosen)


def _deciding(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            if below := _deciding(value, f"{prefix}{key}."):
                found[key] = below
        elif decides(f"{prefix}{key}"):
            found[key] = value
    return found


def _readable(node: Any) -> Any:
    """Replace `_target_: a.b.C` by `class: C` and an absolute path by its last component, because cards may be public."""
    if isinstance(node, Mapping):
        name = {"class": str(node["_target_"]).rpartition(".")[2]} if "_target_" in node else {}
        rest = {str(key): _readable(value) for key, value in node.items() if key not in ("_target_", "_partial_")}
        return name | rest
    if isinstance(node, list | tuple):
        return [_readable(child) for child in node]
    if isinstance(node, str) and Path(node).is_absolute():
        return Path(node).name
    return node


def metrics_table(metrics: Any) -> str:
    """Return the content of a metrics.json as a Markdown table, or a sentence if it has no metrics.

    `metrics` is a dict {"rows": [row, ...]}, a list [row, ...], a dict {name: row} or a dict {name: figure}. A row is a
    dict that maps names of columns to values.
    """
    if isinstance(metrics, Mapping) and isinstance(metrics.get("rows"), list):
        metrics = metrics["rows"]
    if isinstance(metrics, Mapping) and metrics:
        nested = all(isinstance(value, Mapping) for value in metrics.values())
        metrics = [{"": name, **(value if nested else {"value": value})} for name, value in metrics.items()]
    if not isinstance(metrics, Sequence) or not metrics or not all(isinstance(row, Mapping) for row in metrics):
        return "None were recorded with the run."
    columns = list(dict.fromkeys(key for row in metrics for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key)) for key in columns] for row in metrics)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
