"""An objective's own state in a checkpoint: only what can be read back safely, only by the class that wrote it."""

import io
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cdm_lightning.errors import UserError

if TYPE_CHECKING:
    from cdm_lightning.objectives.base import Objective


def class_of(value: object) -> str:
    """The dotted name of its class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def require_readable(objective: "Objective") -> None:
    """UserError if the objective's state could not be read back from a checkpoint: then no later start would succeed."""
    packed = io.BytesIO()
    try:
        torch.save(objective.state_dict(), packed)
        packed.seek(0)
        torch.load(packed, weights_only=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, pickle.PickleError) as error:
        raise UserError(
            f"objective: state_dict of {class_of(objective)} must hold plain values and tensors alone "
            f"({str(error).splitlines()[0]})"
        ) from error


def restore_objective(objective: "Objective", state: Mapping[str, Any]) -> str | None:
    """Give the objective its own state back; that of another class is left out, and the text returned says so."""
    stored, name = state.get("objective"), class_of(objective)  # older versions kept none
    if not stored:
        return None
    if state.get("objective_class", name) != name:
        return f"the state of the checkpoint's objective ({state['objective_class']}) is not taken over by {name}"
    objective.load_state_dict(stored)
    return None
