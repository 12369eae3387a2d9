"""The README of an exported student: what it is, how it was made, what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cdm_lightning.run.same import decides

PAPER = "Continuous-Time Distribution Matching (arXiv:2605.06376)"

HUB_HEADER = "library_name: diffusers\npipeline_tag: text-to-image\n"
TEMPLATE = """---
{header}tags:
- distillation
- few-step
---

# {name}

A student that makes an image in {calls}, without guidance. It was distilled from `{base}` by
{paper} with `cdm_lightning`. The licence is that of the pipeline it was distilled from.

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
    """What is known about an export; `config` is the run's configuration and `metrics` its metrics.json, if any."""

    name: str
    nfe: int
    weights: str
    iteration: int
    dtype: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Any = None

    def text(self) -> str:
        """The card as Markdown with the header that model hubs read."""
        base = self.config.get("backbone", {}).get("pretrained")
        is_hub_id = base is not None and base.count("/") == 1 and not Path(base).exists()
        header = HUB_HEADER if base is not None else ""
        average = "EMA of the student" if self.weights == "student_ema" else "the student as last trained"
        return TEMPLATE.format(
            header=header + (f"base_model: {base}\n" if is_hub_id else ""),
            name=f"{self.name}, {self.nfe} step{'' if self.nfe == 1 else 's'}",
            calls="one network call" if self.nfe == 1 else f"{self.nfe} network calls",
            base=base if is_hub_id else Path(base or "its pretrained network").name,
            paper=PAPER,
            weights=f"{average} (`{self.weights}`)",
            iteration=self.iteration,
            dtype=self.dtype,
            nfe=self.nfe,
            metrics=metrics_table(self.metrics),
            recipe=yaml.safe_dump(recipe(self.config), sort_keys=False),
        )


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a configuration that decide a run's weights (`run.same`), and how long it was trained.

    Objects are named by their classes, and no local folder is named.
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
    """`_target_: a.b.C` as `class: C`; the folder of an absolute path is nobody's business but the run's."""
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
    """A Markdown table of a list of rows, of named rows or of single figures; a sentence if there is nothing."""
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
