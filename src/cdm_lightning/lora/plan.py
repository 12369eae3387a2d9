"""Which of the trained networks are LoRAs, and their settings: plain data, checked before any weights are loaded.

A role is the name of a network in training, such as "student" or "fake_score".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import LayerEnding, NotEmpty, Positive, Width

Presets = Mapping[str, tuple[str, ...]]  # a backbone's `lora_targets`: preset -> the endings of names of linear layers


@dataclass(frozen=True)
class Adapter:
    """The settings of a LoRA: the weight W of each target layer becomes W + scale B A, with A (rank, in) and B (out, rank).

    `targets` is the name of a preset of the backbone (such as "attention") or a list of endings of layer names (such as
    ["to_q", "ff.net.2"]). The scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv:2312.03732).
    `use_dora` trains the magnitudes of the rows of W separately from their directions (arXiv:2402.09353). Raises UserError
    for an argument out of its range.
    """

    rank: Width = 64
    alpha: Positive = 128.0
    targets: LayerEnding | Annotated[Sequence[LayerEnding], NotEmpty] = "attention_feed_forward"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(
                f"lora.ROLE: rank must be at least 1 and alpha above 0, got rank={self.rank} and alpha={self.alpha:g}"
            )
        if not self.targets:
            raise UserError(
                "lora.ROLE.targets is empty; give a preset of the backbone or a list of endings of layer names"
            )
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def tag(self) -> str:
        """All settings as one short text, by which a checkpoint recognizes the adapter that it was made with."""
        targets = self.targets if isinstance(self.targets, str) else "/".join(self.targets)
        return f"{self.rank}:{self.alpha:g}:{targets}" + ":rslora" * self.use_rslora + ":dora" * self.use_dora

    def endings(self, presets: Presets) -> tuple[str, ...]:
        """Return the endings of the names of the target layers; UserError for a preset that is not among the backbone's."""
        if not isinstance(self.targets, str):
            return tuple(self.targets)
        if self.targets not in presets:
            known = ", ".join(presets) or "none"
            raise UserError(
                f"lora.ROLE.targets={self.targets} is no preset of the backbone; it has: {known}. Use one of these or a list of "
                "endings of layer names"
            )
        return presets[self.targets]


class LoRAPlan:
    """The adapters of the trained networks by role, for example `LoRAPlan(student=Adapter(...))`.

    All weights of a role without an adapter are trained. Adapters of roles that the objective does not train are not used.
    Raises UserError for a value that is neither an `Adapter` nor None.
    """

    def __init__(self, **adapters: Adapter | None) -> None:
        wrong = [role for role, adapter in adapters.items() if not isinstance(adapter, Adapter | None)]
        if wrong:
            raise UserError(f"lora.{wrong[0]} must be an adapter (see conf/lora/adapter) or null")
        first = sorted(adapters, key=lambda role: (role != "student", role))
        self._adapters = {role: adapter for role in first if (adapter := adapters[role]) is not None}

    def of(self, role: str) -> Adapter | None:
        """Return the adapter of a role, or None if all its weights are trained; "student_ema" has the settings of "student"."""
        return self._adapters.get("student" if role == "student_ema" else role)

    def among(self, roles: Iterable[str]) -> dict[str, Adapter]:
        """Return the adapters of the given roles; roles without an adapter are left out."""
        return {role: adapter for role in roles if (adapter := self.of(role)) is not None}

    def unused(self, roles: Iterable[str]) -> list[str]:
        """Return the roles that have an adapter but are not among `roles`."""
        return [role for role in self._adapters if role not in set(roles)]

    def tag(self, roles: Iterable[str]) -> str:
        """Return a text of all settings of the adapters of the trained `roles`, or "" if they have none.

        It is a part of the fingerprint by which a checkpoint with other adapters is refused.
        """
        used = set(roles)
        parts = [f"{role}={adapter.tag}" for role, adapter in self._adapters.items() if role in used]
        return f"+lora({', '.join(parts)})" if parts else ""

    def check(self, presets: Presets) -> None:
        """Raise UserError if an adapter's `targets` is a name that is not among the backbone's presets."""
        for adapter in self._adapters.values():
            adapter.endings(presets)
