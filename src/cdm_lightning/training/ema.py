"""The EMA of the student: an exponential moving average of its weights, which is evaluated and exported instead of the student."""

from dataclasses import dataclass

from lightning.pytorch.strategies import Strategy
from torch import nn

from cdm_lightning.core.ema import HostFollower, lerp_parameters_, warmed_up_decay
from cdm_lightning.distributed.strategy import MeshStrategy
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import ShareBelowOne


@dataclass(frozen=True)
class EMA:
    """The settings of the EMA, which is updated after each iteration that updates the student.

    An update after n earlier ones multiplies the EMA by d = min(`decay`, (1 + n) / (10 + n)) and adds the student's
    weights times 1 - d. The first updates have a small d, so that the EMA soon forgets the initial weights.
    `decay=None` turns the EMA off. CDM uses `decay=0.999` (arXiv:2605.06376); short runs need a lower value. Raises
    UserError for a `decay` outside [0, 1).
    """

    decay: ShareBelowOne | None = 0.999

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise UserError(f"ema.decay={self.decay} must be at least 0 and below 1, or null for no EMA")

    @property
    def is_on(self) -> bool:
        """Whether the run has an EMA of the student."""
        return self.decay is not None

    def follow(
        self, average: nn.Module, student: nn.Module, updates: int, follower: HostFollower | None = None
    ) -> None:
        """Update the EMA network `average` from `student`, in place. `updates` is the number of earlier updates.

        If a `follower` is given, it makes the update in the background, and `follower.settle()` waits for the end of
        the update.
        """
        assert self.decay is not None
        follow = lerp_parameters_ if follower is None else follower.follow
        follow(average, student, 1 - warmed_up_decay(updates, self.decay))


def follower_of(average: nn.Module | None, strategy: Strategy) -> HostFollower | None:
    """Return a `HostFollower` for the EMA network `average`, or None if it is not needed.

    A `HostFollower` updates an EMA in host memory while the GPU goes on training. It is needed if `strategy` keeps the
    EMA in host memory and trains on a GPU. The device of `average` does not decide this, because Lightning may move the
    networks after this call.
    """
    rests = isinstance(strategy, MeshStrategy) and "student_ema" in strategy.on_cpu
    if average is None or not rests or strategy.root_device.type != "cuda":
        return None
    follower = HostFollower()
    follower.guard(average)
    return follower
