"""Messages for errors in configuration files and overrides. They replace messages of Hydra and YAML that are hard to understand."""

import re
import sys

import yaml
from hydra.errors import OverrideParseException


def composition_error(error: BaseException) -> str | None:
    """Return what is wrong in a configuration file or override, and how to fix it.

    `error` was raised while the configuration was composed. Returns None if the error's own text is clear.
    """
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        return f"{mark.name}, line {mark.line + 1}: this is not valid YAML ({error.problem or error.context})"
    if isinstance(error, yaml.YAMLError):
        return f"a configuration file is not valid YAML: {str(error).splitlines()[0]}"
    if isinstance(error, UnicodeDecodeError):
        return f"a configuration file is not UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(error, OverrideParseException):
        return _of_override(error.override)
    if "Config group override must be a string" in str(error):
        named = [argument for argument in sys.argv[1:] if re.fullmatch(r"[\w/]+=(null|[\[{-]?\d.*|\{.*)", argument)]
        which = f"{named[0]}: " if named else ""
        return f"{which}the value must be the name of a file in this group's folder below conf/, not null, a number or a mapping"
    return None


def _of_override(override: str) -> str:
    key, sign, value = override.partition("=")
    if not sign:
        return f"cannot read the argument {override!r}: write KEY=VALUE"
    if value.startswith(("[", "{")):
        return f"cannot read the argument {override!r}: close all brackets and quotes in it, and put the whole argument in quotes"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f"""cannot read the argument {override!r}: quote the value and the whole argument, as in '{key}="{quoted}"'"""
    )
