"""The class `Run`: the folder of a training run, with its configuration, checkpoints and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_lightning.checkpoint.folder import MARKER, PATTERN, checkpoints_in
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, read_record, read_text

if TYPE_CHECKING:  # importing torch takes seconds: --help and error messages should not wait for it
    from cdm_lightning.checkpoint.stored import StoredCheckpoint

CONFIG, STARTS, CHECKPOINTS, METRICS = "config.yaml", "starts.jsonl", "checkpoints", "metrics.json"
GROUPS = ("objective", "module", "trainer", "data", "optim", "checkpoint")  # options of config.yaml that hold options
MOST_CONFIG = 1 << 22  # bytes of config.yaml: it takes a second to parse; usual is a few kilobytes


@dataclass(frozen=True)
class Run:
    """A training run, as it is stored in `folder`.

    The folder contains config.yaml, starts.jsonl (one line for each start), checkpoints/ and, after an evaluation,
    metrics.json.

    If `kept` is None, the method `config` reads config.yaml. Otherwise `kept` is the path of one of the run's
    checkpoints, and `config` reads the copy of the configuration that this checkpoint stores. Such a checkpoint can be
    used without the run's folder.
    """

    folder: Path
    kept: Path | None = None

    @classmethod
    def create(cls, folder: Path) -> "Run":
        """Return the run in `folder`. The folder is created if it does not exist.

        Raises `UserError` if the folder cannot be created.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the output folder {folder} cannot be created ({error.strerror}); set another run_name"
            ) from error
        return cls(folder)

    @classmethod
    def find(cls, source: str | Path) -> tuple["Run", Path | None]:
        """Return the run that `source` names, and also the checkpoint if `source` names one of the run's checkpoints.

        If `source` is the path of a run's folder, the result is (the run, None). If `source` is the path of a
        checkpoint, the result is (the run that wrote it, `source`). Raises `UserError` if `source` is neither, or if
        the configuration of the checkpoint's run cannot be found.
        """
        source = Path(source)
        if not source.exists():
            raise UserError(f"{source} does not exist; pass a run folder or one of its checkpoints")
        if not is_checkpoint(source):
            if not (source / CONFIG).is_file():
                raise UserError(
                    f"{source} is not a run folder, because it has no {CONFIG}; "
                    f"pass outputs/RUN or a folder in outputs/RUN/{CHECKPOINTS}"
                )
            return cls(source), None
        folder = source.absolute().parent.parent
        if stored_about(source).get("config"):
            return cls(folder, kept=source), source
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"the configuration of {source} cannot be found: neither this checkpoint nor {folder / CONFIG} has it; "
                f"pass outputs/RUN or a checkpoint in outputs/RUN/{CHECKPOINTS}"
            )
        return cls(folder), source

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.absolute().name

    @property
    def checkpoints(self) -> list[Path]:
        """The paths of the checkpoints in the folder checkpoints/ of the run, from the oldest iteration to the newest.

        The files in the checkpoints are not verified.
        """
        return checkpoints_in(self.folder / CHECKPOINTS)

    @property
    def is_started(self) -> bool:
        """Whether the run has been started at least once, and so has a stored configuration."""
        return self.kept is not None or (self.folder / CONFIG).is_file()

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration of the run's last start.

        Raises `UserError` if the configuration cannot be read, if it has no option `backbone`, or if a group of
        options, such as `trainer`, is no mapping.
        """
        from cdm_lightning.config.registered import load_tree

        path = self.folder / CONFIG
        try:
            if self.kept is not None:
                path, config = self.kept, stored_about(self.kept)["config"]
            else:
                config = load_tree(read_text(path, MOST_CONFIG, follow=False))
        except (ValueError, OSError) as error:
            raise UserError(
                f"{path} cannot be read: {first_line(error)}; restore the file that training wrote"
            ) from error
        if not isinstance(config, dict) or "backbone" not in config:
            raise UserError(
                f"{path} has no option `backbone`; restore the file that training wrote, or pass another run"
            )
        for name in GROUPS:
            if not isinstance(config.get(name), dict | None):
                raise UserError(
                    f"{path}: {name}={config[name]!s:.60} must be a mapping; restore the file that training wrote"
                )
        return config

    def checkpoint(self, path: Path | None = None) -> "StoredCheckpoint":
        """Open the checkpoint at `path`. If `path` is None, open the newest undamaged checkpoint of the run.

        Raises `UserError` if the checkpoint at `path` is damaged, or if the run has no undamaged checkpoint.
        """
        from cdm_lightning.checkpoint.stored import newest_checkpoint, read_checkpoint, require_good

        if path is not None:
            return require_good(read_checkpoint(path))
        found = newest_checkpoint(self.folder / CHECKPOINTS)
        if found is None:
            raise UserError(f"{self.folder} has no checkpoint yet; let the run train longer or pass a checkpoint")
        return found

    def metrics(self) -> Mapping[str, Any] | None:
        """Return the content of metrics.json, which the run's last evaluation wrote.

        The result is None if the run has not been evaluated yet, or if the checkpoint `kept` has been copied out of the
        run's folder. Raises `UserError` if metrics.json cannot be read.
        """
        if self.kept is not None and not (self.folder / CONFIG).is_file():
            return None  # the checkpoint has been copied out of its run's folder
        try:
            return read_record(self.folder / METRICS, "repair it or remove it")
        except FileNotFoundError:
            return None


def stored_about(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint stores about its run: the configuration ("config") and the input files ("inputs").

    A key that the checkpoint does not store is absent. If the checkpoint cannot be read, the result is {}.
    """
    from cdm_lightning.checkpoint.stored import read_checkpoint

    try:
        return read_checkpoint(checkpoint).about
    except UserError:
        return {}


def checkpoint_folder(run: Run, config: Mapping[str, Any]) -> Path:
    """Return the folder that the option `checkpoint.folder` of `config` names.

    `config` is the configuration with which `run` is about to start. The option may have named another folder at the
    run's last start. Raises `UserError` if that other folder has checkpoints and the new folder has none. Without this
    error, the run would begin anew without a warning.
    """
    folder = Path(str(config["checkpoint"]["folder"]))
    if not (run.folder / CONFIG).is_file() or checkpoints_in(folder):
        return folder
    try:
        saved = run.config()
    except UserError:  # reported when the configurations are compared
        return folder
    options = saved.get("checkpoint")
    earlier = Path(str(options.get("folder"))) if isinstance(options, Mapping) else folder
    inner = _relative(earlier, Path(str(saved.get("output_dir"))))  # in the run's folder, which may have moved since
    if inner is not None and checkpoints_in(run.folder / inner):
        earlier = run.folder / inner
    is_moved = inner is not None and inner == _relative(folder, run.folder)  # together with its checkpoints
    if not is_moved and earlier.resolve() != folder.resolve() and (old := checkpoints_in(earlier)):
        raise UserError(
            f"checkpoint.folder={folder} is empty, but the run {run.folder} has checkpoints in {earlier} (the last is "
            f"{old[-1].name}); set checkpoint.folder={earlier}, move the checkpoints, or begin anew with another run_name"
        )
    return folder


def _relative(folder: Path, base: Path) -> Path | None:
    return folder.relative_to(base) if folder.is_relative_to(base) else None


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` looks like a checkpoint.

    A folder looks like a checkpoint if it contains COMPLETE.json, or if its name is that of a checkpoint, such as
    "iteration_0001000". A path that is no folder counts as a checkpoint, because it cannot be a run's folder.
    """
    return not path.is_dir() or (path / MARKER).is_file() or PATTERN.fullmatch(path.name) is not None


def is_run(path: Path) -> bool:
    """Return whether `path` looks like a run's folder or a checkpoint.

    A run's folder has a config.yaml. A checkpoint is a folder with COMPLETE.json, or a file whose name ends with
    .safetensors or .ckpt. A folder with a model_index.json is a diffusers pipeline and not a run's folder, even if it
    has a config.yaml.
    """
    is_stored = (path / MARKER).is_file() or path.suffix in (".safetensors", ".ckpt")
    return is_stored or ((path / CONFIG).is_file() and not (path / "model_index.json").exists())
