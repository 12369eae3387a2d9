"""Store an objective's own state in a checkpoint, and load it again.

The state consists of plain values and tensors. It is loaded only into an objective of the class that wrote it.
"""

import io
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

if TYPE_CHECKING:
    import lightning as L

    from cdm_lightning.module import CDMModule
    from cdm_lightning.objectives.base import Objective


def class_of(value: object) -> str:
    """Return the dotted name of the class of `value`."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def require_readable(objective: "Objective") -> None:
    """Raise `UserError` if torch cannot save the objective's `state_dict()` and load it with `weights_only=True`.

    Checkpoints are loaded with `weights_only=True`, so a run whose state fails here could never be resumed.
    """
    packed = io.BytesIO()
    try:
        torch.save(objective.state_dict(), packed)
        packed.seek(0)
        torch.load(packed, weights_only=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, pickle.PickleError) as error:
        raise UserError(
            f"objective: the state_dict of {class_of(objective)} cannot be read back ({first_line(error)}); its state_dict() must "
            "return only numbers, strings, tensors, and lists and dicts of them"
        ) from error


def restore_objective(objective: "Objective", state: Mapping[str, Any]) -> str | None:
    """Load the objective's own state from `state`, the content of a checkpoint's trainer.pt (see `trainer_state`).

    A state that an objective of another class wrote is not loaded. In this case the result is a message about it for
    the user, otherwise None.
    """
    stored, name = state.get("objective"), class_of(objective)  # older versions did not store it
    if not stored:
        return None
    if state.get("objective_class", name) != name:
        return f"the state of the checkpoint's objective ({state['objective_class']}) is ignored by {name}"
    objective.load_state_dict(stored)
    return None


def trainer_state(trainer: "L.Trainer", module: "CDMModule") -> dict[str, Any]:
    """Return the content of a checkpoint's trainer.pt: the states of Lightning's loop, the callbacks and the objective.

    The keys are "fit_loop", "callbacks", "objective" and "objective_class". "callbacks" maps the `state_key` of each
    callback to its state, and "objective_class" is the dotted name of the objective's class.
    """
    # pyrefly: ignore[missing-attribute]  Lightning sets this attribute from another module
    callbacks = {callback.state_key: state for callback in trainer.callbacks if (state := callback.state_dict())}
    objective = module.objective.state_dict()
    return {
        "fit_loop": trainer.fit_loop.state_dict(),
        "callbacks": callbacks,
        "objective": objective,
        "objective_class": class_of(module.objective),
    }
