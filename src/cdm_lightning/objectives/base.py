"""The interface of a training objective: which networks it trains, in which order, and with which losses.

`CDMObjective` is an example. The rest of the package (networks, optimizers, checkpoints, LoRA, sharding, cost planning)
uses only this interface. A new objective is therefore one class in one file (see docs/new-objective.md). A *role* is
the name of a network: "student", "student_ema", "teacher", or a name that the objective adds, such as CDM's
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
    """A loss and the figures that are logged with it; all tensors are 0-d.

    `total` is the loss, from which gradients are computed. `terms` holds the weighted terms of the loss by name, and
    `logs` holds further figures by name.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: "TermLosses") -> "TermLosses":
        """Return the sum of two losses that share a graph, with the figures of both."""
        return TermLosses(self.total + other.total, self.terms | other.terms, self.logs | other.logs)


@dataclass(frozen=True)
class VelocityFields:
    """The networks of a run as velocity fields v(x, sigma), conditioned on the text of one batch of prompts.

    `teacher_uncond` is the teacher conditioned on the empty prompt. `by_role` holds the fields of further networks,
    such as "student_ema" and "fake_score". For a VelocityFields object `fields`, `fields[ROLE]` is the field of
    "student" or of a role in `by_role`, but not of the teacher. `heads` holds the networks that the objective builds
    itself (see `Role.build`); they are plain modules and not fields.
    """

    student: VelocityField
    teacher: VelocityField
    teacher_uncond: VelocityField
    by_role: Mapping[str, VelocityField] = field(default_factory=dict)
    heads: Mapping[str, nn.Module] = field(default_factory=dict)

    def __getitem__(self, role: str) -> VelocityField:
        """Return the velocity field of a role: "student", "student_ema", or another key of `by_role`.

        Raises UserError for "student_ema" if the run has no EMA. Raises KeyError for other names, also for those in `heads`.
        """
        if role == "student_ema" and role not in self.by_role:
            raise UserError("ema.decay is null, but the objective needs the EMA of the student; set ema=default")
        return self.student if role == "student" else self.by_role[role]


def _no_images(latents: Tensor) -> Tensor:
    raise UserError(
        "the reward needs images, but this Sample has no image codec; pass Sample(decode=...), or set "
        "objective.reward=null"
    )


@dataclass(frozen=True)
class Sample:
    """The input of a loss: B prompts of one iteration, with the networks and the random numbers for them.

    `fields` are the networks, conditioned on the text of `prompts`, and `rng` draws the random numbers. `shift` and
    `shift_steps` apply the model family's timestep shift: `shift` applies it to each sigma alone, and `shift_steps` to
    all sigmas of a rollout together (see `Backbone.shift_steps`). `latent_shape` is (C, H, W). The two shifts and
    `latent_shape` are those for the image size of this iteration. `iteration` counts from 0. `latents` are the clean
    latents (B, C, H, W) of real images, or None if the objective uses none. `decode` turns clean latents (B, C, H, W)
    into images (B, 3, H, W) in [0, 1]; gradients flow through it.
    """

    prompts: Sequence[str]
    fields: VelocityFields
    rng: StepRandom
    shift: Shift
    shift_steps: Shift
    latent_shape: tuple[int, int, int]
    iteration: int
    latents: Tensor | None = None  # given if `Objective.needs_latents`
    decode: Callable[[Tensor], Tensor] = _no_images

    def __len__(self) -> int:
        """Return B, the number of prompts."""
        return len(self.prompts)

    def again(self, repeat: int) -> Self:
        """Return this sample with the random numbers of one optimizer step of an update.

        An update makes `Update.repeat` optimizer steps, each with random numbers of its own. `repeat` is the number of
        the step, counted from 0.
        """
        return replace(self, rng=self.rng.again(repeat))


@dataclass(frozen=True, kw_only=True)
class RolledOutSample(Sample):
    """A sample with one state of the student's rollout, which is the student's own path from noise.

    `point` is the state at the *anchor*, the step of the path that is drawn at random for each prompt. It is a
    `FullTrajectoryPoint` if rollouts are simulated to their end. `steps` is the number of steps of the rollout, which
    is the same for all prompts.
    """

    point: TrajectoryPoint
    steps: int = 1


@dataclass(frozen=True)
class Role:
    """A network that is trained in addition to the student, such as CDM's fake score.

    By default the network starts from the pretrained weights and can be trained as a LoRA. If `build` is given, the
    network is a head instead: `build(D)` returns a module that reads another network's hidden states of width D (see
    `VelocityField.with_features`). Parameters that `build` freezes stay frozen.

    `inputs` adds inputs, besides x, sigma and text, to a network that starts from the pretrained weights. It maps the
    name of an added input to a function. This function takes the width D of the network's time embedding and returns a
    module. The module maps the input's values (B,) to vectors (B, D), which are added to the time embedding. A loss
    passes the values by `fields[role].given(NAME=values)`. If the last layer of the module is zero, the network equals
    the pretrained one at the start. The module is trained, even if the rest of the network is a LoRA.

    Heads and the modules of inputs are initialized at random; the draws depend only on the run's seed and the module's
    name. Raises ValueError if `name` is not a Python identifier, if it is student, student_ema or teacher, and if both
    `build` and `inputs` are given.
    """

    name: str
    build: Callable[[int], nn.Module] | None = None
    inputs: Mapping[str, Callable[[int], nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in ("student", "student_ema", "teacher") or not self.name.isidentifier():
            raise ValueError(
                f"Role.name={self.name!r}: choose a Python identifier other than student, student_ema and teacher"
            )
        if self.build is not None and self.inputs:
            raise ValueError(
                f"role {self.name} has both build and inputs, but inputs work for a pretrained network only; remove one of them"
            )


@dataclass(frozen=True)
class Merge:
    """A weighted average that pulls one network towards another after an optimizer step.

    Each parameter of the updated network becomes (1 - `weight`) times itself plus `weight` times the same parameter of the
    network `source`. CDM pulls the fake score a little towards the student. `option` is the objective's option that sets the
    weight; error messages name it.
    """

    source: str
    weight: float
    option: str


@dataclass(frozen=True)
class Update:
    """The update of the network `role`. It makes `repeat` optimizer steps, each with new random numbers.

    `losses(sample)` yields parts of the loss; the loss is their sum. Each part is backpropagated before the next is
    computed, so that memory holds one graph at a time. Gradients that reach other networks are dropped. If `merge` is
    given, it is applied after each step.
    """

    role: str
    losses: Callable[[Any], Iterable[TermLosses]]  # takes a `RolledOutSample`, or a `Sample` if there are no rollouts
    repeat: int = 1
    merge: Merge | None = None


class Objective(ABC):
    """The base class of objectives. A subclass must implement `updates`; everything else has a default.

    The defaults fit a method that trains only the student, on its own rollouts, and keeps no state.
    """

    @property
    def roles(self) -> tuple[Role, ...]:
        """The networks that are trained in addition to the student."""
        return ()

    @property
    def rollout(self) -> RolloutKind:
        """How far the student's rollout goes. The rollout is the student's own path from noise.

        Rollouts are computed before the updates of an iteration. With "to_anchor", a rollout stops at the anchor, the
        step of the path that is drawn at random for each prompt. With "full", it goes on to the clean image, for losses
        that need the rest of the path. With "none", there is no rollout, and the losses get a `Sample` instead of a
        `RolledOutSample`.
        """
        return "to_anchor"

    @property
    def score_role(self) -> str | None:
        """The network that learns the distribution of the student's images and can be compared with the teacher, or None.

        By default it is the fake score, if there is one that gets the same inputs as the teacher. `callbacks.health` uses it.
        """
        return next((role.name for role in self.roles if role.name == "fake_score" and not role.inputs), None)

    @property
    def needs_latents(self) -> bool:
        """Whether the losses use latents of real images. If so, the training data must have images."""
        return False

    @property
    def student_period(self) -> int | None:
        """The number of iterations from one student update to the next, or None if it is not known in advance.

        If it is a number, the student is updated in the last iteration of each period and does not change until then.
        The rollouts of several iterations of a period can therefore be computed as one batch.
        """
        return None

    @abstractmethod
    def updates(self, iteration: int) -> Sequence[Update]:
        """Return the updates of an iteration (counted from 0) in their order; there must be at least one.

        This method must not change the objective. The result may depend on the objective's state if all processes have
        the same state.
        """

    def typical_cycle(self) -> Sequence[Sequence[Update]]:
        """Return the updates of each iteration in a typical stretch of training.

        `cdm_lightning.plan` computes the costs of a run from these updates. By default the stretch has `student_period`
        iterations, or one iteration if the period is None. The stretch lies late in a run, when the weights of loss
        terms that grow during training have reached their final values. Override this method if `updates` depends on
        measured values.
        """
        period = self.student_period or 1
        late = period * 1_000_000  # weights that ramp up have reached their final values
        return [self.updates(late + turn) for turn in range(period)]

    def observe(self, role: str, figures: Mapping[str, Tensor], made: bool) -> None:
        """React to an optimizer step of `role`, for example by changing a state that `updates` depends on.

        `figures` are 0-d tensors by name: "loss", the loss's terms and logs, and "grad_norm". They are means over all processes,
        so every process sees the same values. Reading a value synchronizes with the GPU. `made` is False if the step was skipped
        because a loss or a gradient was not finite. The means are computed only if a subclass overrides this method.
        """
        return

    @property
    def observes(self) -> bool:
        """Whether a subclass has overridden `observe`."""
        return type(self).observe is not Objective.observe

    def state_dict(self) -> dict[str, Any]:
        """Return the objective's state for a checkpoint, as plain values and tensors. By default there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        This method is not called if the checkpoint holds no state of this class.
        """
        return
