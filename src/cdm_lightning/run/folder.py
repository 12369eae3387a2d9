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
    """The folder of a run: `config.yaml`, `starts.jsonl`, `checkpoints/`, and `metrics.json` once it has been evaluated."""

    folder: Path
    kept: Path | None = None  # a checkpoint that is kept elsewhere than its run, and knows the run's configuration

    @classmethod
    def create(cls, folder: Path) -> "Run":
        """The run in this folder, which is made if it is missing; UserError if a file is in its place."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be the output folder ({error.strerror}); set another run_name"
            ) from error
        return cls(folder)

    @classmethod
    def find(cls, source: str | Path) -> tuple["Run", Path | None]:
        """The run that a path belongs to, and the checkpoint if the path is one; UserError if it belongs to no run."""
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
                f"{folder} is not a run folder, because it has no {CONFIG}, and {source.name} does not know its configuration; "
                f"pass outputs/RUN or a checkpoint in outputs/RUN/{CHECKPOINTS}"
            )
        return cls(folder), source

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.absolute().name

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, the oldest iteration first; they are not verified."""
        return checkpoints_in(self.folder / CHECKPOINTS)

    @property
    def is_started(self) -> bool:
        """Whether it has a configuration."""
        return self.kept is not None or (self.folder / CONFIG).is_file()

    def config(self) -> dict[str, Any]:
        """The resolved configuration of its last start; UserError if it cannot be read or names no backbone."""
        from cdm_lightning.config.registered import load_tree

        path = self.folder / CONFIG
        try:
            if self.kept is not None:
                path, config = self.kept, stored_about(self.kept)["config"]
            else:
                config = load_tree(read_text(path, MOST_CONFIG, follow=False))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error
        if not isinstance(config, dict) or "backbone" not in config:
            raise UserError(f"{path} names no backbone, so it is not the configuration of a run")
        return config

    def checkpoint(self, path: Path | None = None) -> "StoredCheckpoint":
        """The checkpoint at this path, or the newest good one; UserError if there is none or its files are damaged."""
        from cdm_lightning.checkpoint.stored import newest_checkpoint, read_checkpoint, require_good

        if path is not None:
            return require_good(read_checkpoint(path))
        found = newest_checkpoint(self.folder / CHECKPOINTS)
        if found is None:
            raise UserError(f"{self.folder} holds no checkpoint yet; let the run train longer or pass a checkpoint")
        return found

    def metrics(self) -> Mapping[str, Any] | None:
        """The figures of its last evaluation, or None if there are none; UserError if the file cannot be read."""
        if self.kept is not None and not (self.folder / CONFIG).is_file():
            return None  # the folder is not that of its run
        try:
            return read_record(self.folder / METRICS, "repair it or remove it")
        except FileNotFoundError:
            return None


def stored_about(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint knows of its run (`StoredCheckpoint.about`); empty if it is no readable checkpoint."""
    from cdm_lightning.checkpoint.stored import read_checkpoint

    try:
        return read_checkpoint(checkpoint).about
    except UserError:
        return {}


def checkpoint_folder(run: Run, config: Mapping[str, Any]) -> Path:
    """Return the folder of the checkpoints of a run that is about to start with this configuration.

    Raises `UserError` if the run has checkpoints in another folder and none in this one: it would begin anew.
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
    """Whether the path looks like a checkpoint: a file, or a folder with the marker or the name of one."""
    return not path.is_dir() or (path / MARKER).is_file() or PATTERN.fullmatch(path.name) is not None


def is_run(path: Path) -> bool:
    """Whether the path is the folder of a run or one of its checkpoints, and not a pipeline folder."""
    is_stored = (path / MARKER).is_file() or path.suffix in (".safetensors", ".ckpt")
    return is_stored or ((path / CONFIG).is_file() and not (path / "model_index.json").exists())
