"""Options that affect the memory and speed of a run; they may be changed when a run is resumed."""

from dataclasses import dataclass

from cdm_lightning.errors import UserError
from cdm_lightning.training.gradient_checkpointing import Recomputation


@dataclass(frozen=True)
class Compute:
    """Options that affect memory and speed; they change the result of a run by rounding at most.

    A process computes its batch in `accumulate` parts, one after another. `gradient_checkpointing` is the share of the
    blocks that recompute their activations in the backward pass (false: none, true: all); attention is recomputed only with
    `recompute_attention`. `compile_backend` is a backend of torch.compile, for example "inductor", which compiles the networks
    block by block; null compiles nothing. The rollouts of at most `rollouts_together` iterations between two updates of the
    student are computed as one batch. Raises UserError for a value out of its range.
    """

    accumulate: int = 1
    gradient_checkpointing: float | bool = False
    recompute_attention: bool = True
    compile_backend: str | None = None
    rollouts_together: int = 2

    def __post_init__(self) -> None:
        for name in ("accumulate", "rollouts_together"):
            if getattr(self, name) < 1:
                raise UserError(f"compute.{name} must be at least 1, got {getattr(self, name)}")
        _ = self.recomputation

    @property
    def recomputation(self) -> Recomputation:
        """Which activations the backward pass recomputes."""
        return Recomputation(float(self.gradient_checkpointing), self.recompute_attention)
