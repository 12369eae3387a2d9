"""`python -m cdm_lightning.train experiment=...`: compose the configuration, build its objects, train.

A run lives in one folder, `outputs/RUN_NAME`: `config.yaml` (as resolved), `starts.jsonl` (command, versions and
hardware of each start), `checkpoints/`, and what loggers and callbacks write. The same command again resumes it.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cdm_lightning.config import answer_questions

if __name__ == "__main__":
    answer_questions("train")  # before the imports below, which take seconds

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.checkpoint.callback import IterationCheckpoint
from cdm_lightning.checkpoint.folder import checkpoints_in, refuse_old_files
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import build, one_line, plain, run_cli
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.text_cache import StoredText, TextCacheSettings
from cdm_lightning.data.text_memory import RememberedText
from cdm_lightning.errors import UserError
from cdm_lightning.launch import is_launched, launch
from cdm_lightning.parallel import MeshStrategy, device_count
from cdm_lightning.quiet import quiet_libraries
from cdm_lightning.run.same import require_same_configuration
from cdm_lightning.run_lock import only_run_in
from cdm_lightning.run_record import CONFIG_FILE, record_start


@dataclass(frozen=True)
class TrainResult:
    """Where a run lies and how far it came; `metrics` are the last values of everything logged."""

    folder: Path
    checkpoint: Path | None
    iteration: int
    metrics: dict[str, float]


def train(config: DictConfig) -> TrainResult:
    """Train what `config` describes, from scratch or from the newest checkpoint; UserError for whatever cannot work.

    All checks come before networks are built.
    """
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: give a whole number from 0 to {2**32 - 1}")
    folder = make_folder(Path(config.output_dir))
    with only_run_in(folder):
        return train_in(folder, config)


def train_in(folder: Path, config: DictConfig) -> TrainResult:
    """`train` in a folder that no other run is at work in."""
    L.seed_everything(config.seed, verbose=False)
    strategy, module = (build(config, key) for key in ("strategy", "module"))
    if isinstance(strategy, MeshStrategy):
        strategy.check(module.network_names, module.whole_names)
    data = build(config, "data", groups=module.groups.of, images=module.objective.needs_latents)
    module.resolution.check(module.backbone)
    for sampler in module.samplers:
        sampler.check(module.backbone)
    checkpoint = build(config, "checkpoint")
    checkpoint.begin_with = find_beginning(config, folder, checkpoint, module.fingerprint)
    callbacks = build(config, "callbacks")
    use_text_cache(build(config, "text_cache"), module.backbone, data, callbacks)
    trainer = make_trainer(
        config, strategy=strategy, callbacks=[*callbacks, checkpoint], logger=build(config, "logger")
    )
    if trainer.is_global_zero:
        for role in module.lora.unused(module.updates.recipes):
            print(f"lora.{role} is not used: the objective trains no {role}", file=sys.stderr, flush=True)
        record_start(plain(config), folder, trainer.world_size)
    try:
        trainer.fit(module, data)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"{str(error).splitlines()[0]} (out of memory?); the same command goes on") from error
    except (ConnectionError, EOFError) as error:  # it died while it handed a batch over, before torch saw it
        if not config.data.num_workers:
            raise
        raise UserError(
            f"DataLoader worker exited unexpectedly ({str(error) or type(error).__name__}; out of memory?); the same command goes on"
        ) from error
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return TrainResult(folder, next(reversed(checkpoints_in(checkpoint.folder)), None), module.iteration, metrics)


def make_trainer(config: DictConfig, **parts: Any) -> L.Trainer:
    """Lightning's trainer with these parts; UserError for values that it refuses and devices that are not there."""
    make = build(config, "trainer")
    for name in ("log_every_n_steps", "val_check_interval"):  # Lightning would divide by them
        value = config.trainer.get(name)
        if isinstance(value, (int, float)) and value <= 0:
            raise UserError(f"trainer.{name}={value} must be above 0; trainer.limit_val_batches=0 turns validation off")
    try:
        return make(**parts)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {one_line(error)}") from error


def use_text_cache(
    settings: TextCacheSettings, backbone: Backbone, data: PromptDataModule, callbacks: Sequence[L.Callback]
) -> None:
    """Give the backbone the text cache, or a memory for few prompts; UserError if a cache does not fit or lacks prompts."""
    generated = {type(callback).__name__: callback.prompts for callback in callbacks if hasattr(callback, "prompts")}
    sets = {"training": data.train, "validation": data.val, **generated}
    if settings.folder is not None:
        cache = StoredText(settings.folder, backbone.text_fingerprint)
        cache.require(sets, settings.check_up_to)
        backbone.use_text_cache(cache)
    elif sum(map(len, sets.values())) <= settings.remember_up_to and settings.remember_megabytes:
        prompts = [prompts[number] for prompts in sets.values() for number in range(len(prompts))]
        most_bytes = int(settings.remember_megabytes * 1e6)
        backbone.use_text_memory(RememberedText(backbone.encode_prompts, prompts, most_bytes))


def make_folder(folder: Path) -> Path:
    """The folder, made if it is missing; UserError if a file is in its place or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be the output folder ({error.strerror}); set another run_name") from error
    return folder


def find_beginning(config: DictConfig, folder: Path, checkpoint: IterationCheckpoint, fingerprint: str) -> Path | None:
    """The checkpoint of another run to begin with, if `resume` names one; UserError if nothing can come of this start.

    `resume` is "auto" (go on from this run's newest good checkpoint, if there is one), "never" (refuse a folder with
    checkpoints) or the path of a checkpoint, taken while the run has none of its own; its backbone must be the same,
    its configuration need not.
    """
    refuse_old_files(checkpoint.folder)
    own = checkpoints_in(checkpoint.folder)
    if config.resume == "never" and own:
        raise UserError(f"{folder} holds checkpoints, but resume=never; set another run_name or remove the folder")
    if own:
        require_same_backbone(own, fingerprint)
        require_same_configuration(read_saved(folder), plain(config), folder)
    if config.resume in ("auto", "never"):
        return None
    return read_checkpoint(Path(config.resume), fingerprint).path


def read_saved(folder: Path) -> dict[str, Any]:
    """The configuration that an earlier start of the run wrote; empty if there is none."""
    saved = folder / CONFIG_FILE
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(saved))) if saved.is_file() else {}


def require_same_backbone(own: Sequence[Path], fingerprint: str) -> None:
    """UserError if the newest checkpoint that can be opened has another fingerprint."""
    for path in reversed(own):
        with suppress(UserError):  # damaged: said when the run looks for a good one
            stored = read_checkpoint(path)
            break
    else:
        return
    read_checkpoint(stored.path, fingerprint)


def start(config: DictConfig) -> None:
    """Train here, or where the configuration asks for several processes and nobody has started them, start them."""
    processes = device_count(config.trainer.devices)
    if processes == 1 or is_launched() or config.strategy._target_.endswith(".single_process"):
        train(config)
        return
    if config.trainer.num_nodes != 1:
        raise UserError(
            f"trainer.num_nodes={config.trainer.num_nodes}: start this command on every node, by torchrun or srun; see "
            "docs/scaling.md"
        )
    status = launch(OmegaConf.to_yaml(config, resolve=True), processes)
    if status:
        sys.exit(status)


def main() -> None:
    """The command line."""
    quiet_libraries()
    run_cli(start, "train")


if __name__ == "__main__":
    main()
