"""A trial of a run's optimizers before any network is built: a few steps on small weights."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cdm_lightning.config import one_line
from cdm_lightning.errors import UserError
from cdm_lightning.training.optim import OptimizerRecipe

MATRIX, BIAS = (64, 64), (64,)  # the shapes of the trial's weights; torchao keeps small states in full precision
STEPS = 3  # some options, such as a momentum, act from the second step on
RATE = 1e-3


def require_working(recipes: Mapping[str, OptimizerRecipe], adapted: Collection[str] = ()) -> None:
    """Raise `UserError` for the first role whose optimizer does not work.

    The optimizer of each role in `recipes` makes a few steps on a small matrix and a small bias. The roles in `adapted`
    are LoRAs, which have matrices only, so their optimizers get no bias. An optimizer does not work if it cannot be
    built, fails in a step, makes weights that are not finite, or follows the gradient upwards. The weights are on the
    CPU. If an optimizer does not work on the CPU and this machine has a GPU, it is tried on the GPU, and only the
    result of the trial on the GPU counts.
    """
    for role, recipe in recipes.items():
        shapes = (MATRIX,) if role in adapted else (MATRIX, BIAS)
        problem = _problem(recipe.optimizer, shapes)
        if problem is not None:
            option = _culprit(recipe.optimizer, shapes)
            where = f"optim.{role}.optimizer{option}"
            raise UserError(
                f"{where}: {_name(recipe.optimizer)} {problem}; change or remove this option, or choose optim=adamw"
            )


def _problem(optimizer: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> str | None:
    found = _problem_on(torch.device("cpu"), optimizer, shapes)
    if found is not None and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count()
        found = _problem_on(torch.device("cuda", local), optimizer, shapes)
    return found


def _problem_on(device: torch.device, optimizer: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> str | None:
    weights = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            made = optimizer(weights, lr=RATE)
            if not isinstance(made, Optimizer):
                return f"gives a {type(made).__name__}, but it must be an optimizer of torch"
            for _ in range(STEPS):
                for weight in weights:
                    weight.grad = torch.ones_like(weight)
                made.step()
            moved = [float(weight.detach().sum()) for weight in weights]
    except Exception as error:
        return f"cannot make a step ({type(error).__name__}: {one_line(error)})"
    if not all(-1e30 < way < 1e30 for way in moved):
        return "makes weights that are not finite"
    return "trains away from the target: its steps follow the gradient upwards" if max(moved) > 0 else None


def _culprit(optimizer: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> str:
    """Return ".NAME=VALUE" of the option that makes the optimizer fail, or "" if none is found.

    Each option is removed in turn; the result is the last option whose removal makes the optimizer work.
    """
    if not isinstance(optimizer, partial):
        return ""
    for name, value in reversed(optimizer.keywords.items()):
        rest = {other: kept for other, kept in optimizer.keywords.items() if other != name}
        if _problem(partial(optimizer.func, *optimizer.args, **rest), shapes) is None:
            return f".{name}={value}"
    return ""


def _name(optimizer: Callable[..., Any]) -> str:
    made = optimizer.func if isinstance(optimizer, partial) else optimizer
    return getattr(made, "__name__", type(made).__name__)
