"""The interface of an objective: which networks it trains, on what, in which order, and with which losses.

`CDMObjective` is an example. Networks, optimizers, checkpoints, LoRA, sharding and the planner use only this interface, so
a new objective is one class in one file, in this folder or in your own package (docs/new-objective.md).
Shapes: B samples of shape * = (C, H, W).
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
    """A loss, its weighted terms by name, and further logged figures by name; all tensors are 0-d."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VelocityFields:
    """The networks as velocity fields for one batch; all except `teacher_uncond` are conditioned on the batch's text.

    `fields[NAME]` is the field of a trained role that starts from the pretrained weights, or of "student_ema", the student's
    EMA, if the run has one. `heads` holds the networks that the objective builds itself, as plain modules.
    """

    student: VelocityField
    teacher: VelocityField
    teacher_uncond: VelocityField
    by_role: Mapping[str, VelocityField] = field(default_factory=dict)
    heads: Mapping[str, nn.Module] = field(default_factory=dict)

    def __getitem__(self, role: str) -> VelocityField:
        """Return the field of "student", "student_ema" or a role that starts from the pretrained weights.

        Raises KeyError for any other name, including a head's, and UserError for "student_ema" if the run has no EMA.
        """
        if role == "student_ema" and role not in self.by_role:
            raise UserError("the objective needs the EMA of the student, but ema.decay is null; set ema=default")
        return self.student if role == "student" else self.by_role[role]


@dataclass(frozen=True)
class Sample:
    """Everything that a loss may use: B prompts of one iteration that are computed at once.

    `shift` is the model family's shift for single sigmas, `shift_steps` is its shift for whole rollouts
    (`Backbone.shift_steps`), and `latent_shape` is (C, H, W). All three are for the image size of this iteration.
    `iteration` counts from 0.
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
        """B."""
        return len(self.prompts)

    def again(self, repeat: int) -> Self:
        """Return the same sample with other random draws, for a repeated update; `repeat` is 0 for the first time."""
        return replace(self, rng=self.rng.again(repeat))


@dataclass(frozen=True, kw_only=True)
class RolledOutSample(Sample):
    """A sample with the student's state at the anchor, for objectives that use rollouts.

    `point` is a `FullTrajectoryPoint` if rollouts are simulated to their end. `steps` is K, the number of steps of the
    rollout, which is the same for all samples.
    """

    point: TrajectoryPoint
    steps: int = 1


@dataclass(frozen=True)
class Role:
    """A network that is trained in addition to the student.

    By default it starts from the pretrained weights and may be a LoRA. With `build`, the function `build(D)` makes the
    network instead: a head on hidden states of width D (`VelocityField.with_features`). Its random initialization is seeded
    by the run's seed and the role's name. Parameters that `build` freezes stay frozen.

    `inputs` are additional inputs by name, besides x, sigma and text, for pretrained roles only. Each is a function of a
    width D that makes a module from values (B,) to (B, D). The module's output is added to the network's time embedding, and
    `fields[role].given(NAME=values)` passes the values. If the last layer of the module is zero, the network starts equal to
    the pretrained one. The modules are trained with the network, even if the network itself is a LoRA. Their random
    initialization is seeded by the run's seed, the role and the input.
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
    """The average target <- (1 - weight) target + weight source, for all parameters of the network of the role `source`.

    The target is the network that has just been updated. `option` is the objective's option that sets the weight; error
    messages name it.
    """

    source: str
    weight: float
    option: str


@dataclass(frozen=True)
class Update:
    """An optimizer step of `role`, which is made `repeat` times with fresh random draws; a `merge` follows each step.

    `losses(sample)` yields parts of the loss one by one; the loss is their sum. The backward pass of each part runs before
    the next part is computed, so that only one graph is in memory at a time. Gradients of other roles are dropped.
    """

    role: str
    losses: Callable[[Any], Iterable[TermLosses]]  # of a `RolledOutSample`, or of a `Sample` without rollouts
    repeat: int = 1
    merge: Merge | None = None


class Objective(ABC):
    """The base class of objectives: which networks are trained in addition to the student, on what, and in which order.

    The defaults are those of a method that trains the student only and has no state.
    """

    @property
    def roles(self) -> tuple[Role, ...]:
        """The trained networks other than the student."""
        return ()

    @property
    def rollout(self) -> RolloutKind:
        """How the student is rolled out before the updates of an iteration.

        "to_anchor" stops each sample at its anchor, the randomly chosen step of its path that losses use. "full" simulates
        the path to its end, for losses that use what comes after the anchor. "none" makes no rollout; losses then get a
        plain `Sample`.
        """
        return "to_anchor"

    @property
    def needs_latents(self) -> bool:
        """Whether samples must have the latents of real images; if so, the training data must have images."""
        return False

    @property
    def student_period(self) -> int | None:
        """The number of iterations per student update: the student is updated only in the last iteration of each period.

        None means that the iterations that update the student are not known in advance. While the student does not change,
        the rollouts of several iterations can be computed as one batch.
        """
        return None

    @abstractmethod
    def updates(self, iteration: int) -> Sequence[Update]:
        """Return the updates of an iteration (counted from 0) in their order, at least one; the last one ends the iteration.

        The call must not change the objective. The result may depend on the objective's state, which must then be the same
        in all processes.
        """

    def typical_cycle(self) -> Sequence[Sequence[Update]]:
        """Return the updates of each iteration of one representative cycle, from which the planner computes the cost of a run.

        By default this is one `student_period` late in the run. Override it if the updates depend on a measured state.
        """
        period = self.student_period or 1
        late = period * 1_000_000  # weights that ramp up have reached their final values
        return [self.updates(late + turn) for turn in range(period)]

    def observe(self, role: str, figures: Mapping[str, Tensor], made: bool) -> None:
        """React to an update of `role`; called after each repetition of the update.

        `figures` are 0-d tensors: "loss", the terms and logs of the losses, and "grad_norm". `made` is False if the step was
        skipped because its loss or gradient was not finite. The figures are means over all processes, so that a state that
        depends on them is the same in every process. Reading a figure's value makes the host wait for the device.
        If this method is not overridden, no communication is needed for the means.
        """
        return

    @property
    def observes(self) -> bool:
        """Whether `observe` has been overridden."""
        return type(self).observe is not Objective.observe

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` of this class returned; not called for a checkpoint that has no such state."""
        return
