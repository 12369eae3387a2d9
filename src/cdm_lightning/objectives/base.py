"""What an objective has to say: whom it trains, on what, in which order, and by which losses.

`CDMObjective` is one. Networks, optimizers, checkpoints, LoRA, sharding and the planner follow what is said here, so a new
objective is one class in one file, in this folder or in a package of your own (docs/new-objective.md).
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

RolloutKind = Literal["to_anchor", "full", "none"]


@dataclass(frozen=True)
class TermLosses:
    """A loss, its weighted terms and detached health figures by name: all 0-d."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VelocityFields:
    """The networks of one batch as velocity fields; all but `teacher_uncond` see the batch's text.

    `fields[NAME]` is the field of a trained role that starts from the pretrained weights, or of "student_ema", the student's
    average (without the callback `StudentEMA` that stays as the student started). `heads` are the networks of roles that
    the objective builds itself, as they are.
    """

    student: VelocityField
    teacher: VelocityField
    teacher_uncond: VelocityField
    by_role: Mapping[str, VelocityField] = field(default_factory=dict)
    heads: Mapping[str, nn.Module] = field(default_factory=dict)

    def __getitem__(self, role: str) -> VelocityField:
        """The field of "student", "student_ema" or a pretrained role; KeyError for any other name, heads among them."""
        return self.student if role == "student" else self.by_role[role]


@dataclass(frozen=True)
class Sample:
    """All that a loss may look at: B prompts of one iteration, computed at once.

    `shift` is the model family's shift of single sigmas, `shift_steps` that of whole rollouts (`Backbone.shift_steps`), and
    `latent_shape` (C, H, W), all at the image size of this iteration (which counts from 0).
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
        """The same with other random draws, for a repeated update; 0 is the first time."""
        return replace(self, rng=self.rng.again(repeat))


@dataclass(frozen=True, kw_only=True)
class RolledOutSample(Sample):
    """A sample of an objective with rollouts: with the student's state at the anchor.

    `point` is a `FullTrajectoryPoint` where rollouts are simulated to their end.
    """

    point: TrajectoryPoint


@dataclass(frozen=True)
class Role:
    """A network that is trained beside the student.

    It starts from the pretrained weights and may be a LoRA; or `build(D)` makes it, a head on hidden states of width D
    (`VelocityField.with_features`). Its random start is seeded by the run's seed and its name; what it freezes stays frozen.

    `inputs` are inputs of its own beside x, sigma and text, by name. Each is a function of a width D that makes a module from
    values (B,) to (B, D), whose output is added to the network's time embedding; `fields[role].given(NAME=values)` passes the
    values. With zeros in its last layer the network starts as the pretrained one. Such modules are trained with the network,
    also beside a LoRA; their random starts are seeded by the run's seed, the role and the input. Pretrained roles only.
    """

    name: str
    build: Callable[[int], nn.Module] | None = None
    inputs: Mapping[str, Callable[[int], nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in ("student", "student_ema", "teacher") or not self.name.isidentifier():
            raise ValueError(f"a role needs a name of its own that is a Python identifier, got {self.name!r}")
        if self.build is not None and self.inputs:
            raise ValueError(
                f"role {self.name}: inputs are added to the pretrained network, and this one is built anew"
            )


@dataclass(frozen=True)
class Merge:
    """target <- (1 - weight) target + weight `source`, for all parameters that the source has.

    `option` is the objective's option that sets the weight, for messages.
    """

    source: str
    weight: float
    option: str


@dataclass(frozen=True)
class Update:
    """An optimizer step of `role`, made `repeat` times with fresh draws, each followed by the `merge` of its weights.

    `losses(sample)` yields the parts of the loss one by one, which are added up: the backward pass of one runs before the next is
    computed, so that one graph is in memory at a time. Gradients that reach other roles are dropped.
    """

    role: str
    losses: Callable[[Any], Iterable[TermLosses]]  # of a `Sample`, or of the `RolledOutSample` that the rollout makes
    repeat: int = 1
    merge: Merge | None = None


class Objective(ABC):
    """Which networks are trained beside the student, on what, and in which order.

    The defaults are those of a method without further networks and without a state of its own.
    """

    @property
    def roles(self) -> tuple[Role, ...]:
        """The networks beside student and teacher."""
        return ()

    @property
    def rollout(self) -> RolloutKind:
        """How the student is rolled out before the updates of an iteration.

        "to_anchor" stops each sample at its anchor, a randomly chosen step of its path that losses look at; "full" simulates to
        the end, for losses that use what comes after the anchor; "none" makes no rollout (then losses get a plain `Sample`).
        """
        return "to_anchor"

    @property
    def needs_latents(self) -> bool:
        """Whether samples must hold latents of real images: then the training data must have images."""
        return False

    @property
    def student_period(self) -> int | None:
        """The student is updated in the last of every so many iterations and in no other; None if not known in advance.

        While the student stays the same, the rollouts of several iterations can be computed as one batch.
        """
        return None

    @abstractmethod
    def updates(self, iteration: int) -> Sequence[Update]:
        """The updates of an iteration (counted from 0) in their order, at least one; the last one ends the iteration.

        Asking must change nothing. May depend on the objective's state, which must then be the same in all processes.
        """

    def typical_cycle(self) -> Sequence[Sequence[Update]]:
        """The updates of one representative cycle of iterations, late in a run: the planner multiplies its cost.

        By default those of one `student_period` late in the run; override it where updates follow a measured state.
        """
        period = self.student_period or 1
        late = period * 1_000_000  # weights that ramp up have arrived
        return [self.updates(late + turn) for turn in range(period)]

    def observe(self, role: str, figures: Mapping[str, Tensor], made: bool) -> None:
        """Take note of an update of `role`: its figures ("loss", terms and logs of its losses, "grad_norm"), each 0-d.

        `made` is False for a step that was left out because its loss or gradient was not finite. Called once for each
        repetition. The figures are means over all processes, so that a state that follows them is the same everywhere. The
        host has not waited for them: reading a number does. Objectives that do not override it cost no communication.
        """
        return

    @property
    def observes(self) -> bool:
        """Whether `observe` has been overridden."""
        return type(self).observe is not Objective.observe

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` of this class returned; not called for a checkpoint that has no such state."""
        return
