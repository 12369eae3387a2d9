"""`python -m cdm_lightning.train experiment=...`: compose the configuration, build its objects, train.

A run lives in one folder, `outputs/RUN_NAME`: `config.yaml` (as resolved), `run.json` (the command and versions),
`checkpoints/`, and what loggers and callbacks write. The same command again resumes it.
"""

import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.checkpoint import (
    IterationCheckpoint,
    StreamedCheckpointIO,
    checkpoints_in,
    newest_checkpoint,
    read_checkpoint,
)
from cdm_lightning.config import build, masked_command, one_line, plain, run_cli
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.text_cache import StoredText, TextCacheSettings
from cdm_lightning.errors import UserError

CONFIG_FILE = "config.yaml"
FREE_KEYS = (
    "run_name",
    "output_dir",
    "resume",
    "trainer",
    "strategy",
    "checkpoint",
    "callbacks",
    "logger",
    "module.samplers",
    "data.num_workers",
    "data.val",
    "data.val_batch_size",
    "data.val_prompts",
    "text_cache",  # holds what the text encoders would give
)
FREE_ENDINGS = (".learning_rate.total", ".cache_folder")  # the first follows max_steps
BOUND_KEYS = ("callbacks.ema",)
UNFIT_WARNINGS = (
    ".*does not have many workers.*",  # reading a line of text needs none
    ".*in eval mode at the start of training.*",  # the student's average is meant to be
    ".*LeafSpec.*is deprecated.*",  # Lightning's own use of torch
)


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
    L.seed_everything(config.seed, verbose=False)
    strategy, module, data = (build(config, key) for key in ("strategy", "module", "data"))
    module.resolution.check(module.backbone)
    for sampler in module.samplers:
        sampler.check(module.backbone)
    checkpoint = build(config, "checkpoint")
    start = find_start(config, folder, checkpoint, module.fingerprint)
    callbacks = build(config, "callbacks")
    use_text_cache(build(config, "text_cache"), module.backbone, data, callbacks)
    trainer = make_trainer(
        config, strategy=strategy, callbacks=[*callbacks, checkpoint], logger=build(config, "logger")
    )
    describe_run(config, folder)
    trainer.fit(module, data, ckpt_path=start, weights_only=True)
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
        return make(plugins=[StreamedCheckpointIO()], **parts)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {one_line(error)}") from error


def use_text_cache(
    settings: TextCacheSettings, backbone: Backbone, data: PromptDataModule, callbacks: Sequence[L.Callback]
) -> None:
    """Give the backbone the text cache, if there is to be one; UserError if it does not fit or lacks prompts."""
    if settings.folder is None:
        return
    cache = StoredText(settings.folder, backbone.text_fingerprint)
    generated = {type(callback).__name__: callback.prompts for callback in callbacks if hasattr(callback, "prompts")}
    cache.require({"training": data.train, "validation": data.val, **generated}, settings.check_up_to)
    backbone.use_text_cache(cache)


def make_folder(folder: Path) -> Path:
    """The folder, made if it is missing; UserError if a file is in its place or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be the output folder ({error.strerror}); set another run_name") from error
    return folder


def find_start(config: DictConfig, folder: Path, checkpoint: IterationCheckpoint, fingerprint: str) -> Path | None:
    """The checkpoint to go on from, None for a fresh start; UserError if it does not belong to this configuration.

    `resume` is "auto" (the newest good one of this run, if there is one), "never" (a fresh start in a folder without
    checkpoints) or the path of a checkpoint, whose configuration is not compared but whose backbone is.
    """
    if config.resume not in ("auto", "never"):
        path = Path(config.resume)
        read_checkpoint(path, fingerprint)
        return path
    if config.resume == "never" and checkpoints_in(checkpoint.folder):
        raise UserError(f"{folder} holds checkpoints, but resume=never; set another run_name or remove the folder")
    path = newest_checkpoint(checkpoint.folder)
    if path is not None:
        read_checkpoint(path, fingerprint)
        require_same_configuration(config, folder)
    return path


def require_same_configuration(config: DictConfig, folder: Path) -> None:
    """UserError if `folder` holds a run whose configuration differs in what decides its weights.

    Compared is everything but `FREE_KEYS` (where the run lies, how long it goes on, what is logged and evaluated).
    `max_steps` is among them: a longer run continues a shorter one, and a decaying learning rate follows the new end
    from there on.
    """
    saved_file = folder / CONFIG_FILE
    saved = flatten(OmegaConf.to_container(OmegaConf.load(saved_file))) if saved_file.is_file() else {}
    now = flatten(plain(config))
    differing = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key) and not is_free(key))
    if saved and differing:
        keys = ", ".join(differing[:5])
        raise UserError(f"{folder} holds a run of another configuration (it differs in {keys}); set another run_name")


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, child in node.items():
        flat |= flatten(child, f"{prefix}{name}.") if isinstance(child, dict) else {prefix + str(name): child}
    return flat


def is_free(key: str) -> bool:
    """Whether a run may go on with another value of this dotted key."""

    def under(roots: tuple[str, ...]) -> bool:
        return any(key == root or key.startswith(root + ".") for root in roots)

    return (under(FREE_KEYS) and not under(BOUND_KEYS)) or key.endswith(FREE_ENDINGS)


def describe_run(config: DictConfig, folder: Path) -> None:
    """Write the resolved configuration, and the command with the versions it ran on; nothing of the environment."""
    packages = {name: version(name) for name in ("cdm-lightning", "torch", "lightning", "diffusers", "transformers")}
    run = {"command": masked_command(sys.argv), "python": platform.python_version(), "packages": packages}
    write(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(plain(config))))
    write(folder / "run.json", json.dumps(run, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def quiet_libraries() -> None:
    """Keep Lightning's advice off the terminal; its warnings stay, but for those that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in UNFIT_WARNINGS:
        warnings.filterwarnings("ignore", message)


def main() -> None:
    """The command line."""
    quiet_libraries()
    run_cli(train, "train")


if __name__ == "__main__":
    main()
