"""The masking of secrets in configurations, commands and messages."""

import os
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

SECRET_KEY = re.compile(r"token|secret|password|api_?key|credential", re.IGNORECASE)
ACCESS_TOKEN = re.compile(r"\b(hf|ghp|gho|glpat|sk|xox[abp])[-_][A-Za-z0-9_-]{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
SHORTEST_SECRET = 6  # characters; shorter values are switches and counts


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain containers, with secrets masked.

    Masked are the texts that `masked_text` masks and all values under keys like `token` or `api_key`.
    """
    return _masked(OmegaConf.to_container(config, resolve=True))


def _masked(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _masked(child, str(name)) for name, child in node.items()}
    if isinstance(node, list):
        return [_masked(child, key) for child in node]
    is_number = isinstance(node, (int, float)) and len(str(node)) >= SHORTEST_SECRET  # a token can be all digits
    if SECRET_KEY.search(key) and (isinstance(node, str) or is_number):
        return "***"
    return masked_text(node) if isinstance(node, str) else node


def masked_command(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with secrets masked: as in `masked_text`, and values of keys like `token`."""
    pairs = [argument.partition("=") for argument in arguments]
    return [
        f"{key}=***" if sign and SECRET_KEY.search(key) else masked_text(key + sign + value)
        for key, sign, value in pairs
    ]


def masked_text(text: str) -> str:
    """Mask what looks like an access token, and the values of environment variables with names like `HF_TOKEN`."""
    for name, value in os.environ.items():
        if SECRET_KEY.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return ACCESS_TOKEN.sub("***", text)
