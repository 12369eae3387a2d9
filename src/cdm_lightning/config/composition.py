"""Messages for errors in configuration files and overrides. They replace messages of Hydra and YAML that are hard to understand."""

import re
import sys

import yaml
from hydra.errors import OverrideParseException

from cdm_lightning.terminal.secrets import masked_command


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
    if str(error).startswith("Error merging override "):
        override, cause = str(error).splitlines()[0].removeprefix("Error merging override "), error.__cause__ or error
        return f"cannot apply {override}: {'; '.join(readable(str(cause)))}; correct this argument or leave it out"
    if "Config group override must be a string" in str(error):
        named = [argument for argument in sys.argv[1:] if re.fullmatch(r"[\w/]+=(null|[\[{-]?\d.*|\{.*)", argument)]
        which = f"{named[0]}: " if named else ""
        return f"{which}the value must be the name of a file in this group's folder below conf/, not null, a number or a mapping"
    return None


def readable(text: str) -> list[str]:
    """Return the lines of an error's text, for a message to the user.

    Lines in which OmegaConf or Python reports a missing option are replaced by lines that say what to do. OmegaConf's
    line "object_type=..." is left out. Its line "full_key: KEY" becomes "at KEY", or is left out if another line
    contains KEY.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("object_type=")]
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    lines = [_with_cure(line, keys) for line in lines if not line.startswith("full_key: ")]
    return lines + [f"at {key}" for key in keys if key and not any(key in line for line in lines)]


def _with_cure(line: str, keys: list[str]) -> str:
    if found := re.match(r"Missing mandatory value: (\S+)", line):
        return f"{found[1]} is required, but has no value; set {found[1]}=VALUE"
    if found := re.match(r"Interpolation key '(\S+)' not found", line):
        return f"{keys[0] if keys else 'an option'} refers to the option {found[1]}, which is missing; set {found[1]}=VALUE"
    if found := re.match(r"\S+\(\) missing \d+ required \S+ arguments?: (.*)", line):
        return f"the option {found[1].replace(chr(39), '')} is missing; set it"
    return line


def _of_override(override: str) -> str:
    (override,) = masked_command([override])  # here, because the value is shown twice, in other quotes
    key, sign, value = override.partition("=")
    if not sign:
        return f"cannot read the argument {override!r}: write KEY=VALUE"
    if value.startswith(("[", "{")):
        return f"cannot read the argument {override!r}: close all brackets and quotes in it, and put the whole argument in quotes"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f"""cannot read the argument {override!r}: quote the value and the whole argument, as in '{key}="{quoted}"'"""
    )
