"""Where configurations lie, how they become objects, and how their mistakes become one line.

Nothing below the entry points sees a configuration object: every leaf of `conf/` is an argument of some constructor.
"""

import hashlib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cdm_lightning.arguments import annotated, require_fit
from cdm_lightning.errors import Preempted, UserError

PACKAGE = Path(__file__).parent
QUESTIONS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
OTHERS_WAIT = 5.0  # seconds that all processes but the first wait before they speak of a mistake
LONGEST_NAME = 120  # of a sweep job's folder, well below what file systems take
SECRET_KEY = re.compile(r"token|secret|password|api_?key|credential", re.IGNORECASE)
ACCESS_TOKEN = re.compile(r"\b(hf|ghp|gho|glpat|sk|xox[abp])[-_][A-Za-z0-9_-]{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
SHORTEST_SECRET = 6  # characters; shorter ones are switches and counts
MOVED = {  # options that versions before 2026-11-27 kept elsewhere
    "module.student_every": "objective.student_every",
    "module.fake_score_steps": "objective.fake_score_steps",
    "module.fake_score_merge": "objective.fake_score_merge",
}
WRONG_ARGUMENTS = re.compile(r"unexpected keyword argument|required (positional|keyword-only) argument|multiple values")


def conf_dir() -> Path:
    """The folder of configurations: inside the package when installed from a wheel, else that of the checkout."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "conf"


def asset_path(name: str) -> str:
    """Path of a bundled file or folder, for example "prompts/general.txt"; it need not exist."""
    return str(PACKAGE / "assets" / name)


def job_folder(override_dirname: str) -> str:
    """Folder name of one job of a sweep, made of its overrides: one level deep, alike for the same command."""
    name = re.sub(r"[^\w.,=+-]+", ".", override_dirname) or "defaults"
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b(override_dirname.encode(), digest_size=6).hexdigest()
    return f"{name[:LONGEST_NAME]}-{digest}"


def register_resolvers() -> None:
    """Make `${asset:...}` and `${job_folder:...}` known to OmegaConf."""
    OmegaConf.register_new_resolver("asset", asset_path, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> DictConfig:
    """The configuration that a command line with these overrides gives; UserError if one of them is wrong.

    Name an `output_dir=...` among them: a command line takes it from Hydra.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return hydra.compose(config_name, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last for a `group=null`
            raise UserError(one_line(error)) from error


def build(config: DictConfig | Mapping[str, Any], key: str, **more: Any) -> Any:
    """The object that the node `key` describes (a list of them for a node without `_target_`, in its order).

    `more` are arguments that no configuration file can hold, for a node with `_target_`.

    Raises `UserError` where a constructor does not take a key, lacks one or refuses a value, and where a node of such a list
    has no `_target_`.
    """
    node = config[key]
    if node is None:
        return []
    if not isinstance(node, Mapping | DictConfig):
        raise UserError(f"{key}={node} must be a mapping with a _target_; see conf")
    if "_target_" in node:
        return _instantiate(node, key, **more)
    children = {f"{key}.{name}": child for name, child in node.items() if child is not None}
    for name, child in children.items():
        if not isinstance(child, Mapping | DictConfig) or "_target_" not in child:
            raise UserError(f"{name} has no _target_: set {name}._target_=CLASS, or {name}=null to leave it out")
    return [_instantiate(child, name) for name, child in children.items()]


def _instantiate(node: Any, key: str, **more: Any) -> Any:
    _check_arguments(node, key)
    try:
        built = hydra.utils.instantiate(node, _convert_="all", **more)
        if isinstance(built, partial):  # its keywords would not be looked at before the call
            inspect.signature(built.func).bind_partial(*built.args, **built.keywords)
        return built
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        is_users = cause is None or isinstance(cause, (ValueError, ImportError))
        if not is_users and not (isinstance(cause, TypeError) and WRONG_ARGUMENTS.search(str(cause))):
            raise
        where = re.search(r"full_key: (\S+)", str(error))
        raise UserError(f"{where[1] if where else key}: {one_line(cause or error)}") from error
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{key}: {one_line(error)}") from error


def _check_arguments(node: Any, key: str) -> None:
    """Refuse values that do not fit the constructors below `node`: they would fail somewhere inside."""
    if isinstance(node, ListConfig):
        for number, child in enumerate(node):
            _check_arguments(child, f"{key}.{number}")
    if not isinstance(node, DictConfig):
        return
    types = _annotated(node.get("_target_"))
    for name in (name for name in node if not OmegaConf.is_missing(node, name)):
        value, where = node[name], f"{key}.{name}"
        if name in types:
            require_fit(value, *types[str(name)], where)
        _check_arguments(value, where)


def _annotated(target: Any) -> dict[str, tuple[Any, Any]]:
    """`annotated` of a `_target_`; nothing for one that cannot be found: instantiation says why."""
    try:
        return annotated(hydra.utils.get_object(target)) if target is not None else {}
    except Exception:
        return {}


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, resolved; secrets are masked: see `masked_text`, and all under such keys."""
    return _masked(OmegaConf.to_container(config, resolve=True))


def _masked(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _masked(child, str(name)) for name, child in node.items()}
    if isinstance(node, list):
        return [_masked(child, key) for child in node]
    is_number = isinstance(node, (int, float)) and len(str(node)) >= SHORTEST_SECRET  # a token may be all digits
    if SECRET_KEY.search(key) and (isinstance(node, str) or is_number):
        return "***"
    return masked_text(node) if isinstance(node, str) else node


def masked_command(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments, secrets masked: see `masked_text`, and the values of keys like `token` or `api_key`."""
    pairs = [argument.partition("=") for argument in arguments]
    return [
        f"{key}=***" if sign and SECRET_KEY.search(key) else masked_text(key + sign + value)
        for key, sign, value in pairs
    ]


def masked_text(text: str) -> str:
    """`text` without what looks like an access token, and without the values of environment variables named like one."""
    for name, value in os.environ.items():
        if SECRET_KEY.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return ACCESS_TOKEN.sub("***", text)


def answer_questions(config_name: str) -> None:
    """Answer a command line that asks Hydra for help or for the configuration, and exit; else return.

    An entry point calls it before it imports torch and the like: no answer needs them.
    """
    if any(argument.partition("=")[0] in QUESTIONS for argument in sys.argv[1:]):
        run_cli(lambda config: None, config_name)
        sys.exit()


def run_cli(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Run `task` on the command line's configuration; a mistake of the user is one line on stderr and exit status 2.

    A run that a signal stopped has status 75.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints its own several lines and exits with 1
    register_resolvers()
    composed = False

    @wraps(task)
    def job(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            task(config)
        except UserError as error:
            fail(error)  # from inside the job: Hydra would first print a line of its own
        except Preempted as stop:
            sys.exit(stop.exit_code)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException, FileExistsError, NotADirectoryError, PermissionError) as error:
        fail(error)
    except ValueError as error:  # Hydra's own for a `group=null`
        if composed:  # one from inside the task is a bug, and keeps its trace
            raise
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Say what is wrong in one line on stderr and exit with status 2.

    Of several processes all mostly meet the same mistake: the first says it, and its launcher ends the rest while they
    wait. One that is left over says its own.
    """
    process = process_number()
    if process:
        time.sleep(OTHERS_WAIT)
    print(f"error: {f'process {process}: ' if process else ''}{one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(2)


def process_number() -> int:
    """This process's place among those of its run as its launcher numbered them, from 0."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def one_line(error: BaseException) -> str:
    """The text of an error in one line; Hydra's list of search paths, which is the same for all, is left out."""
    text = str(error).partition("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines += [f"{old} is {new} now" for old, new in MOVED.items() if f"'{old}'" in text]
    return masked_text(re.sub(r"([.:,]); ", r"\1 ", "; ".join(lines)))
