"""The interface of an objective: which networks it trains, on what, in which order, and with which losses.

`CDMObjective` is an example. Networks, optimizers, checkpoints, LoRA, sharding and the planner use only this interface, so
a new objective is one class in one file, in this folder or in your own package (docs/new-objective.md). A *role* is a
network's part in training, and its name: "student", "student_ema", "teacher", or a role that the objective adds, such as CDM's
"fake_score". Shapes: B samples of shape * = (C, H, W).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from torch import Tensor, nn

from cdm_lightning.core.flow import VelocityField
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.core.schedules import Shift
from cdm_lightning.errors import UserError

RolloutKind = Literal["to_anchor", "full", "none"]


@dataclass(frozen=True)
class TermLosses:
    """A loss and what is logged about it; all tensors are 0-d.

    `total` is the loss that is differentiated, `terms` are its weighted terms by name, `logs` further figures by name.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VelocityFields:
    """The networks as velocity fields for one batch; all except `teacher_uncond` are conditioned on the batch's text.

    `fields[ROLE]` is the field of "student", of "student_ema" (the EMA of the student, if the run has one), or of a role of the
    objective that starts from the pretrained weights. `heads` holds the networks that the objective builds itself
    (`Role.build`), as plain modules by role.
    """

    student: VelocityField
    teacher: VelocityField
    teacher_uncond: VelocityField
    by_role: Mapping[str, VelocityField] = field(default_factory=dict)
    heads: Mapping[str, nn.Module] = field(default_factory=dict)

    def __getitem__(self, role: str) -> VelocityField:
        """Return the field of "student", "student_ema" or a role that starts from the pretrained weights.

        Raises KeyError for any other name, including that of a head, and UserError for "student_ema" if the run has no EMA.
        """
        if role == "student_ema" and role not in self.by_role:
            raise UserError("the objective needs the EMA of the student, but ema.decay is null; set ema=default")
        return self.student if role == "student" else self.by_role[role]


@dataclass(frozen=True)
class Sample:
    """The input of a loss: B prompts of one iteration that are computed at once, with everything that the loss may use.

    `fields` are the networks with the text of these prompts, `rng` gives their random numbers. `shift` is the model family's
    shift for single sigmas, `shift_steps` that for all sigmas of a rollout (`Backbone.shift_steps`), and `latent_shape` is
    (C, H, W); all three are for the image size of this iteration. `iteration` counts from 0.
    """

    prompts: Sequence[str]
    fields: VelocityFields  # the networks with the prompts' conditioning
    rng: StepRandom
    shift: Shift
    shift_steps: Shift
    latent_shape: tuple[int, int, int]
    iteration: int
    latents: Tensor | None = None  # (B, *), clean latents of the prompts' real images; only where `needs_latents`

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.prompts)

    def again(self, repeat: int) -> Self:
        """Return the same sample with other random draws, for repetition number `repeat` of an update; 0 is the first."""
        return replace(self, rng=self.rng.again(repeat))


@dataclass(frozen=True, kw_only=True)
class RolledOutSample(Sample):
    """A sample with one state of the student's rollout (its own path from noise), for objectives that use rollouts.

    `point` is the state at the anchor, a step of the path that is drawn for each sample; it is a `FullTrajectoryPoint` if
    rollouts are simulated to their end. `steps` is K, the number of steps of the rollout, the same for all samples.
    """

    point: TrajectoryPoint
    steps: int = 1


@dataclass(frozen=True)
class Role:
    """A network that is trained in addition to the student, such as CDM's fake score.

    By default it starts from the pretrained weights and may be a LoRA. With `build`, the function `build(D)` makes the
    network instead: a head on hidden states of width D (`VelocityField.with_features`). Parameters that `build` freezes stay
    frozen.

    `inputs` gives a network that starts from the pretrained weights additional inputs, by name, besides x, sigma and text.
    Each is a function that takes the width D of the network's time embedding and makes a module from values (B,) to (B, D),
    whose output is added to that embedding. A loss passes the values by `fields[role].given(NAME=values)`. If the last layer
    of the module is zero, the network starts equal to the pretrained one. The module is trained even if the network itself is
    a LoRA. The random initialization of heads and inputs depends on the run's seed and on their names only.

    Raises ValueError for a name that is no identifier or is taken, and for `build` together with `inputs`.
    """

    name: str
    build: Callable[[int], nn.Module] | None = None
    inputs: Mapping[str, Callable[[int], nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in ("student", "student_ema", "teacher") or not self.name.isidentifier():
            raise ValueError(
                f"a role needs a name of its own: a Python identifier other than student, student_ema and teacher, got {self.name!r}"
            )
        if self.build is not None and self.inputs:
            raise ValueError(
                f"role {self.name}: inputs can be added to a pretrained network only; remove either build or inputs"
            )


@dataclass(frozen=True)
class Merge:
    """An averaging of two networks after an optimizer step: target <- (1 - weight) target + weight source, by parameter.

    The target is the network that has just been updated, and `source` is the role of the other. CDM averages a little of the
    student into the fake score. `option` is the name of the objective's option that sets the weight, for error messages.
    """

    source: str
    weight: float
    option: str


@dataclass(frozen=True)
class Update:
    """An optimizer step of `role` that is made `repeat` times, with fresh random draws; each time the `merge`, if any, follows.

    `losses(sample)` yields the parts of the loss one by one; the loss is their sum. The backward pass of each part runs before
    the next part is computed, so that only one graph is in memory at a time. Gradients of other roles' parameters are dropped.
    """

    role: str
    losses: Callable[[Any], Iterable[TermLosses]]  # of a `RolledOutSample`, or of a `Sample` without rollouts
    repeat: int = 1
    merge: Merge | None = None


class Objective(ABC):
    """The base class of objectives: which networks are trained in addition to the student, on what, and in which order.

    Only `updates` must be written. The defaults are those of a method that trains the student only and has no state.
    """

    @property
    def roles(self) -> tuple[Role, ...]:
        """The networks that are trained in addition to the student."""
        return ()

    @property
    def rollout(self) -> RolloutKind:
        """How far the student is rolled out (follows its own path from noise) before the updates of an iteration.

        "to_anchor" stops each sample at its anchor, the randomly drawn step of its path that losses use. "full" simulates
        the path to its end, for losses that use what comes after the anchor. "none" makes no rollout; losses then get a
        plain `Sample`.
        """
        return "to_anchor"

    @property
    def needs_latents(self) -> bool:
        """Whether samples must have `latents` of real images; if so, the training data must have images."""
        return False

    @property
    def student_period(self) -> int | None:
        """The number of iterations from one student update to the next: only the last of each period updates the student.

        Within a period the student does not change, so the rollouts of several iterations can be computed as one batch. None
        means that the iterations that update the student are not known in advance.
        """
        return None

    @abstractmethod
    def updates(self, iteration: int) -> Sequence[Update]:
        """Return the updates of an iteration (counted from 0) in their order; there must be at least one.

        The call must not change the objective. The result may depend on the objective's state, which must then be the same
        in all processes.
        """

    def typical_cycle(self) -> Sequence[Sequence[Update]]:
        """Return the updates of each iteration of a typical stretch of training, from which `cdm_lightning.plan` computes costs.

        By default these are the iterations of one `student_period` late in a run (one iteration if it is None). Override this
        if `updates` depends on a measured state.
        """
        period = self.student_period or 1
        late = period * 1_000_000  # weights that ramp up have reached their final values
        return [self.updates(late + turn) for turn in range(period)]

    def observe(self, role: str, figures: Mapping[str, Tensor], made: bool) -> None:
        """React to an optimizer step of `role`, for example to change a state on which `updates` depends.

        `figures` are 0-d tensors by name: "loss", the terms and logs of the losses, and "grad_norm". `made` is False if the
        step was skipped because its loss or gradient was not finite. The figures are means over all processes, so that a state
        that depends on them is the same in every process. Reading a figure's value makes the host wait for the device. If this
        method is not overridden, processes do not communicate for the means.
        """
        return

    @property
    def observes(self) -> bool:
        """Whether a subclass has overridden `observe`."""
        return type(self).observe is not Objective.observe

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps: plain values and tensors; by default none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; not called if the checkpoint holds no state of this class."""
        return
