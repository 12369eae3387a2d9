"""The masking of secrets in everything that is written or printed: configurations, commands, messages and tracebacks.

A text is treated as a secret for one of four reasons:

- its key, as in `hub_token`, `--password` or `?api_key=` (see `secret_keys` and `secret_values`)
- its place, as in `https://USER:PASSWORD@host` or `Authorization: Bearer ...` (see `secret_shapes`)
- its shape, such as `hf_...` or `AKIA...` (see `secret_shapes`)
- its origin, if it is the value of an environment variable with a secret name, such as `HF_TOKEN`
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import quote

from cdm_lightning.terminal.secret_keys import holds_login, holds_tokens, is_secret_key
from cdm_lightning.terminal.secret_shapes import MASK, mask_shapes
from cdm_lightning.terminal.secret_values import SHORTEST_SECRET, SWITCHES, is_login, is_random, mask_named

__all__ = ("MASK", "is_secret_key", "masked", "masked_command", "masked_text")
LONG_SECRET = 16  # characters; a value of at least this length is masked within words too
AN_OPTION = re.compile(
    r"--?[A-Za-z]|--?[a-z][a-z-]*(?:=.*)?|--[\w.-]+=.*", re.DOTALL
)  # not a value that begins with "-"


def masked(value: Any, key: str = "", is_secret: bool = False) -> Any:
    """Return a copy of nested dicts and lists in which each secret is replaced by ***.

    Secrets are the values below a secret key (see `is_secret_key`), and those that `masked_text` finds in a text. `key`
    is the key under which `value` is stored, or "". `is_secret` says that `value` lies below a secret key, so that all
    of it is masked.
    """
    return _masked(value, key, is_secret, _of_environment())  # read once, because a configuration has hundreds of texts


def _masked(value: Any, key: str, is_secret: bool, known: re.Pattern[str] | None) -> Any:
    is_secret = is_secret or is_secret_key(key)
    if isinstance(value, Mapping):
        return {
            _masked_text(name, known) if isinstance(name, str) else name: _masked(child, str(name), is_secret, known)
            for name, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(child, key, is_secret or (holds_tokens(key) and is_random(child)), known) for child in value]
    if isinstance(value, bool) or value is None:
        return value
    is_secret = is_secret or (holds_login(key) and is_login(value))
    if is_secret and (isinstance(value, str) or len(str(value)) >= SHORTEST_SECRET):  # a token can be all digits
        return MASK if value != "" else value
    return _masked_text(value, known) if isinstance(value, str) else value


def masked_command(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments in which each secret is replaced by ***.

    Secrets are the values of secret keys, as in `KEY=VALUE` or `--KEY VALUE`, and those that `masked_text` finds.
    """
    found, before = [], ""
    for argument in arguments:
        name, sign, value = argument.partition("=")
        follows = before.startswith("-") and not AN_OPTION.fullmatch(argument)
        if follows and (is_secret_key(before) or (holds_login(before) and is_login(argument))):
            found.append(MASK)
        elif sign and is_secret_key(name):
            found.append(f"{masked_text(name)}={MASK}" if value else argument)
        else:
            found.append(masked_text(argument))
        before = "" if sign else argument
    return found


def masked_text(text: str) -> str:
    """Return a text in which each secret is replaced by ***, in time linear in its length.

    Harmless texts such as `tokenizer` and `max_tokens=77`, and existing paths, are not masked.
    """
    return text if len(text) < SHORTEST_SECRET else _masked_text(text, _of_environment())


def _masked_text(text: str, known: re.Pattern[str] | None) -> str:
    if len(text) < SHORTEST_SECRET:
        return text
    return mask_named(mask_shapes(known.sub(MASK, text) if known else text))


def _of_environment() -> re.Pattern[str] | None:
    """Return a pattern that matches the secrets in environment variables, or None if there are none."""
    return _pattern(tuple(sorted({value for name, value in os.environ.items() if _holds_secret(name, value)})))


def _holds_secret(name: str, value: str) -> bool:
    is_path = value.startswith(("/", "~", "./")) and "/" in value[1:]  # a file that holds a secret, and home folders
    return len(value) >= SHORTEST_SECRET and not is_path and value.lower() not in SWITCHES and is_secret_key(name)


@cache
def _pattern(values: tuple[str, ...]) -> re.Pattern[str] | None:
    forms = {
        form
        for value in values
        for form in (value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], repr(value)[1:-1])
        if len(form) >= SHORTEST_SECRET
    }
    if not forms:
        return None
    ordered = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(
        "|".join(
            re.escape(form) if len(form) >= LONG_SECRET else rf"(?<!\w){re.escape(form)}(?!\w)" for form in ordered
        )
    )
