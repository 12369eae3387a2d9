"""The models of an evaluation, and the combinations of steps, guidance scales and shifts at which they are measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Protocol

import torch

from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.given_images import GivenImages
from cdm_lightning.evaluation.measuring import Maker
from cdm_lightning.evaluation.samplers import SamplerSpec
from cdm_lightning.metrics.suite import MetricSuite


class Opened(Protocol):
    """A model whose weights are not in memory yet, such as `run.models.OpenedModel`."""

    @property
    def steps(self) -> int | None:
        """The number of steps that the model is made for, or None for images that are there already."""
        ...

    @property
    def shares_noise(self) -> bool:
        """Whether the images start from `core.rng.evaluation_noise`, as those of the known model families."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the figures must know, such as that the noise is not that of the other models."""
        ...

    def check(self, samplers: Sequence[SamplerSpec], prompts: Sequence[str], metrics: MetricSuite) -> None:
        """Raise `UserError` if the model cannot make images of `prompts` by `samplers`, or not those `metrics` need."""
        ...

    def sizes(self, samplers: Sequence[SamplerSpec]) -> Sequence[tuple[int, int]]:
        """Return the sizes (height, width) in pixels of the images, as far as they are known. Call `check` first."""
        ...

    def digest(self) -> str:
        """Return a hash of the weights, or of the images."""
        ...

    def maker(self, device: torch.device, dtype: torch.dtype, batch_size: int) -> Maker:
        """Load the weights onto `device` in `dtype`, and return an object that makes images."""
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
        found = self.name or Path(self.model).name or Path(self.model).resolve().name
        return "".join(letter if letter.isprintable() else "?" for letter in found)  # a path may have any characters

    @property
    def samplers(self) -> list[SamplerSpec]:
        """The combinations, each with a name such as "teacher 4 steps, guidance 1.5, shift 3"."""
        if self.opened.steps is None:
            return [GivenImages(self.title)]
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
