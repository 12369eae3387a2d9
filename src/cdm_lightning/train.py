"""`python -m cdm_lightning.train experiment=...`: compose the configuration, build its objects, train.

A run has one folder, `outputs/RUN_NAME`, with `config.yaml` (the resolved configuration), `checkpoints/`, and the files
of loggers and callbacks. Each start of the command adds a line with command, versions and hardware to `starts.jsonl`.
The same command resumes the run.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cdm_lightning.ends import signals
from cdm_lightning.ends.streams import make_tolerant

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()
    make_tolerant()
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # otherwise the GPU's memory fragments, because lengths vary
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from cdm_lightning.config import answer_questions

if __name__ == "__main__":
    answer_questions("train")

import lightning as L
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.callbacks.foreign import all_known, check_monitors, failure_of, named_parts, open_loggers
from cdm_lightning.callbacks.loggers import GuardedLogger
from cdm_lightning.callbacks.metrics import ValidationMetrics
from cdm_lightning.checkpoint.callback import IterationCheckpoint
from cdm_lightning.checkpoint.folder import checkpoints_in, refuse_old_files
from cdm_lightning.checkpoint.stored import StoredCheckpoint, read_checkpoint, recorded_iteration
from cdm_lightning.config import build, build_named, one_line, process_number, run_cli
from cdm_lightning.config.folders import require_writable_folders
from cdm_lightning.config.secrets import plain
from cdm_lightning.config.whole import check_config
from cdm_lightning.data.caches import use_image_cache, use_text_cache
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.image_cache import ImageCacheSettings
from cdm_lightning.data.loader import worker_failure
from cdm_lightning.data.text_cache import TextCacheSettings
from cdm_lightning.distributed.launch import follow, is_launched, launch
from cdm_lightning.distributed.ranks import lost_process
from cdm_lightning.distributed.strategy import MeshStrategy, device_count, leave_in_place, require_devices
from cdm_lightning.errors import Preempted, UserError
from cdm_lightning.evaluation.samplers import check_samplers
from cdm_lightning.files import first_line, require_name
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.module import CDMModule
from cdm_lightning.run.folder import Run, checkpoint_folder
from cdm_lightning.run.inputs import ACCEPT, Inputs, inputs_of, require_same_inputs
from cdm_lightning.run.lock import only_process_in
from cdm_lightning.run.record import record_start
from cdm_lightning.run.same import moved_ends, require_same_configuration
from cdm_lightning.terminal.quiet import quiet_libraries
from cdm_lightning.training.trial import require_working


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished training: the run's folder, its newest checkpoint (or None), and its last iteration.

    `metrics` holds the last value of each logged figure by name, such as "val/clip_score/student_4".
    """

    folder: Path
    checkpoint: Path | None
    iteration: int
    metrics: dict[str, float]


def train(config: DictConfig) -> TrainResult:
    """Train as `config` describes, from scratch or from the run's newest undamaged checkpoint, up to `trainer.max_steps`.

    Raises `UserError` for mistakes in `config`, before networks are built, and `Preempted` if a signal stops the run.
    """
    check_config(config)
    require_name(str(config.run_name), "run_name")
    require_writable_folders(config)
    run = Run.create(Path(str(config.output_dir)))
    with signals.watched(), only_process_in(run.folder, checkpoint_folder(run, plain(config))):
        signals.loading("before training")
        return train_in(run, config)


def train_in(run: Run, config: DictConfig) -> TrainResult:
    """Train as `train` does, in the folder of `run`, which the caller must have locked (see `only_process_in`)."""
    L.seed_everything(config.seed, verbose=False)
    strategy, module = build(config, "strategy"), build(config, "module", of=CDMModule)
    if isinstance(strategy, MeshStrategy):
        strategy.check(module.network_names, module.whole_names)
    data = build(config, "data", of=PromptDataModule, groups=module.groups.of, images=module.objective.needs_latents)
    if module.compute.accumulate > data.batch_size:
        raise UserError(
            f"compute.accumulate={module.compute.accumulate} must be at most data.batch_size={data.batch_size}; lower "
            "compute.accumulate, or raise data.batch_size"
        )
    require_working(module.updates.recipes, module.lora.among(module.updates.recipes))
    module.resolution.check(module.backbone)
    check_samplers(module.samplers, module.backbone)
    checkpoint = build(config, "checkpoint", of=IterationCheckpoint)
    inputs = inputs_of(plain(config), local_folders(module.backbone))
    checkpoint.begin_with = find_beginning(config, run, checkpoint, module.fingerprint, inputs)
    checkpoint.about = {"config": plain(config), "inputs": inputs}
    metrics = cache(lambda: MetricSuite(build_named(config, "metric"), build_named(config, "feature")))
    callbacks = build(config, "callbacks", offered={"metrics": metrics}, of=L.Callback)
    use_text_cache(build(config, "text_cache", of=TextCacheSettings), module, data, callbacks)
    if module.objective.needs_latents:
        use_image_cache(build(config, "image_cache", of=ImageCacheSettings), module.backbone)
    named = dict(zip(named_parts(config, "callbacks"), callbacks))
    check_figures(module, named, checkpoint, data.val_prompts if config.trainer.limit_val_batches else 0)
    loggers = [GuardedLogger(logger) for logger in build(config, "logger", of=Logger)]
    trainer = make_trainer(config, strategy=strategy, callbacks=[*callbacks, checkpoint], logger=loggers)
    if trainer.is_global_zero:
        open_loggers(dict(zip(named_parts(config, "logger"), loggers)))
        print_cautions(module)
        record_start(plain(config), run, trainer.world_size, inputs)
    fit(trainer, module, data, config, named)
    signals.finished()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return TrainResult(run.folder, next(reversed(checkpoints_in(checkpoint.folder)), None), module.iteration, metrics)


def check_figures(
    module: CDMModule, callbacks: Mapping[str, L.Callback], checkpoint: IterationCheckpoint, images: int
) -> None:
    """Raise `UserError` if `checkpoint` or a callback monitors a figure that is not logged.

    The keys of `callbacks` are options such as "callbacks.early_stopping". `images`: validation prompts (0: no validation).
    """
    measuring = [one for one in callbacks.values() if isinstance(one, ValidationMetrics)] if images else []
    logged = [name for callback in measuring for name in callback.names(module, images)]
    if all_known(callbacks.values()) and type(module) is CDMModule:  # a subclass may log more
        checkpoint.best.check(logged)
        check_monitors(callbacks, logged, tuple(module.updates.recipes))


def fit(trainer: L.Trainer, module: CDMModule, data: PromptDataModule, config: DictConfig, callbacks: Mapping) -> None:
    """Train, and turn an exception whose cause is known into a `UserError`. `callbacks` maps options to callbacks."""
    try:
        trainer.fit(module, data)
    except UserError:
        raise
    except Exception as error:
        found = hidden_end(error) or explained(error, bool(config.data.num_workers), config.strategy.get("timeout"))
        found = found or failure_of(error, callbacks)
        if found is None:
            raise
        raise found from error
    finally:
        data.kill_workers()


def hidden_end(error: BaseException) -> Preempted | UserError | None:
    """Return the `Preempted` or `UserError` during whose handling `error` was raised, or None if there was none."""
    earlier = error.__context__
    while earlier is not None and not isinstance(earlier, (Preempted, UserError)):
        earlier = earlier.__context__
    return earlier


def explained(error: Exception, has_workers: bool, timeout: float | None) -> UserError | None:
    """Return a `UserError` that explains `error` if the failure of another process has caused it, and otherwise None.

    The other process is a worker of the data loader, or a training process that has ended or did not answer for
    `timeout` seconds. `has_workers` says whether the data loader has workers.
    """
    by_worker = has_workers and isinstance(
        error, (ConnectionError, EOFError)
    )  # the worker died while it passed on a batch
    if by_worker or "DataLoader worker" in str(error):
        return UserError(worker_failure(error))
    if lost_process(error):
        return UserError(
            f"another process of this run has ended, or did not answer for {timeout} seconds (strategy.timeout): "
            f"{first_line(error)}; {signals.AGAIN} from the last checkpoint"
        )
    return None


def print_cautions(module: CDMModule) -> None:
    """Print a line on stderr for each LoRA whose role is not trained, and for each warning about the teacher."""
    for role in module.lora.unused(module.updates.recipes):
        print(f"lora.{role} is not used, because the objective does not train {role}", file=sys.stderr, flush=True)
    for caution in module.backbone.cautions(getattr(module.objective, "guidance_scale", 0.0)):
        print(f"WARNING: {caution}", file=sys.stderr, flush=True)


def make_trainer(config: DictConfig, **parts: Any) -> L.Trainer:
    """Build Lightning's trainer from `config.trainer` and `parts`: its strategy, callbacks and loggers.

    Raises `UserError` for values that Lightning refuses, and for devices that this machine does not have.
    """
    make = build(config, "trainer", of=L.Trainer)
    try:
        trainer = make(**parts)
    except Exception as error:  # Lightning's, about a value of the user
        raise UserError(f"trainer: {one_line(error)}; change the named option, such as trainer.devices") from error
    # Lightning's signal handlers wait for other processes, and would hang if only some of them got the signal.
    trainer._signal_connector.register_signal_handlers = lambda: None
    leave_in_place(trainer.strategy)
    return trainer


def find_beginning(
    config: DictConfig, run: Run, checkpoint: IterationCheckpoint, fingerprint: str, inputs: Inputs
) -> Path | None:
    """Return the checkpoint of another run from which this run starts, or None.

    If this run has checkpoints, it continues from them. The result is then None, and `UserError` is raised if
    `config.resume` is "never", or if the backbone, the configuration or the input files (`inputs`) have changed. If
    this run has no checkpoints and `config.resume` is a path, the result is that path, and `UserError` is raised if the
    checkpoint there was trained with a backbone whose `Backbone.fingerprint` is not `fingerprint`.
    """
    refuse_old_files(checkpoint.folder)
    own = checkpoints_in(checkpoint.folder)
    if config.resume == "never" and own:
        raise UserError(f"{run.folder} holds checkpoints, but resume=never; set another run_name or remove the folder")
    if own:
        stored = require_same_backbone(own, fingerprint)
        about = {} if stored is None else stored.about
        is_elsewhere = not checkpoint.folder.resolve().is_relative_to(run.folder.resolve())
        saved = run.config() if run.is_started else about.get("config", {})
        # the path in `resume` may belong to another run
        for earlier in (saved, about.get("config", {}) if is_elsewhere else {}):
            require_same_configuration(earlier, plain(config), run.folder)
        accepted = require_same_inputs(about.get("inputs"), inputs, run.folder, bool(config.get(ACCEPT)))
        for line in (accepted, moved_ends(saved, plain(config))):
            if line and not process_number():
                print(line, file=sys.stderr, flush=True)
        return None
    if config.resume in ("auto", "never"):
        return None
    return read_checkpoint(Path(config.resume), fingerprint).path


def local_folders(backbone: Backbone) -> dict[str, Path]:
    """Return {"backbone.pretrained": the local folder of the pretrained pipeline}, or {} if `backbone` has no pipeline.

    The option `backbone.pretrained` may be a hub id, but `inputs_of` needs the folder of the downloaded pipeline.
    """
    folder = getattr(backbone, "folder", None)
    return {"backbone.pretrained": folder} if isinstance(folder, Path) else {}


def require_same_backbone(own: Sequence[Path], fingerprint: str) -> StoredCheckpoint | None:
    """Return the newest of the run's checkpoints `own` that can be opened, or None if none can be opened.

    Raises `UserError` if this checkpoint was trained with a backbone whose `Backbone.fingerprint` is not `fingerprint`.
    """
    for path in sorted(own, key=recorded_iteration, reverse=True):
        with suppress(UserError):  # a damaged one is reported later, when the run looks for a good checkpoint
            stored = read_checkpoint(path)
            break
    else:
        return None
    return read_checkpoint(stored.path, fingerprint)


def start(config: DictConfig) -> None:
    """Train in this process, or start `trainer.devices` processes that train, and wait for their end.

    No process is started for a single device, or if torchrun or SLURM has started this process. If a started process
    fails, this process exits with the same status.
    """
    check_config(config)
    processes = device_count(config.trainer.devices)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow(os.getppid())
    if processes == 1 or is_launched() or config.strategy._target_.endswith(".single_process"):
        train(config)
        return
    require_devices(config.trainer.devices, config.trainer.accelerator)
    if config.trainer.num_nodes != 1:
        raise UserError(
            f"trainer.num_nodes={config.trainer.num_nodes}, but neither torchrun nor srun started this process; "
            "start this command with one of them on every node (docs/scaling.md)"
        )
    status = launch(OmegaConf.to_yaml(config, resolve=True), processes, "cdm_lightning.train:train")
    if status:
        sys.exit(status)


def main() -> None:
    """Run the command line."""
    quiet_libraries()
    run_cli(start, "train")


if __name__ == "__main__":
    main()
