"""The masking of secrets in configurations. `terminal.secrets` decides what a secret is."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cdm_lightning.files import read_text, write_text
from cdm_lightning.terminal.secrets import masked, masked_command, masked_text

__all__ = ("MaskSweep", "masked", "masked_command", "masked_text", "plain")
SWEEP = "multirun.yaml"  # the file that Hydra writes at the start of a sweep


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts and lists, with references (`${...}`) resolved and secrets replaced by ***."""
    return masked(OmegaConf.to_container(config, resolve=True))


class MaskSweep(Callback):
    """A Hydra callback that replaces secrets by *** in multirun.yaml, the file that Hydra writes for a sweep."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Mask the file multirun.yaml of the sweep that this job belongs to."""
        path = Path(config.hydra.sweep.dir) / SWEEP
        if config.hydra.mode.name == "MULTIRUN" and path.is_file():
            with suppress(OSError, ValueError, yaml.YAMLError):
                found = yaml.safe_load(read_text(path))
                write_text(path, yaml.safe_dump(masked(found), sort_keys=False, allow_unicode=True))
