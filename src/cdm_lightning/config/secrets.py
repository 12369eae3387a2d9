"""The masking of secrets in configurations; `terminal.secrets` knows what a secret is."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cdm_lightning.files import read_text, write_text
from cdm_lightning.terminal.secrets import masked, masked_command, masked_text

__all__ = ("MaskSweep", "masked", "masked_command", "masked_text", "plain")
SWEEP = "multirun.yaml"  # what Hydra writes at the start of a sweep


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain containers, with secrets masked."""
    return masked(OmegaConf.to_container(config, resolve=True))


class MaskSweep(Callback):
    """Mask the secrets in the configuration that Hydra writes for a whole sweep, before the first of its jobs runs."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Mask the file of the sweep that the job belongs to, if there is one."""
        path = Path(config.hydra.sweep.dir) / SWEEP
        if config.hydra.mode.name == "MULTIRUN" and path.is_file():
            with suppress(OSError, ValueError, yaml.YAMLError):
                found = yaml.safe_load(read_text(path))
                write_text(path, yaml.safe_dump(masked(found), sort_keys=False, allow_unicode=True))
