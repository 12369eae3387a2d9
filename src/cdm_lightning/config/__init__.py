"""Compose a configuration from its files, build objects from it, and report mistakes in one line.

A configuration is a tree of mappings, called nodes. A node with a `_target_` describes an object: `_target_` names its
class or function, and the other keys are the arguments. Only the commands read the configuration. They pass its values
to all other code as arguments.
"""

import inspect
import os
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

import hydra
import yaml
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cdm_lightning.config.arguments import check_arguments, with_texts
from cdm_lightning.config.composition import composition_error, readable
from cdm_lightning.config.secrets import masked_command, masked_message
from cdm_lightning.config.sweep import job_folder
from cdm_lightning.ends import signals
from cdm_lightning.ends.streams import tolerant_streams
from cdm_lightning.errors import Preempted, UserError
from cdm_lightning.files import require_name
from cdm_lightning.terminal.output import mask_output

PACKAGE = Path(__file__).parents[1]
QUESTIONS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
OTHERS_WAIT = 20.0  # seconds that all processes except the first wait before they print an error; they may start at different times
MOVED = {  # options that had another key before 2026-11-27: the old key and the new one
    "module.student_every": "objective.student_every",
    "module.fake_score_steps": "objective.fake_score_steps",
    "module.fake_score_merge": "objective.fake_score_merge",
    "module.accumulate": "compute.accumulate",
    "module.gradient_checkpointing": "compute.gradient_checkpointing",
    "module.recompute_attention": "compute.recompute_attention",
    "module.compile_backend": "compute.compile_backend",
    "module.rollouts_together": "compute.rollouts_together",
    "module.samplers": "validation.samplers",
    "callbacks.ema.decay": "ema.decay",
}
IN_RESOLVER = "UserError raised while resolving interpolation: "
WRONG_ARGUMENTS = re.compile(r"unexpected keyword argument|required (positional|keyword-only) argument|multiple values")
# the errors that a wrong file or override causes
COMPOSITION = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError)


def conf_dir() -> Path:
    """Return the folder of the configuration files.

    After an installation from a wheel the folder lies inside the package, otherwise in the repository.
    """
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "conf"


def asset_path(name: str) -> str:
    """Return the path of a file in the package. `name` is its path below assets/, such as "prompts/general.txt".

    The file need not exist.
    """
    return str(PACKAGE / "assets" / name)


def register_resolvers() -> None:
    """Define the functions that configuration files can call as `${NAME:ARGUMENT}`.

    - `${asset:PATH}` gives the result of `asset_path(PATH)`.
    - `${job_folder:OVERRIDES}` gives the result of `job_folder(OVERRIDES)`.
    - `${run_folder:RUN_NAME}` gives "outputs/RUN_NAME", and raises `UserError` if RUN_NAME cannot be the name of a folder.
    """
    OmegaConf.register_new_resolver(
        "run_folder", lambda name: f"outputs/{require_name(name, 'run_name')}", replace=True
    )
    OmegaConf.register_new_resolver("asset", asset_path, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> DictConfig:
    """Return the configuration that the file `config_name` in `conf_dir()` gives with overrides such as "seed=1".

    The overrides must contain `output_dir=FOLDER`, because Hydra sets this option only for a command line. Raises `UserError`
    for a wrong override or file.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return hydra.compose(config_name, overrides=list(overrides))
        except (*COMPOSITION, ValueError) as error:  # a `group=null` gives a ValueError
            raise UserError(one_line(error)) from error


def build(
    config: DictConfig | Mapping[str, Any],
    key: str,
    offered: Mapping[str, Callable[[], Any]] | None = None,
    of: type | None = None,
    **more: Any,
) -> Any:
    """Build what the configuration describes under `key`, such as "optim.student": one object, or a list of objects.

    If the node under `key` has a `_target_`, one object is built. Its arguments are the node's other keys and `more`.

    Otherwise, one object is built for each child of the node that is not null. `offered` maps a parameter's name to a
    function. If a child's constructor has a parameter of that name and the child does not set it, the function is
    called and its result is passed to the constructor.

    Raises `UserError` if a constructor refuses its arguments, if a child has no `_target_`, or if an object is not an
    instance of the class `of`.
    """
    node = OmegaConf.select(config, key) if isinstance(config, DictConfig) else config[key]
    if node is None:
        return []
    if not isinstance(node, Mapping | DictConfig):
        raise UserError(f"{key}={node} must be a mapping with a _target_, the name of a class; see the files in conf/")
    if "_target_" in node:
        return _require(_instantiate(node, key, **more), node, key, of)
    built = []
    for name, child in ((f"{key}.{name}", child) for name, child in node.items() if child is not None):
        if not isinstance(child, Mapping | DictConfig) or "_target_" not in child:
            raise UserError(f"{name} has no _target_; set {name}._target_=CLASS, or {name}=null to leave it out")
        taken = parameters_of(child["_target_"])
        built.append(
            _instantiate(
                child, name, **{k: make() for k, make in (offered or {}).items() if k in taken and k not in child}
            )
        )
        _require(built[-1], child, name, of)
    return built


def _require(built: Any, node: Any, key: str, of: type | None) -> Any:
    """Return `built`. Raises `UserError` if it is not an instance of the class `of`."""
    if of is None or isinstance(built, of) or (isinstance(built, partial) and built.func is of):
        return built
    raise UserError(
        f"{key}._target_={node['_target_']} gives a {type(built).__name__}, but {key} must be a {of.__name__}; name another class"
    )


def build_named(config: DictConfig, key: str) -> dict[str, Any]:
    """Build the objects in a group of the configuration, such as `metric`, and return {name: object}.

    `key` is the name of the group. Raises the errors of `build`.
    """
    return {
        str(name): build(config, f"{key}.{name}") for name, node in (config.get(key) or {}).items() if node is not None
    }


def _instantiate(node: Any, key: str, **more: Any) -> Any:
    check_arguments(node, key)
    node = with_texts(node) if isinstance(node, DictConfig) else node
    try:
        built = hydra.utils.instantiate(node, _convert_="all", **more)
        if isinstance(built, partial):  # otherwise its keywords would be checked only when it is called
            inspect.signature(built.func).bind_partial(*built.args, **built.keywords)
        return built
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        is_users = cause is None or isinstance(cause, (ValueError, ImportError)) or not _is_own(cause)
        if not is_users and not (isinstance(cause, TypeError) and WRONG_ARGUMENTS.search(str(cause))):
            raise
        where = re.search(r"full_key: (\S+)", str(error))
        raise UserError(f"{where[1] if where else key}: {one_line(cause or error)}") from error
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{key}: {one_line(error)}") from error


def _is_own(error: BaseException) -> bool:
    """Return whether an error was raised inside this package, and not in another library's constructor."""
    return any(
        f"{frame.f_globals.get('__name__')}.".startswith("cdm_lightning.") for frame, _ in walk_tb(error.__traceback__)
    )


def parameters_of(target: str | None) -> Mapping[str, inspect.Parameter]:
    """Return {name: parameter} for the parameters of the class or function with the dotted name `target`.

    The result is empty if `target` is None or cannot be found.
    """
    try:
        return inspect.signature(pkgutil.resolve_name(target or "")).parameters
    except Exception:  # instantiation reports the reason
        return {}


def answer_questions(config_name: str) -> None:
    """Print Hydra's help (`--help`) or the configuration (`--cfg`) and exit, if the command line asks for it.

    Call this before slow imports such as torch, so that the answer comes at once.
    """
    if any(argument.partition("=")[0] in QUESTIONS for argument in sys.argv[1:]):
        run_cli(lambda config: None, config_name)
        sys.exit()


def run_cli(task: Callable[[DictConfig], object], config_name: str, until: str = "before training") -> None:
    """Run `task` on the configuration that the command line gives. `config_name` is the main file in conf/.

    A mistake of the user or a disk error ends the process with one line on stderr and exit status 2. A signal ends it
    with status 75 and the message "SIGNAL: stopped UNTIL", such as "SIGTERM: stopped before training".
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its own lines and exits with status 1
    mask_output()
    register_resolvers()
    composed = False

    @wraps(task)
    def job(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        sys.argv[1:] = masked_command(sys.argv[1:])  # loggers record it; Hydra has read it
        try:
            task(config)
        except (
            UserError,
            OSError,
            HydraException,
            OmegaConfBaseException,
        ) as error:  # an OSError: the user's disk or file
            fail(error)  # called inside the job, because Hydra would otherwise print its own line first

    with signals.watched(), tolerant_streams():
        signals.loading(until)
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
        except (HydraException, OmegaConfBaseException, OSError) as error:
            fail(error)
        except Exception as error:  # Hydra raises a ValueError for a `group=null`, a TypeError for `hydra.verbose=[1]`
            if composed and not signals.is_saved():  # an error from inside the task is a bug and keeps its traceback
                raise
            own = [argument for argument in sys.argv[1:] if argument.lstrip("+~").startswith("hydra")]
            is_told = not own or isinstance(error, (yaml.YAMLError, ValueError))
            fail(error if is_told else UserError(f"{', '.join(own)}: {one_line(error)}; correct or remove it"))


@contextmanager
def command(until: str) -> Generator[None]:
    """A context manager around the body of a command other than training.

    A mistake of the user or a disk error ends the process with one line on stderr and exit status 2. A signal ends it
    with status 75 and the message "SIGNAL: stopped UNTIL", such as "SIGTERM: stopped before the plan was made".
    """
    mask_output()
    with signals.watched(), tolerant_streams():
        try:
            signals.loading(until)
            yield
        except Exception as error:
            if not (isinstance(error, (UserError, OSError)) or signals.is_saved()):
                raise
            fail(error)


def fail(error: BaseException) -> NoReturn:
    """Print an error in one line on stderr and exit with status 2.

    If several processes meet the same error, only the first process should print it. The others therefore wait for
    `OTHERS_WAIT` seconds, in which the launcher ends them. A process that still runs after this prints its own error.
    """
    if signals.is_saved():  # a library raised this error while the signal's `Preempted` passed through it
        sys.exit(Preempted.exit_code)
    process = process_number()
    if process:
        signals.failing()
        time.sleep(OTHERS_WAIT)
    print(f"error: {f'process {process}: ' if process else ''}{one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(2)


def process_number() -> int:
    """Return the rank of this process, counted from 0, as torchrun or SLURM has set it. Without a launcher it is 0."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line.

    Secrets are masked, and Hydra's list of search paths is removed. If the error is about a renamed option, its new name is
    added.
    """
    text = composition_error(error) or str(error).partition("Config search path:")[0]
    if IN_RESOLVER in text:  # a mistake that a resolver of ours has found
        text = text.partition(IN_RESOLVER)[2].splitlines()[0]
    lines = readable(text)
    lines += [f"{old} is now {new}" for old, new in MOVED.items() if f"'{old}'" in text]
    return masked_message(re.sub(r"([.:,]); ", r"\1 ", "; ".join(lines)))
