"""A run as one object: its folder, configuration, checkpoints and figures."""

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
MOST_CONFIG = 1 << 22  # bytes of config.yaml: it takes a second to parse; usual is a few kilobytes


@dataclass(frozen=True)
class Run:
    """A training run, read from its `folder`: config.yaml, starts.jsonl, checkpoints/, and metrics.json once it is evaluated.

    `kept` is a checkpoint that holds the run's configuration itself, so that it can be used without the rest of the folder.
    """

    folder: Path
    kept: Path | None = None

    @classmethod
    def create(cls, folder: Path) -> "Run":
        """Return the run in this folder, which is made if it is missing; raise `UserError` if it cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be the output folder ({error.strerror}); set another run_name"
            ) from error
        return cls(folder)

    @classmethod
    def find(cls, source: str | Path) -> tuple["Run", Path | None]:
        """Return (run, None) if `source` is a run's folder, and (its run, `source`) if it is a checkpoint.

        Raises `UserError` if it is neither, or a checkpoint whose run cannot be found.
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
                f"{folder} is not a run folder, because it has no {CONFIG}, and {source.name} does not hold the run's configuration; "
                f"pass outputs/RUN or a checkpoint in outputs/RUN/{CHECKPOINTS}"
            )
        return cls(folder), source

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.absolute().name

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints in the run's own checkpoints/, the oldest iteration first; their files are not verified."""
        return checkpoints_in(self.folder / CHECKPOINTS)

    @property
    def is_started(self) -> bool:
        """Whether the run has a configuration, because it has been started at least once."""
        return self.kept is not None or (self.folder / CONFIG).is_file()

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration of the run's last start; `UserError` if it cannot be read or has no `backbone`."""
        from cdm_lightning.config.registered import load_tree

        path = self.folder / CONFIG
        try:
            if self.kept is not None:
                path, config = self.kept, stored_about(self.kept)["config"]
            else:
                config = load_tree(read_text(path, MOST_CONFIG, follow=False))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}; restore it as training wrote it") from error
        if not isinstance(config, dict) or "backbone" not in config:
            raise UserError(f"{path} names no backbone; restore it as training wrote it, or pass another run")
        return config

    def checkpoint(self, path: Path | None = None) -> "StoredCheckpoint":
        """Open the checkpoint at `path`, or the newest undamaged one of the run; `UserError` if it is damaged or there is none."""
        from cdm_lightning.checkpoint.stored import newest_checkpoint, read_checkpoint, require_good

        if path is not None:
            return require_good(read_checkpoint(path))
        found = newest_checkpoint(self.folder / CHECKPOINTS)
        if found is None:
            raise UserError(f"{self.folder} holds no checkpoint yet; let the run train longer or pass a checkpoint")
        return found

    def metrics(self) -> Mapping[str, Any] | None:
        """Return the content of metrics.json, from the run's last evaluation; None without one, `UserError` if unreadable."""
        if self.kept is not None and not (self.folder / CONFIG).is_file():
            return None  # the folder is not that of its run
        try:
            return read_record(self.folder / METRICS, "repair it or remove it")
        except FileNotFoundError:
            return None


def stored_about(checkpoint: Path) -> dict[str, Any]:
    """Return the run's "config" and "inputs" that a checkpoint holds (`StoredCheckpoint.about`); {} if it cannot be read."""
    from cdm_lightning.checkpoint.stored import read_checkpoint

    try:
        return read_checkpoint(checkpoint).about
    except UserError:
        return {}


def checkpoint_folder(run: Run, config: Mapping[str, Any]) -> Path:
    """Return `checkpoint.folder` of the configuration with which `run` is about to start.

    Raises `UserError` if there are no checkpoints in it, but some in the one of the run's last start: the run would silently
    begin anew.
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
    is_moved = earlier.is_relative_to(str(saved.get("output_dir"))) and (
        earlier.relative_to(str(saved.get("output_dir"))) == _relative(folder, run.folder)
    )  # the whole run has another place, and its checkpoints with it
    if not is_moved and earlier.resolve() != folder.resolve() and (old := checkpoints_in(earlier)):
        raise UserError(
            f"{run.folder}: the run has checkpoints in {earlier} (the last is {old[-1].name}), but checkpoint.folder={folder} "
            f"holds none; set checkpoint.folder={earlier}, move them, or set another run_name to begin anew"
        )
    return folder


def _relative(folder: Path, base: Path) -> Path | None:
    return folder.relative_to(base) if folder.is_relative_to(base) else None


def is_checkpoint(path: Path) -> bool:
    """Return whether a path looks like a checkpoint: not a folder, or a folder with COMPLETE.json or a checkpoint's name."""
    return not path.is_dir() or (path / MARKER).is_file() or PATTERN.fullmatch(path.name) is not None


def is_run(path: Path) -> bool:
    """Return whether a path looks like a run's folder or a checkpoint, and not like a pipeline folder of diffusers."""
    is_stored = (path / MARKER).is_file() or path.suffix in (".safetensors", ".ckpt")
    return is_stored or ((path / CONFIG).is_file() and not (path / "model_index.json").exists())
