"""What a run folder says about how its run was made: enough to repeat it."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cdm_lightning.config import PACKAGE, masked_command

CONFIG_FILE, STARTS_FILE = "config.yaml", "starts.jsonl"
PACKAGES = ("cdm-lightning", "torch", "lightning", "diffusers", "transformers", "peft", "safetensors", "hydra-core")


def record_start(config: dict[str, Any], folder: Path, processes: int) -> None:
    """Write the configuration, resolved and without secrets, and add a line for this start to `starts.jsonl`.

    A line has time, command, configuration, versions, commit, hardware and the number of `processes`; nothing of the
    environment.
    """
    write(folder / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": masked_command(sys.argv),
        "processes": processes,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "hardware": hardware(),
        "config": config,
    }
    with (folder / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
        file.flush()
        os.fsync(file.fileno())


def commit() -> str | None:
    """The git commit of this package's checkout, "-dirty" if files differ from it; None if it is installed otherwise."""
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
    """Processor, its cores, memory in GB, and the graphics cards."""
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards],
        "cuda": torch.version.cuda,
    }


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
