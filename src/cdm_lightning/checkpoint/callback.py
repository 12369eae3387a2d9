"""The callback that saves a run, resumes it from a checkpoint and stops it early."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from cdm_lightning.checkpoint.background import BackgroundSave
from cdm_lightning.checkpoint.best import Best, drop_old, note_validation
from cdm_lightning.checkpoint.folder import checkpoints_in, iteration_of, sweep
from cdm_lightning.checkpoint.health import not_finite
from cdm_lightning.checkpoint.messages import report_failure, say, say_stopped
from cdm_lightning.checkpoint.objective_state import require_readable, restore_objective, trainer_state
from cdm_lightning.checkpoint.save import save_checkpoint
from cdm_lightning.checkpoint.start import choose_start
from cdm_lightning.checkpoint.state import plain_values_of, restore, tensors_of
from cdm_lightning.checkpoint.stored import FINITE, OTHER, RECORD, TRAINER, StoredCheckpoint, is_healthy
from cdm_lightning.checkpoint.validation import make_up_validation
from cdm_lightning.distributed import ranks
from cdm_lightning.ends import signals
from cdm_lightning.errors import Preempted, UserError
from cdm_lightning.files import restoring
from cdm_lightning.kinds import Count, FolderToWrite, Iterations, MetricName

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


class IterationCheckpoint(Checkpoint):
    """Save a run to `folder` every `every` iterations, at the last iteration, and when a signal stops the run.

    - The newest `keep` checkpoints are kept, or all if `keep` is None. The checkpoint with the smallest
      (`best_is="min"`) or largest ("max") value of the validation metric `best` is kept in addition.
    - A run resumes from the newest undamaged checkpoint in `folder`. If `folder` has no checkpoint, the run starts from
      the attribute `begin_with`, a checkpoint of another run, or afresh if this is None. If the run resumes at an
      iteration whose validation was due but not finished, this validation runs before training continues.
    - The run ends with `UserError` if a weight is not finite (such weights are not saved), or if it has skipped
      `max_skipped` updates of a network in a row because of non-finite gradients (None: no limit).
    - With `in_background`, a save every `every` iterations copies the state into host memory, and a thread writes the
      copy while training goes on. All other saves, and the end of the run, wait until it is written.
    - If the disk fails, the run continues. Only a failure at the last iteration ends the run, with `UserError`.
    - If an error occurs between two iterations of a run with one process, the run is saved before it ends.
    """

    def __init__(
        self,
        folder: FolderToWrite,
        every: Iterations = 500,
        keep: Count | None = 2,
        best: MetricName | None = None,
        best_is: Literal["min", "max"] = "min",
        max_skipped: Count | None = 50,
        in_background: bool = False,
    ) -> None:
        for name, value in (("every", every), ("keep", keep), ("max_skipped", max_skipped)):
            if value is not None and value < 1:
                allowed = "" if name == "every" else ", or null"
                raise UserError(f"checkpoint.{name}={value} must be at least 1{allowed}")
        if best_is not in ("min", "max"):
            raise UserError(f"checkpoint.best_is={best_is} must be min or max")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.best, self.max_skipped = Best(self.folder, best, best_is), max_skipped
        self._background = BackgroundSave() if in_background else None
        self.begin_with: Path | None = None  # the checkpoint of another run from which this run starts
        self.about: Mapping[str, Any] | None = None  # stored in each checkpoint: `StoredCheckpoint.about`
        self._start: StoredCheckpoint | None = None
        self._trainer_state: dict[str, Any] = {}  # the state after the last iteration
        self._is_between = False  # whether the run is between two iterations

    # ---- the start

    def setup(self, trainer: L.Trainer, pl_module: "CDMModule", stage: str) -> None:
        """Delete what interrupted saves have left in `folder`, and choose the checkpoint from which the run resumes."""
        if stage == "fit":
            if self._background is not None and trainer.world_size > 1:
                raise UserError("checkpoint.in_background=true is for runs with one process; set it to false")
            if ranks.rank() == 0 and (left := sweep(self.folder)):
                say(f"deleted the remains of an interrupted save: {', '.join(left)}")
            ranks.gather(None)  # no process looks for checkpoints before this is done
            _ = self.best.read()  # refuses a damaged best.json before any work
            self._start = self.choose_start(pl_module.fingerprint)

    def choose_start(self, fingerprint: str) -> StoredCheckpoint | None:
        """Return the checkpoint to resume from, or None for a fresh start. `fingerprint` identifies the backbone."""
        return choose_start(self.folder, self.begin_with, fingerprint, say)

    def on_fit_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Restore networks, optimizers, counters, callbacks and the objective's state from a checkpoint.

        `setup` has chosen the checkpoint. If this run did not finish the validation at the checkpoint's iteration, the
        validation runs now. Raises `UserError` if the checkpoint does not fit this run, or if the objective has a state
        that could not be read back from a checkpoint.
        """
        require_readable(pl_module.objective)
        start, self._start = self._start, None
        if start is None:
            return
        of_record, of_state = ((start.path / name if start.path.is_dir() else start.path) for name in (RECORD, TRAINER))
        with restoring(of_record, OTHER, ranks.lost_process):
            restore(pl_module.networks, pl_module.optimizers_by_role, start)
            pl_module.on_load_checkpoint({"cdm": start.record})
        with restoring(of_state, OTHER, ranks.lost_process):
            state = start.trainer_state()
            if note := restore_objective(pl_module.objective, state):
                say(note)
            trainer.fit_loop.load_state_dict(state["fit_loop"])
            # pyrefly: ignore[missing-attribute]  Lightning sets this attribute from another module
            for callback in trainer.callbacks:
                if callback.state_key in state["callbacks"]:
                    callback.load_state_dict(state["callbacks"][callback.state_key])
        if trainer.global_step != start.iteration:
            raise UserError(
                f"{of_state} was saved at iteration {trainer.global_step}, but the weights at iteration {start.iteration}; {OTHER}"
            )
        if start.path.parent == self.folder:
            if self.best.metric is not None:
                self._trainer_state = trainer_state(trainer, pl_module)
            make_up_validation(trainer, pl_module, start, say)

    def on_train_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """From now on, after a signal, finish the current iteration or validation batch, then save and stop the run."""
        signals.training()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: "CDMModule", *_: object) -> None:
        """Remember that an iteration is running, because `on_exception` must not save in the middle of it."""
        self._is_between = False

    # ---- every iteration

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", *_: object) -> None:
        """Save the run if a save is due or a signal has come. All other callbacks have already handled this iteration."""
        self._check_health(pl_module)
        iteration, stop = trainer.global_step, ranks.any_of(signals.is_asked())
        last = iteration == trainer.max_steps
        self._trainer_state = trainer_state(trainer, pl_module)  # a later save must equal a save at this point
        self._is_between = True
        now = stop or last or trainer.should_stop
        if now or iteration % self.every == 0:
            path = self._save(trainer, pl_module, self._trainer_state, needed=last, now=now)
            if stop:
                self._stop(iteration, path)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", *_: object) -> None:
        """If a signal has come, save and stop the run. The resumed run then repeats the interrupted validation."""
        if not trainer.sanity_checking and ranks.any_of(signals.is_asked()):
            self._stop(trainer.global_step, self._save_late(trainer, pl_module))

    def _save_late(self, trainer: L.Trainer, module: "CDMModule") -> Path | None:
        """Return the path of the checkpoint of the last iteration. If it does not exist yet, it is written now."""
        self._settle()
        iteration = trainer.global_step
        found = {iteration_of(path): path for path in checkpoints_in(self.folder)}.get(iteration)
        if ranks.from_first(found is not None):
            return found
        return self._save(trainer, module, self._trainer_state) if self._trainer_state else None

    def _stop(self, iteration: int, path: Path | None) -> NoReturn:
        say_stopped(iteration, path)
        raise Preempted(f"at iteration {iteration}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Record this iteration in validated.json, and in best.json if its value of the metric `best` is the best yet.

        The best checkpoint is kept until a better one exists. Raises `UserError` if validation did not log the metric.
        """
        if trainer.sanity_checking:
            return
        self._settle()
        if self.best.metric is not None and self._trainer_state:
            self._keep_if_best(trainer, pl_module)
        self._write(lambda: note_validation(self.folder, trainer.global_step))

    def _keep_if_best(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        found = trainer.callback_metrics.get(str(self.best.metric))
        value = ranks.from_first(None if found is None else float(found))
        if value is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(
                f"checkpoint.best={self.best.metric} is not logged by validation; "
                f"{f'set it to one of these: {known}' if known else 'set metric=[NAME] to log figures'}"
            )
        iteration = trainer.global_step
        if not ranks.from_first(self.best.is_improved_by(value)):
            return
        saved = [iteration_of(path) for path in checkpoints_in(self.folder)]
        is_saved = ranks.from_first(iteration in saved) or self._save(trainer, pl_module, self._trainer_state)
        if is_saved and self._write(lambda: self.best.note(value, iteration)) and ranks.rank() == 0:
            self._drop_old()

    def _write(self, work: Callable[[], None]) -> bool:
        """Call `work`, which writes a small file, on the first process. If the disk fails, print a warning and return False."""
        if ranks.rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                work()
            except OSError as error:
                name = error.filename or self.folder
                say(f"WARNING: {name} could not be written ({error.strerror or error}); the run continues")
                return False
        return True

    def on_train_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """If a signal has come, save and stop the run. From now on, a signal stops the run at once, without a save."""
        self._settle()
        if ranks.any_of(signals.is_asked()):
            self._stop(trainer.global_step, self._save_late(trainer, pl_module))
        signals.loading("after training, before the evaluation was complete")

    def on_exception(self, trainer: L.Trainer, pl_module: "CDMModule", exception: BaseException) -> None:
        """Save the last finished iteration if an error or a signal ends a single-process run between two iterations."""
        if self._is_between and self._trainer_state and ranks.world_size() == 1 and not signals.is_saved():
            path = self._save_late(trainer, pl_module)
            if isinstance(exception, Preempted):
                say_stopped(trainer.global_step, path)
            elif path:
                say(f"saved {path}")
        self._settle()
        if not isinstance(exception, Preempted):
            signals.failing()

    # ---- saving

    def _save(
        self, trainer: L.Trainer, module: "CDMModule", state: dict[str, Any], needed: bool = False, now: bool = True
    ) -> Path | None:
        """Save, and return the checkpoint's path. If the disk fails, raise `UserError` if `needed`, otherwise return None.

        Unless `now`, a save in the background only begins here, if the run has such saves. The result is None then.
        """
        self._settle()
        record: dict[str, Any] = {}
        module.on_save_checkpoint(record)
        optimizers = module.optimizers_by_role
        tensors = tensors_of(module.networks, optimizers)
        self._require_finite(tensors, module)
        record = {
            **record["cdm"],
            "world_size": trainer.world_size,
            "optimizers": plain_values_of(module.networks, optimizers),
            FINITE: True,
        }
        if self._background is not None and not now:
            kept, about = deepcopy((record, state)), self.about
            self._background.start(
                record["iteration"], tensors, lambda copies: self._store(copies, *kept, about, alone=True)
            )
            return None
        try:
            return self._store(tensors, record, state, self.about)
        except OSError as error:
            report_failure(self.folder, error, record["iteration"], needed)
            return None

    def _store(self, *content: Any, alone: bool = False) -> Path:
        """Write a checkpoint and delete old ones. The arguments are those of `save_checkpoint`; in the background, `alone`."""
        path = save_checkpoint(self.folder, *content, alone=alone)
        if ranks.rank() == 0:
            self._drop_old()
        return path

    def _drop_old(self) -> None:
        drop_old(self.folder, self.keep, self.best)

    def _settle(self) -> None:
        """Wait until a save in the background is complete, and print a warning if the disk failed."""
        if self._background is not None and (failed := self._background.settle()) is not None:
            report_failure(self.folder, failed[1], failed[0], needed=False)

    def _require_finite(self, tensors: Mapping[str, Tensor], module: "CDMModule") -> None:
        """Raise `UserError` on all processes if any of them has a non-finite weight in a trained network."""
        if (name := not_finite(tensors, module.networks)) is not None:
            raise UserError(
                f"the weight {name} is not finite at iteration {module.iteration}, so nothing was saved; {self._advice()}"
            )

    def _advice(self) -> str:
        """Return the end of a message about non-finite values: advice to resume from the newest checkpoint that is healthy."""
        for path in reversed(checkpoints_in(self.folder)):
            if is_healthy(path):
                return f"resume from {path} with other settings, such as a lower learning rate"
        return "there is no earlier good checkpoint; start again with other settings, such as a lower learning rate"

    def _check_health(self, module: "CDMModule") -> None:
        """Raise `UserError` if `max_skipped` updates of a network in a row were skipped. The counts are the same on all processes."""
        for name, count in module.updates.skipped_in_a_row.items():
            if self.max_skipped is not None and count >= self.max_skipped:
                raise UserError(
                    f"checkpoint.max_skipped={self.max_skipped}: the gradient of {name} was not finite {count} times in a row, "
                    f"up to iteration {module.iteration}; {self._advice()}"
                )
