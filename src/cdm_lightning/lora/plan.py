"""Which of the trained networks are LoRAs, and their settings: plain data, checked before any weights are loaded."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cdm_lightning.errors import UserError

Presets = Mapping[str, tuple[str, ...]]  # a backbone's `lora_targets`


@dataclass(frozen=True)
class Adapter:
    """A LoRA: the weight W of each target layer becomes W + scale B A, with A (rank, in) and B (out, rank).

    `targets` is the name of a preset of the backbone (such as "attention") or a list of endings of layer names (such as
    ["to_q", "ff.net.2"]). The scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv:2312.03732).
    `use_dora` trains the magnitudes of the rows of W separately from their directions (arXiv:2402.09353). Raises UserError
    for an argument out of its range.
    """

    rank: int = 64
    alpha: float = 128.0
    targets: str | Sequence[str] = "attention_feed_forward"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(
                f"lora: rank must be at least 1 and alpha greater than 0, got {self.rank} and {self.alpha:g}"
            )
        if not self.targets:
            raise UserError("lora: targets is empty; give a preset of the backbone or a list of endings of layer names")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def tag(self) -> str:
        """All settings as one short text, for the fingerprint of checkpoints."""
        targets = self.targets if isinstance(self.targets, str) else "/".join(self.targets)
        return f"{self.rank}:{self.alpha:g}:{targets}" + ":rslora" * self.use_rslora + ":dora" * self.use_dora

    def endings(self, presets: Presets) -> tuple[str, ...]:
        """Return the endings of the names of the target layers; UserError for a preset that the backbone does not have."""
        if not isinstance(self.targets, str):
            return tuple(self.targets)
        if self.targets not in presets:
            known = ", ".join(presets) or "none"
            raise UserError(
                f"lora: the backbone has no preset targets={self.targets}, it has: {known}; use one of these or list endings"
            )
        return presets[self.targets]


class LoRAPlan:
    """The adapters of trained networks by role: `LoRAPlan(student=Adapter(...))`.

    All weights of a role without an adapter are trained. Adapters of roles that the objective does not train are not used.
    Raises UserError for a value that is not an adapter.
    """

    def __init__(self, **adapters: Adapter | None) -> None:
        wrong = [role for role, adapter in adapters.items() if not isinstance(adapter, Adapter | None)]
        if wrong:
            raise UserError(f"lora.{wrong[0]} must be an adapter (see conf/lora/adapter) or null")
        first = sorted(adapters, key=lambda role: (role != "student", role))
        self._adapters = {role: adapter for role in first if (adapter := adapters[role]) is not None}

    def of(self, role: str) -> Adapter | None:
        """Return the adapter of a role, or None if all its weights are trained. "student_ema" has the student's adapter."""
        return self._adapters.get("student" if role == "student_ema" else role)

    def among(self, roles: Iterable[str]) -> dict[str, Adapter]:
        """Return the adapters of the given roles; roles without an adapter are left out."""
        return {role: adapter for role in roles if (adapter := self.of(role)) is not None}

    def unused(self, roles: Iterable[str]) -> list[str]:
        """Return the roles that have an adapter but are not among `roles`."""
        return [role for role in self._adapters if role not in set(roles)]

    def tag(self, roles: Iterable[str]) -> str:
        """Return the part of a checkpoint's fingerprint for the adapters of the trained `roles`; "" if there are none.

        Checkpoints of other adapters then have another fingerprint and do not fit.
        """
        used = set(roles)
        parts = [f"{role}={adapter.tag}" for role, adapter in self._adapters.items() if role in used]
        return f"+lora({', '.join(parts)})" if parts else ""

    def check(self, presets: Presets) -> None:
        """Raise UserError if `targets` names a preset that the backbone does not have."""
        for adapter in self._adapters.values():
            adapter.endings(presets)
