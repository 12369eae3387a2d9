"""The optimizer steps of all trained networks: losses in parts, gradient clipping, and skipped steps for non-finite gradients."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cdm_lightning.core.transfer import Fetched
from cdm_lightning.distributed.sharding import average_whole_gradients, whole
from cdm_lightning.errors import UserError
from cdm_lightning.objectives.base import Objective, TermLosses, Update
from cdm_lightning.training.optim import OptimizerRecipe


class Updates:
    """Makes the optimizer steps of all trained networks, and counts the skipped steps.

    `recipes` are the optimizer settings by role. A step is skipped if its loss or its gradient is not finite. For each
    role, `skipped_steps` counts all skipped steps, and `skipped_in_a_row` counts those since the last step that was not
    skipped. Checkpoints hold both counts, and they are equal in all processes. On a GPU, the steps of an iteration are
    counted when the first step of the next iteration is made, or when `settle` is called, so that the host need not
    wait.
    """

    def __init__(self, recipes: Mapping[str, OptimizerRecipe]) -> None:
        self.recipes = dict(recipes)
        self.skipped_steps = dict.fromkeys(recipes, 0)
        self.skipped_in_a_row = dict.fromkeys(recipes, 0)
        self._uncounted: list[tuple[int, str, Fetched]] = []  # (iteration, role, whether its step was made)

    def step(
        self,
        role: str,
        networks: Mapping[str, nn.Module],
        optimizer: Optimizer,
        losses: Iterable[tuple[float, TermLosses]],
        backward: Callable[[Tensor], None],
        iteration: int,
    ) -> dict[str, Tensor]:
        """Make one optimizer step of `role` and return its figures (0-d) by name.

        The figures are "loss", the terms and logs of the loss (see `TermLosses`), and "grad_norm". The batch is
        computed in parts. For each part, `losses` yields (share, loss): the share of the batch's samples that are in
        this part, and the loss of this part. Each figure except "grad_norm" is the mean over the parts, weighted by
        these shares. `backward(loss)` runs the backward pass of a part before the next part is computed. Gradients of
        all `networks` except that of `role` are dropped. "grad_norm" is the norm of the gradient before clipping; if it
        is not finite, the step is skipped (see `step_if`).
        """
        recipe = self.recipes[role]
        self.settle(before=iteration)
        recipe.set_learning_rate(optimizer, iteration)
        others = [p for name, network in networks.items() if name != role for p in network.parameters()]
        figures: dict[str, Tensor] = {}
        for share, loss in losses:
            backward(loss.total * share * unless_infinite(loss.total))
            for parameter in others:
                parameter.grad = None
            for key, value in {"loss": loss.total, **loss.terms, **loss.logs}.items():
                figures[key] = figures.get(key, 0.0) + share * value.detach()
            del loss  # frees its graph before the next part is computed
        parameters = list(networks[role].parameters())
        average_whole_gradients(parameters)
        norm = whole(nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
        finite = torch.isfinite(norm)
        step_if(finite, optimizer)
        optimizer.zero_grad(set_to_none=True)
        self._uncounted.append((iteration, role, Fetched(finite)))
        if not finite.is_cuda:
            self.settle()
        return {**figures, "grad_norm": norm.detach()}

    def settle(self, before: int | None = None) -> None:
        """Update `skipped_steps` and `skipped_in_a_row` with the steps that are not counted yet.

        If `before` is given, only the steps of the iterations before `before` are counted. Waits until the device has
        finished these steps.
        """
        due = [entry for entry in self._uncounted if before is None or entry[0] < before]
        self._uncounted = self._uncounted[len(due) :]
        _ = [made.values for _, _, made in due[-1:]]  # the last flag is ready last, so the host waits only here
        for _, role, made in due:
            finite = bool(made.values)
            self.skipped_in_a_row[role] = 0 if finite else self.skipped_in_a_row[role] + 1
            self.skipped_steps[role] += 0 if finite else 1

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts of skipped steps for a checkpoint, as {name of the count: {role: number}}."""
        self.settle()
        return {"skipped_steps": dict(self.skipped_steps), "skipped_in_a_row": dict(self.skipped_in_a_row)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Restore the counts that `state_dict` returned. Counts of roles that are no longer trained are ignored."""
        self._uncounted = []
        for name, counts in self.state_dict().items():
            getattr(self, name).update({role: state[name].get(role, 0) for role in counts})


def step_if(finite: Tensor, optimizer: Optimizer) -> None:
    """Make one step of `optimizer` if `finite` (0-d) is true; otherwise change nothing.

    Fused optimizers of torch make this decision on the device, as they do for `torch.amp.GradScaler`. With any other
    optimizer, the host waits for the device. `optimizer` may be wrapped by Lightning.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if getattr(inner, "_step_supports_amp_scaling", False):
        inner.found_inf = (~finite).float()
        try:
            optimizer.step()
        finally:
            del inner.found_inf
        return
    if not finite:
        optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing, but is counted by Lightning
    optimizer.step()


def recipes_of(objective: Objective, optim: Mapping[str, OptimizerRecipe]) -> dict[str, OptimizerRecipe]:
    """Return the optimizer settings (`OptimizerRecipe`) of the roles that the objective trains, from `optim`.

    Entries of `optim` for other roles are ignored. Raises UserError if a trained role has no entry, or an entry that is
    no `OptimizerRecipe`.
    """
    roles = ("student", *(role.name for role in objective.roles))
    lacking = [role for role in roles if role not in optim]
    if lacking:
        raise UserError(
            f"optim: {type(objective).__name__} trains {lacking[0]}, which has no optimizer; add optim.{lacking[0]} (see "
            "conf/optim/recipe)"
        )
    wrong = [role for role in roles if not isinstance(optim[role], OptimizerRecipe)]
    if wrong:
        raise UserError(
            f"optim.{wrong[0]} must be an optimizer recipe (see conf/optim/recipe), got {optim[wrong[0]]!r}"
        )
    return {role: optim[role] for role in roles}


def steps_of(objective: Objective, iteration: int, group: range) -> list[tuple[Update, int]]:
    """Return the optimizer steps of an iteration in their order, as pairs (update, number of earlier steps).

    The number counts the earlier steps of the same role in this iteration. It is passed to `StepRandom.again`, so that
    each step has its own random numbers. The rollouts of the iterations in `group` are computed as one batch.

    Raises ValueError in two cases:

    - The iteration has no update; Lightning would never count it.
    - The student is updated before the last iteration of the group; the group's later rollouts would come from an older
      student.
    """
    name = type(objective).__name__
    updates = [update for update in objective.updates(iteration) for _ in range(update.repeat)]
    if not updates:
        raise ValueError(f"{name} has no update in iteration {iteration}; return at least one from updates")
    if iteration != group[-1] and any(update.role == "student" for update in updates):
        raise ValueError(
            f"{name} updates the student in iteration {iteration}, but its student_period promises no update before "
            f"iteration {group[-1]}; make student_period agree with updates, or return None"
        )
    roles = [update.role for update in updates]
    return [(update, roles[:number].count(update.role)) for number, update in enumerate(updates)]


def unless_infinite(loss: Tensor) -> Tensor:
    """Return the factor by which a loss (0-d) is multiplied before its backward pass: 1 if it is finite, otherwise NaN.

    The factor NaN makes all gradients NaN. Their average over the processes is NaN too, so all processes skip the step.
    """
    return torch.where(loss.detach().isfinite(), 1.0, float("nan"))
