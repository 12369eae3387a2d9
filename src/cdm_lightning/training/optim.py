"""The update of a network: its optimizer, its learning rate as a function of the iteration, and gradient clipping."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.kinds import GradientNorm, Iteration, Rate, Share


@dataclass(frozen=True)
class LearningRate:
    """A learning rate that rises linearly to `peak`, stays there, and can fall linearly to 0.

    It rises over the first `warmup` iterations. It falls from iteration `decay_from * total` to iteration `total`;
    `decay_from=1` means that it does not fall. The rate depends on the iteration only, so checkpoints need not store
    it. CDM's published schedule is 100 optimizer steps of warm-up without decay (arXiv:2605.06376). The published
    student makes a step in every second iteration, so for the student this is `warmup=200`. Raises UserError for a
    number out of its range, and if `decay_from` is below 1 without a `total`.
    """

    peak: Rate
    warmup: Iteration = 100
    total: Iteration | None = None
    decay_from: Share = 1.0

    def __post_init__(self) -> None:
        if self.peak < 0 or self.warmup < 0 or not 0 <= self.decay_from <= 1:
            raise UserError(
                f"optim.ROLE.learning_rate has peak={self.peak}, warmup={self.warmup} and decay_from={self.decay_from} "
                "(ROLE is a trained network such as student); set peak and warmup to at least 0, and "
                "decay_from between 0 and 1"
            )
        if self.decay_from < 1 and (self.total is None or self.total < 1):
            raise UserError(
                f"optim.ROLE.learning_rate.total={self.total} must be at least 1, because with decay_from="
                f"{self.decay_from} the rate falls to 0 at this iteration (ROLE is a trained network such as student); "
                "set total, or decay_from=1 for no decay"
            )

    def at(self, iteration: int) -> float:
        """Return the learning rate of `iteration`, counted from 0."""
        rate = self.peak * min(1.0, (iteration + 1) / max(self.warmup, 1))
        if self.decay_from == 1 or self.total is None:
            return rate
        left = (self.total - iteration) / (self.total * (1 - self.decay_from))
        return rate * min(1.0, max(0.0, left))


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer settings of one network: optimizer, learning rate and gradient clipping.

    `optimizer(parameters, lr=...)` returns the optimizer. Before each step, the gradients are clipped to the norm
    `max_grad_norm`, taken over all parameters of the network. Raises `TypeError` if `optimizer` is a
    `functools.partial` with an argument that its function does not have.
    """

    optimizer: Callable[..., Optimizer]
    learning_rate: LearningRate
    max_grad_norm: GradientNorm = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, partial):
            inspect.signature(self.optimizer.func).bind_partial(**self.optimizer.keywords)

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build the optimizer for `parameters`, with the learning rate of the first iteration."""
        return self.optimizer(parameters, lr=self.learning_rate.at(0))

    def build_for(self, role: str, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build the optimizer for the weights of `role`. Raises UserError if the optimizer refuses them, as Muon refuses a bias."""
        try:
            return self.build(parameters)
        except Exception as error:
            raise UserError(
                f"optim.{role}.optimizer refuses the weights of {role} ({first_line(error)}); choose another optimizer"
            ) from error

    def set_learning_rate(self, optimizer: Optimizer, iteration: int) -> None:
        """Set the optimizer's learning rate for `iteration`.

        Optimizers of torchao keep the rate in a tensor, which is changed in place.
        """
        rate = self.learning_rate.at(iteration)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
