"""The models of an evaluation, and the combinations of steps, guidance scales and shifts at which they are measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Protocol

from torch import nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import SamplerSpec


class Opened(Protocol):
    """A model whose weights are not in memory yet, such as `run.models.OpenedModel`."""

    @property
    def backbone(self) -> Backbone:
        """The model family's adapter."""
        ...

    @property
    def steps(self) -> int:
        """The number of steps that the model is made for."""
        ...

    @property
    def build_network(self) -> Callable[[], nn.Module]:
        """The function that returns the network with its weights."""
        ...

    def digest(self) -> str:
        """Return a hash of the weights."""
        ...


@dataclass(frozen=True)
class ModelGrid:
    """A model and the combinations of steps, guidance scales and shifts at which it is measured.

    - `model`: the path or hub id that the user gave.
    - `open_model`: a function that opens the model. It is called again for the measurement, so that the parts that the
      measurement loads are freed afterwards.
    - `name`: the model's name in the results. With "" this is the last part of `model`.
    - `steps`: numbers of steps. With () this is the number that the model is made for.
    - `guidance`: guidance scales. A scale of 1 means no guidance.
    - `shift`: factors of the timestep shift. None means the model family's own shift.
    """

    model: str
    open_model: Callable[[], Opened]
    name: str = ""
    steps: tuple[int, ...] = ()
    guidance: tuple[float, ...] = (1.0,)
    shift: tuple[float | None, ...] = (None,)

    @cached_property
    def opened(self) -> Opened:
        """The opened model, for checks. Its parts are not loaded."""
        return self.open_model()

    @property
    def title(self) -> str:
        """The model's name in the results."""
        return self.name or Path(self.model).name or Path(self.model).resolve().name

    @property
    def samplers(self) -> list[SamplerSpec]:
        """The combinations, each with a name such as "teacher 4 steps, guidance 1.5, shift 3"."""
        made = []
        for nfe, guidance, shift in product(self.steps or (self.opened.steps,), self.guidance, self.shift):
            name = f"{self.title} {nfe} {'step' if nfe == 1 else 'steps'}"
            name += "" if guidance == 1 else f", guidance {guidance:g}"
            name += "" if shift is None else f", shift {shift:g}"
            made.append(SamplerSpec(name, "student", nfe, guidance, shift=shift))
        return made


def require_distinct(models: Sequence[ModelGrid]) -> None:
    """Raise `UserError` if two models have the same name, or if a combination of one model is given twice."""
    titles = [model.title for model in models]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"two models have the name {title!r}; give one of them another name with name=NAME")
    for model in models:
        names = [spec.name for spec in model.samplers]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"--model {model.model} has {name!r} twice; give each of its steps, guidance and shift once"
                )
