"""Which of the trained networks are LoRAs, and of what size: plain data, checked before anything is loaded."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cdm_lightning.errors import UserError

Presets = Mapping[str, tuple[str, ...]]  # a backbone's `lora_targets`


@dataclass(frozen=True)
class Adapter:
    """A LoRA: each target layer's weight W becomes W + scale B A with A (rank, in) and B (out, rank).

    `targets` is the name of a preset of the backbone (such as "attention") or a list of ends of layer names (such as
    ["to_q", "ff.net.2"]). The scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv:2312.03732);
    `use_dora` trains the magnitudes of the rows apart from their directions (arXiv:2402.09353). UserError for an
    argument out of its range.
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
            raise UserError("lora: targets is empty; name a preset of the backbone or list ends of layer names")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def tag(self) -> str:
        """All of it in one short text."""
        targets = self.targets if isinstance(self.targets, str) else "/".join(self.targets)
        return f"{self.rank}:{self.alpha:g}:{targets}" + ":rslora" * self.use_rslora + ":dora" * self.use_dora

    def endings(self, presets: Presets) -> tuple[str, ...]:
        """The ends of the names of its layers; UserError for a preset that the backbone has not."""
        if not isinstance(self.targets, str):
            return tuple(self.targets)
        if self.targets not in presets:
            known = ", ".join(presets) or "none"
            raise UserError(f"lora: the backbone has no preset targets={self.targets} (it has: {known}); list layers")
        return presets[self.targets]


class LoRAPlan:
    """The adapters of trained networks by role, as `LoRAPlan(student=Adapter(...))`; a role without one is trained whole.

    Adapters of roles that the objective does not train are not used. Raises UserError for a value that is no adapter.
    """

    def __init__(self, **adapters: Adapter | None) -> None:
        wrong = [role for role, adapter in adapters.items() if not isinstance(adapter, Adapter | None)]
        if wrong:
            raise UserError(f"lora.{wrong[0]} must be an adapter (see conf/lora/adapter) or null")
        first = sorted(adapters, key=lambda role: (role != "student", role))
        self._adapters = {role: adapter for role in first if (adapter := adapters[role]) is not None}

    def of(self, role: str) -> Adapter | None:
        """The adapter of a role; None: all weights of its network are trained. The student's average is its twin."""
        return self._adapters.get("student" if role == "student_ema" else role)

    def among(self, roles: Iterable[str]) -> dict[str, Adapter]:
        """The adapters of those of the roles that have one."""
        return {role: adapter for role in roles if (adapter := self.of(role)) is not None}

    def unused(self, roles: Iterable[str]) -> list[str]:
        """The roles that have an adapter and are none of `roles`."""
        return [role for role in self._adapters if role not in set(roles)]

    def tag(self, roles: Iterable[str]) -> str:
        """Added to a backbone's fingerprint: checkpoints of other adapters of the trained `roles` do not fit; "" without any."""
        used = set(roles)
        parts = [f"{role}={adapter.tag}" for role, adapter in self._adapters.items() if role in used]
        return f"+lora({', '.join(parts)})" if parts else ""

    def check(self, presets: Presets) -> None:
        """UserError for targets that are no preset of the backbone."""
        for adapter in self._adapters.values():
            adapter.endings(presets)
