"""Mask secrets in configurations. `terminal.secrets` decides what a secret is."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cdm_lightning.files import read_text, write_text
from cdm_lightning.terminal.secrets import masked, masked_command, masked_text

__all__ = ("MaskSweep", "masked", "masked_command", "masked_message", "masked_text", "plain")
SWEEP = "multirun.yaml"  # the file that Hydra writes at the start of a sweep


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts and lists, with references (`${...}`) resolved and secrets replaced by ***."""
    return masked(OmegaConf.to_container(config, resolve=True))


def masked_message(text: str) -> str:
    """Return a message with secrets replaced by ***.

    This includes secrets in arguments of the command line that the message quotes, as the messages of Hydra do.
    """
    for argument, shown in zip(sys.argv[1:], masked_command(sys.argv[1:])):
        if shown != argument:
            text = text.replace(argument, shown)
    return masked_text(text)


class MaskSweep(Callback):
    """A Hydra callback that keeps secrets out of the files that Hydra itself writes.

    It replaces secrets by *** in multirun.yaml, the file that Hydra writes for a sweep. It refuses the option
    `hydra.output_subdir`. With this option, Hydra would write copies of the configuration before any callback can mask
    their secrets. The copies could also be outside the run's folder.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Print an error and exit with status 2 if `hydra.output_subdir` is not null, or `hydra.run.dir` is empty."""
        try:
            folder = str(config.hydra.run.dir)
        except OmegaConfBaseException:  # a reference without a target, which Hydra reports itself
            return
        if not folder.strip():  # otherwise the run would be written into the working folder
            print(
                "error: hydra.run.dir is empty; set a folder, or leave it out for outputs/RUN_NAME",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(2)
        if config.hydra.output_subdir is not None:  # Hydra turns exceptions of callbacks into warnings, but not an exit
            subdir = masked_text(str(config.hydra.output_subdir))
            reason = "the run folder has its own config.yaml, with secrets masked; leave this option out"
            print(f"error: hydra.output_subdir={subdir} must be null: {reason}", file=sys.stderr, flush=True)
            sys.exit(2)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Print an error and exit with status 2 in the cases in which `on_run_start` does."""
        self.on_run_start(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """If this job is part of a sweep, replace secrets in the sweep's file multirun.yaml by ***."""
        path = Path(config.hydra.sweep.dir) / SWEEP
        if config.hydra.mode.name == "MULTIRUN" and path.is_file():
            with suppress(OSError, ValueError, yaml.YAMLError):
                found = yaml.safe_load(read_text(path))
                write_text(path, yaml.safe_dump(masked(found), sort_keys=False, allow_unicode=True))
