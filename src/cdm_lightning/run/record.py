"""The record of each start of a run. It contains everything that is needed to repeat the run."""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

import cdm_lightning
from cdm_lightning.config import PACKAGE
from cdm_lightning.config.secrets import masked_command
from cdm_lightning.ends.optional import may_fail
from cdm_lightning.files import append_text, write_text
from cdm_lightning.run.folder import CONFIG, STARTS, Run

PACKAGES = ("cdm-lightning", "torch", "lightning", "diffusers", "transformers", "peft", "safetensors", "hydra-core")


def record_start(config: dict[str, Any], run: Run, processes: int, inputs: Mapping[str, Any] | None = None) -> None:
    """Write `config` to the run's config.yaml, and add a line about this start to starts.jsonl.

    The line is a JSON object with the time, command, configuration, versions, commit, hardware, number of `processes`,
    and `inputs` (the run's input files). Environment variables are not recorded. `config` must be resolved and without
    secrets.

    If one of the files cannot be written, a warning is printed, and no exception is raised.
    """
    with may_fail(run.folder / CONFIG):
        write_text(run.folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": masked_command(sys.argv),
        "processes": processes,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": commit(),
        "hardware": hardware(),
        "config": config,
        "inputs": dict(inputs or {}),
    }
    with may_fail(run.folder / STARTS):
        append_text(run.folder / STARTS, json.dumps(start) + "\n")


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None if the package is not installed.

    The result for "cdm-lightning" is never None, because this package's version is known even if it is not installed.
    """
    if name == PACKAGES[0]:
        return cdm_lightning.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the git commit of the checkout that contains this package, or None if there is no checkout or git fails.

    "-dirty" is appended if tracked files differ from the commit.
    """
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--match=", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Return a description of this machine, to be stored as JSON.

    The keys are "system", "cores" (of the CPU), "memory_gb", "gpus" (the name and memory of each) and "cuda" (the
    version of CUDA for which torch was built, or None).
    """
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards],
        "cuda": torch.version.cuda,
    }
