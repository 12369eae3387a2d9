"""The options of a run's memory and speed (the group `compute`); they may be changed when a run is resumed."""

from dataclasses import dataclass

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Choice, Count, Pixels, Share
from cdm_lightning.training.gradient_checkpointing import Recomputation

SMALLEST_TILE = 64  # pixels; a tile must be several latents wide


@dataclass(frozen=True)
class Compute:
    """Options that trade memory for speed; they change the result of a run by rounding at most.

    A process computes its batch in `accumulate` parts, one after another (gradient accumulation). `gradient_checkpointing` is
    the share of a network's blocks that recompute their activations in the backward pass, from 0 (or false) to 1 (or true);
    the results of attention are recomputed only with `recompute_attention`. `compile_backend` is a backend of torch.compile,
    for example "inductor", which compiles the networks block by block; null compiles nothing. While the student stays the
    same, the rollouts of up to `rollouts_together` iterations are computed as one batch. Images with a side above `decode_tile`
    pixels are decoded in overlapping tiles of that size, which takes less memory in validation (null: never). Raises
    UserError for a value out of its range.
    """

    accumulate: Count = 1
    gradient_checkpointing: Share | bool = False
    recompute_attention: bool = True
    compile_backend: Choice | None = None
    rollouts_together: Count = 2
    decode_tile: Pixels | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "rollouts_together"):
            if getattr(self, name) < 1:
                raise UserError(f"compute.{name}={getattr(self, name)} must be at least 1")
        if self.decode_tile is not None and self.decode_tile < SMALLEST_TILE:
            raise UserError(f"compute.decode_tile={self.decode_tile} must be at least {SMALLEST_TILE} pixels, or null")
        if self.compile_backend is not None:
            from torch._dynamo import list_backends  # takes seconds to import, so only where it is used

            if self.compile_backend not in (known := list_backends(exclude_tags=())):
                raise UserError(
                    f"compute.compile_backend={self.compile_backend} is no backend of torch.compile: {', '.join(known)}, or null"
                )
        _ = self.recomputation

    @property
    def recomputation(self) -> Recomputation:
        """Which activations the backward pass recomputes; raises UserError for a share outside 0 to 1."""
        return Recomputation(float(self.gradient_checkpointing), self.recompute_attention)
