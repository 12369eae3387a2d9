"""Estimate the memory, the work and the hours of a run before the run is started.

The command is `python -m cdm_lightning.plan experiment=sd3_cdm gpus=8x80`.

The arguments are those of the training command and the following:
  gpus=COUNTxGB        required; several values, separated by commas, give one plan each
  strategy=NAME        single, ddp, fsdp2 or hsdp
  strategy.on_cpu=[NETWORK,...]  networks that stay in host memory between their calls
  peak_tflops=NUMBER   the peak of a GPU in TFLOP/s
  utilisation=SHARE    the share of the peak that the run is assumed to reach
  reserve=SHARE        the share of a GPU's memory that is kept free
  json=FILE            also write all plans to this file
No weights are read.
"""

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_lightning.ends import signals

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()

from cdm_lightning.config import build, command, compose
from cdm_lightning.config.whole import check_config
from cdm_lightning.errors import UserError
from cdm_lightning.files import write_text
from cdm_lightning.kinds import FileOrFolder, ShareBelowOne, TeraFlops, Utilisation
from cdm_lightning.kinds.command_line import argument as kind_of
from cdm_lightning.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cdm_lightning.module import CDMModule
    from cdm_lightning.planning.layout import GPUs, Layout
    from cdm_lightning.planning.recipe import Recipe
    from cdm_lightning.planning.table import Plan

KINDS = {"peak_tflops": TeraFlops, "utilisation": Utilisation, "reserve": ShareBelowOne, "json": FileOrFolder}
STRATEGY_OF = {
    "data_parallel": "ddp",
    "fully_sharded": "fsdp2",
    "hybrid_sharded": "hsdp",
}  # by the end of their _target_
NO_REWARD = (
    "objective.reward is not counted: decoding and scoring one image at a time, and doing so again in the backward pass"
)
OWN = ("gpus", "strategy", "strategy.on_cpu", "peak_tflops", "utilisation", "reserve", "json")


def plan(arguments: Sequence[str]) -> "list[Plan]":
    """Return one plan for each value of `gpus=` in the command-line `arguments`.

    Raises UserError if the run cannot be planned.
    """
    own, overrides = split(arguments)
    if "gpus" not in own:
        raise UserError("gpus is missing; give the number of GPUs and the memory of each, for example gpus=8x80")
    peak, utilisation, reserve = (value_of(own, key) for key in ("peak_tflops", "utilisation", "reserve"))
    if Path(value_of(own, "json") or "x.json").is_dir():
        raise UserError(f"json={own['json']} is a folder; pass the name of a file instead")
    config = compose([*overrides, "output_dir=."])
    check_config(config)
    if config.objective.get("reward") is not None:
        print(NO_REWARD, file=sys.stderr, flush=True)
        config.objective.reward = None
    from cdm_lightning.planning.layout import read_gpus

    wanted = [read_gpus(text, 0.08 if reserve is None else reserve) for text in own["gpus"].split(",")]
    on_cpu = [name.strip() for name in own.get("strategy.on_cpu", "").strip("[]").split(",") if name.strip()]
    if "strategy.on_cpu" not in own:
        on_cpu = list(config.strategy.get("on_cpu") or [])
    strategy = own.get("strategy") or STRATEGY_OF.get(config.strategy._target_.rpartition(".")[2])
    layouts = [choose_layout(strategy, gpus.count, on_cpu) for gpus in wanted]
    from cdm_lightning.distributed.strategy import check_on_cpu
    from cdm_lightning.planning.recipe import read_recipe
    from cdm_lightning.planning.validation import trace_validation
    from cdm_lightning.planning.work import PEAK_TFLOPS, UTILISATION
    from cdm_lightning.training.trial import require_working

    module = build(config, "module")
    require_working(module.updates.recipes, module.lora.among(module.updates.recipes))
    check_on_cpu(on_cpu, module.network_names, module.whole_names)
    cached = config.text_cache.folder is not None
    recipe = read_recipe(module, cached)
    rests = not cached and config.text_cache.encode_ahead is not None
    recipe = replace(recipe, sizes=replace(recipe.sizes, text_rests=rests))
    if config.trainer.limit_val_batches != 0:
        seen = trace_validation(module, recipe.parameters["vae"], config.data.val_batch_size)
        recipe = replace(recipe, sizes=replace(recipe.sizes, validation=seen))
    rates = (PEAK_TFLOPS if peak is None else peak, UTILISATION if utilisation is None else utilisation)
    return [make_plan(config, module, recipe, gpus, layout, *rates) for gpus, layout in zip(wanted, layouts)]


def make_plan(
    config: "DictConfig",
    module: "CDMModule",
    recipe: "Recipe",
    gpus: "GPUs",
    layout: "Layout",
    peak_tflops: float,
    utilisation: float,
) -> "Plan":
    """Return the plan of a run on `gpus`.

    `layout` says how the run's networks are distributed over the GPUs. `config` is the configuration of the run, and
    `module` is built from it. `recipe` holds the bytes of the run's parts and the work of an iteration. Each GPU is
    assumed to reach the share `utilisation` of `peak_tflops` TFLOP/s.
    """
    from cdm_lightning.planning.advice import faster, further, remedies
    from cdm_lightning.planning.memory import largest_batch, total
    from cdm_lightning.planning.table import Plan
    from cdm_lightning.planning.work import hours

    batch, iterations = config.data.batch_size, config.trainer.max_steps
    recomputation, accumulate = module.compute.recomputation, module.compute.accumulate
    taken = total(recipe.sizes, layout, batch, accumulate) / gpus.usable
    return Plan(
        name=config.run_name,
        gpus=gpus,
        layout=layout,
        batch=batch,
        accumulate=accumulate,
        iterations=iterations,
        sizes=recipe.sizes,
        work=recipe.work,
        fits=largest_batch(recipe.sizes, layout, gpus.usable, accumulate),
        hours=hours(recipe.work.total, batch, iterations, peak_tflops, utilisation),
        peak_tflops=peak_tflops,
        utilisation=utilisation,
        remedies=remedies(recipe.sizes, layout, gpus, batch, accumulate),
        further=further(recomputation, bool(module.lora.among(module.network_names))),
        faster=faster(recomputation, 1 - taken, batch),
        source=recipe.source,
    )


def choose_layout(strategy: str | None, count: int, on_cpu: Sequence[str]) -> "Layout":
    """Return the layout of the networks on `count` GPUs with the strategy `strategy`.

    If `strategy` is None, one GPU gets "single" and several GPUs get "fsdp2". Networks whose names are in `on_cpu` stay
    in host memory between their calls. Raises UserError if the strategy cannot run on `count` GPUs.
    """
    from cdm_lightning.planning.layout import make_layout

    return make_layout(strategy or ("single" if count == 1 else "fsdp2"), count, on_cpu)


def split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the planner's own arguments, as values by name, and the list of all other arguments.

    The other arguments are overrides of the run's configuration. Raises UserError for an argument that starts with "-".
    """
    own, overrides = {}, []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if argument.startswith("-"):
            raise UserError(f"{argument}: the planner takes only arguments KEY=VALUE; leave {argument} out")
        if sign and key in OWN:
            own[key] = value
        else:
            overrides.append(argument)
    return own, overrides


def value_of(own: dict[str, str], key: str) -> Any:
    """Return the value of the planner's argument `key`, read from the text `own[key]`, or None if `own` lacks `key`.

    Raises UserError for a wrong value.
    """
    if key not in own:
        return None
    try:
        return kind_of(KINDS[key])(own[key])
    except ArgumentTypeError as error:
        raise UserError(f"{key}: {error}") from error


def write_json(path: Path, plans: "Sequence[Plan]") -> None:
    """Write all plans to the JSON file `path`, completely or not at all.

    Raises UserError if the file cannot be written.
    """
    try:
        write_text(path, json.dumps([p.as_json() for p in plans], indent=2) + "\n")
    except OSError as error:
        raise UserError(f"json={path}: cannot be written ({error.strerror}); pass another file") from error


def main() -> None:
    """Print the plans that the command line describes.

    After a user's mistake, one line on stderr describes it, and the exit status is 2.
    """
    quiet_libraries()
    with command("before the plan was made"):
        plans = plan(sys.argv[1:])
        print("\n\n".join(map(str, plans)))
        own, _ = split(sys.argv[1:])
        if "json" in own:
            write_json(Path(own["json"]), plans)


if __name__ == "__main__":
    main()
