"""How a network is updated: the optimizer, its learning rate as a function of the iteration, and gradient clipping."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import GradientNorm, Iteration, Rate, Share


@dataclass(frozen=True)
class LearningRate:
    """A learning rate with a linear warm-up to `peak` over `warmup` iterations, a constant part and a linear decay to 0.

    The decay is from iteration `decay_from * total` to iteration `total`; `decay_from=1` means no decay. The rate is a
    function of the iteration alone, so it has no state to save or to step. CDM's published schedule is 100 steps of
    warm-up, then constant (arXiv:2605.06376). The authors count optimizer steps, and their student makes one in two
    iterations, so their 100 steps of the student are `warmup=200` here. Raises UserError for a number out of its range, and
    for `decay_from` below 1 without `total`.
    """

    peak: Rate
    warmup: Iteration = 100
    total: Iteration | None = None
    decay_from: Share = 1.0

    def __post_init__(self) -> None:
        if self.peak < 0 or self.warmup < 0 or not 0 <= self.decay_from <= 1:
            raise UserError(
                f"optim.ROLE.learning_rate: peak={self.peak} and warmup={self.warmup} must be at least 0, and "
                f"decay_from={self.decay_from} must be in [0, 1]"
            )
        if self.decay_from < 1 and (self.total is None or self.total < 1):
            raise UserError(
                f"optim.ROLE.learning_rate: decay_from={self.decay_from} needs total, the iteration (at least 1) at which the "
                f"rate reaches 0, got total={self.total}"
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
    """The optimizer settings of one network: `optimizer(parameters, lr=...)` builds it, `learning_rate` gives its rate.

    Before each step the gradients are clipped to the norm `max_grad_norm`, taken over all parameters of the network. Raises
    `TypeError` if `optimizer` is a partial with keywords that the optimizer's constructor does not take.
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

    def set_learning_rate(self, optimizer: Optimizer, iteration: int) -> None:
        """Set the learning rate of `iteration` in the optimizer; if it keeps its rate in a tensor, as torchao's do, in place."""
        rate = self.learning_rate.at(iteration)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
