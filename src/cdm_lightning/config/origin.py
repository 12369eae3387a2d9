"""Find out where an option was set: on the command line or in a configuration file."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig


def where_set(key: str) -> str:
    """Return where an option was set, as the end of a message: " (set in FILE)" or " (set on the command line)".

    `key` is the option's dotted name. Returns "" if the place cannot be found.
    """
    if not HydraConfig.initialized():
        return ""
    try:
        hydra = HydraConfig.get()
        choices = {str(group): str(option) for group, option in hydra.runtime.choices.items() if option is not None}
        for override in reversed(hydra.overrides.task):
            name = re.match(r"[+~]*([^=@]+)", override)
            if name and name[1] not in choices and f"{key}.".startswith(f"{name[1]}."):
                return " (set on the command line)"
        folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
        found = [
            file for file, package in _files(folders, choices, str(hydra.job.config_name)) if _has(file, package, key)
        ]
        return f" (set in {_shown(found[-1], folders)})" if found else ""
    except Exception:  # the place is only an addition to a message, which must appear in any case
        return ""


def _files(folders: list[Path], choices: Mapping[str, str], primary: str) -> Iterator[tuple[Path, str]]:
    """Yield (file, dotted name of the node that it sets) for all files of the configuration. Later files override earlier ones."""
    yield from ((folder / f"{primary}.yaml", "") for folder in folders)
    last = [group for group in choices if group in ("experiment", "debug")]
    for entry in [*(group for group in choices if group not in last), *last]:
        group, _, package = entry.partition("@")
        for option in re.findall(r"[\w/.-]+", choices[entry]):
            for folder in folders:
                yield from _with_parents(folder / group / f"{option}.yaml", package or group.replace("/", "."))


def _with_parents(file: Path, package: str) -> Iterator[tuple[Path, str]]:
    """Yield `file`, and before it the files that its defaults list names."""
    if not file.is_file():
        return
    for default in _read(file).get("defaults") or []:
        if isinstance(default, str) and default != "_self_":
            yield from _with_parents(file.parent / f"{default}.yaml", package)
    is_global = "@package _global_" in file.read_text(encoding="utf-8")[:200]
    yield file, "" if is_global else package


def _read(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return content if isinstance(content, dict) else {}


def _has(file: Path, package: str, key: str) -> bool:
    if package and not key.startswith(f"{package}."):
        return False
    node: Any = _read(file)
    for part in key.removeprefix(f"{package}." if package else "").split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return isinstance(node, list)
    return True


def _shown(file: Path, folders: list[Path]) -> str:
    folder = next(folder for folder in folders if file.is_relative_to(folder))
    return f"{folder.name}/{file.relative_to(folder)}"
