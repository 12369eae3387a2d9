"""Settings that say which trained networks are LoRAs, and with which rank, scale and layers.

They are checked before any weights are loaded. A role is the name of a network in training, such as "student" or
"fake_score".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import LayerEnding, NotEmpty, Positive, Width

Presets = Mapping[str, tuple[str, ...]]  # as in `Backbone.lora_targets`: preset -> endings of names of linear layers


@dataclass(frozen=True)
class Adapter:
    """The settings of a LoRA: each target weight W becomes W + scale B A, with A (rank, in) and B (out, rank).

    `targets` chooses the linear layers: a preset of `Backbone.lora_targets`, such as "attention", or a list of endings of layer
    names, such as ["to_q", "ff.net.2"]. The scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv:2312.03732).
    `use_dora` trains lengths and directions of the rows of W separately (arXiv:2402.09353). Raises UserError for a rank below 1,
    for an alpha of 0 or below, and for empty `targets`.
    """

    rank: Width = 64
    alpha: Positive = 128.0
    targets: LayerEnding | Annotated[Sequence[LayerEnding], NotEmpty] = "attention_feed_forward"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(
                f"lora.ROLE.{f'rank={self.rank} must be at least 1' if self.rank < 1 else f'alpha={self.alpha:g} must be above 0'}"
                " (ROLE is a trained network such as student)"
            )
        if not self.targets:
            raise UserError(
                "lora.ROLE.targets is empty (ROLE is a trained network such as student); give a preset such as "
                "attention, or endings of layer names such as [to_q,to_k]"
            )
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(map(str, self.targets)))  # a number is a name too

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def tag(self) -> str:
        """All settings as one text, such as "64:128:attention". A run refuses checkpoints with another tag."""
        targets = self.targets if isinstance(self.targets, str) else "/".join(self.targets)
        return f"{self.rank}:{self.alpha:g}:{targets}" + ":rslora" * self.use_rslora + ":dora" * self.use_dora

    def endings(self, presets: Presets) -> tuple[str, ...]:
        """Return the endings of the target layers' names: those of the preset `targets`, or the list `targets` itself.

        Raises UserError if `targets` is a name that `presets` does not have.
        """
        if not isinstance(self.targets, str):
            return tuple(self.targets)
        if self.targets not in presets:
            known = f"{', '.join(presets)}, or " if presets else ""
            raise UserError(
                f"lora.ROLE.targets={self.targets} is no preset of this backbone (ROLE is a trained network such as "
                f"student); use {known}a list of endings of layer names such as [to_q,to_k]"
            )
        return presets[self.targets]


class LoRAPlan:
    """The trained networks that are LoRAs, with an `Adapter` for each, for example `LoRAPlan(student=Adapter(...))`.

    If a network has no entry, or its entry is None, all its weights are trained. Entries for networks that the
    objective does not train have no effect. Raises UserError if a value is neither an `Adapter` nor None.
    """

    def __init__(self, **adapters: Adapter | None) -> None:
        wrong = [role for role, adapter in adapters.items() if not isinstance(adapter, Adapter | None)]
        if wrong:
            raise UserError(
                f"lora.{wrong[0]} must be null, or have the options of a LoRA as in conf/lora/adapter/default.yaml"
            )
        first = sorted(adapters, key=lambda role: (role != "student", role))
        self._adapters = {role: adapter for role in first if (adapter := adapters[role]) is not None}

    def of(self, role: str) -> Adapter | None:
        """Return the adapter of a role, or None if all its weights are trained. "student_ema" has the adapter of "student"."""
        return self._adapters.get("student" if role == "student_ema" else role)

    def among(self, roles: Iterable[str]) -> dict[str, Adapter]:
        """Return a dict {role: adapter} for those of the given roles that have an adapter."""
        return {role: adapter for role in roles if (adapter := self.of(role)) is not None}

    def unused(self, roles: Iterable[str]) -> list[str]:
        """Return the roles that have an adapter here but are not among `roles`, so that the run can warn about them."""
        return [role for role in self._adapters if role not in set(roles)]

    def tag(self, roles: Iterable[str]) -> str:
        """Return the adapter settings of the trained `roles` as one text, or "" if they have no adapter.

        The text is part of the fingerprint that identifies a checkpoint's networks. A run with other adapters refuses the
        checkpoint.
        """
        used = set(roles)
        parts = [f"{role}={adapter.tag}" for role, adapter in self._adapters.items() if role in used]
        return f"+lora({', '.join(parts)})" if parts else ""

    def check(self, presets: Presets) -> None:
        """Raise UserError if an adapter's `targets` is a name that `presets` (`Backbone.lora_targets`) does not have."""
        for adapter in self._adapters.values():
            adapter.endings(presets)
