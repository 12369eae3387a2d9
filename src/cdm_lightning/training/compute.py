"""The options for memory and speed (the group `compute`); they may be changed when a run is resumed."""

from dataclasses import dataclass

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import Choice, Count, Pixels, Share
from cdm_lightning.training.attention import check_attention
from cdm_lightning.training.float8 import check_float8
from cdm_lightning.training.gradient_checkpointing import Recomputation

SMALLEST_TILE = 64  # pixels; a tile must be several latents wide


@dataclass(frozen=True)
class Compute:
    """Options that trade memory for speed; they change results by rounding only, which is coarse with `fp8`.

    - `accumulate`: each process computes its batch in this many parts, one after another (gradient accumulation).
    - `gradient_checkpointing`: the share of a network's blocks that recompute their activations in the backward pass,
      from 0 (or false) to 1 (or true).
    - `recompute_attention`: whether these blocks also recompute the results of attention; otherwise the results stay in
      memory.
    - `compile_backend`: a backend of torch.compile for the networks' blocks, for example "inductor"; null compiles
      nothing.
    - `rollouts_together`: rollouts of up to this many iterations between two updates of the student are computed as one
      batch.
    - `decode_tile`: images with a side above this number of pixels are decoded in tiles of this size, which saves
      memory in validation; null means never.
    - `attention`: the kernel that computes attention if it supports the inputs: "math", "flash", "efficient", "cudnn",
      or, if their packages are installed, "flash3" or "flash4"; null is torch's choice (see `training.attention`).
    - `fp8`: network calls without a gradient (rollouts, teacher) compute in 8-bit floats: "rowwise" needs a GPU that
      has them, and "emulated" has the same rounding on every device and is slow (see `training.float8`); null is off.

    Raises UserError for a value out of its range.
    """

    accumulate: Count = 1
    gradient_checkpointing: Share | bool = False
    recompute_attention: bool = True
    compile_backend: Choice | None = None
    rollouts_together: Count = 2
    decode_tile: Pixels | None = None
    attention: Choice | None = None
    fp8: Choice | None = None

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
                    f"compute.compile_backend={self.compile_backend} is no backend of torch.compile; set one of "
                    f"{', '.join(known)}, or null"
                )
        check_attention(self.attention, "compute.attention")
        check_float8(self.fp8)
        _ = self.recomputation

    @property
    def recomputation(self) -> Recomputation:
        """Which activations the backward pass recomputes. Raises UserError for a share outside [0, 1]."""
        return Recomputation(float(self.gradient_checkpointing), self.recompute_attention)
