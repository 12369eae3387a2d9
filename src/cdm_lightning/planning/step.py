"""Run an iteration on fake tensors, which have shapes but no contents, to record its memory and floating-point operations.

Networks, rollout, losses, backward passes and autocast are those of training. The numbers are therefore measured on the code that
will run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward

from cdm_lightning.backbones.base import repeat_rows
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import FullTrajectoryPoint, Rollout, TrajectoryPoint, join_rollouts
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.base import Sample, TermLosses, Update
from cdm_lightning.planning.live import PROBE, GPUAutocast, LiveBytes, Timeline, storages
from cdm_lightning.training.networks import Networks, bind_networks, trainable
from cdm_lightning.training.rollouts import with_point

LATE = 1_000_000  # cycles of updates; weights that grow during training have then reached their final values


@dataclass(frozen=True)
class Phase:
    """One part of an iteration. `memory` is its memory at each moment, and `flops` its operations for one sample."""

    memory: Timeline = field(default_factory=lambda: Timeline((), (), ()))
    flops: float = 0.0


@dataclass(frozen=True)
class Step:
    """The work and the memory of an average iteration.

    `rollout` is the phase of a single call of the student in the rollout. `updates` maps the role of each trained
    network to the phase of its updates in the iterations of `Objective.typical_cycle`. The operations of such a phase
    are the sum over all updates of the network, divided by the number of iterations. The memory of such a phase is
    recorded over all these updates, one after another.
    """

    rollout: Phase
    updates: dict[str, Phase]


class BlankRandom(StepRandom):
    """Random draws for `batch` samples, with shapes but without contents, for code that never reads the numbers."""

    def __init__(self, batch: int) -> None:
        super().__init__(seed=0, iteration=0, slots=range(batch), device="cpu")

    def again(self, repeat: int) -> "BlankRandom":
        """Return this object. Repeated updates need no other numbers, because no numbers are read."""
        return self

    def uniform(self, purpose: str, n: int | None = None) -> Tensor:
        """Return an uninitialized tensor in place of uniform numbers: (B,), or (B, n) if `n` is given."""
        return torch.empty(len(self) if n is None else (len(self), n))

    def gaussian(self, purpose: str) -> Tensor:
        """Return an uninitialized tensor (B,) in place of one normal number per sample."""
        return torch.empty(len(self))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return an uninitialized tensor (B, *shape) in place of Gaussian noise."""
        return torch.empty(len(self), *shape)

    def index(self, purpose: str, high: int) -> Tensor:
        """Return an uninitialized int64 tensor (B,) in place of random integers below `high`."""
        return torch.empty(len(self), dtype=torch.int64)


def trace_step(module: CDMModule, networks: Networks, mode: FakeTensorMode) -> Step:
    """Run an average iteration of `module` on fake tensors, and return its memory and its operations.

    All tensors of `networks` must be fake tensors of `mode`.
    """
    cycle = module.objective.typical_cycle()
    late = LATE * len(cycle)
    phases: dict[tuple, Phase] = {}
    updates: dict[str, Phase] = {}
    for turn, of_iteration in enumerate(cycle):
        waiting = module.groups.of(turn).stop - turn - 1  # later iterations of the group; their text is in memory too
        for update in of_iteration:
            losses = update.losses
            same = (
                getattr(losses, "__func__", losses),
                id(getattr(losses, "__self__", None)),
            )  # the parts of a bound method, which is a new object each time
            key = (update.role, *same, waiting)
            if key not in phases:
                phases[key] = _trace_update(module, networks, mode, update, late + turn, waiting)
            share = update.repeat / len(cycle)
            updates[update.role] = _together(updates.get(update.role, Phase()), phases[key], share)
    return Step(_trace_rollout(module, networks, mode), updates)


def _together(before: Phase, after: Phase, share: float) -> Phase:
    """Return the phase that runs `before` and then `after`. In an average iteration, `after` runs `share` times."""
    a, b = before.memory, after.memory
    memory = Timeline(a.fixed + b.fixed, a.sample + b.sample, a.gradient + b.gradient)
    return Phase(memory, before.flops + share * after.flops)


def _trace_update(
    module: CDMModule, networks: Networks, mode: FakeTensorMode, update: Update, iteration: int, waiting: int
) -> Phase:
    def losses() -> Iterator[TermLosses]:
        _texts = [blank_sample(module, networks, iteration) for _ in range(waiting)]
        yield from update.losses(_at_a_point(module, blank_sample(module, networks, iteration)))

    return _record(losses, networks, update.role, mode)


def _trace_rollout(module: CDMModule, networks: Networks, mode: FakeTensorMode) -> Phase:
    """Trace the first call of a rollout. Its batch holds the samples of all iterations whose rollouts are computed together."""
    if module.objective.rollout == "none":
        return Phase()
    together = len(module.groups.of(0))

    def rollout() -> Iterator[TermLosses]:
        samples = [blank_sample(module, networks, 0) for _ in range(together)]
        walking = join_rollouts([_blank_rollout(sample) for sample in samples])
        if walking is None:  # one call cannot compute all samples, so each iteration is rolled out alone
            walking = _blank_rollout(samples[0])
        states = _states_kept(module, samples[0])
        with torch.no_grad():
            order = torch.empty_like(walking.anchor)  # `select` copies the text, as `walk` does when it sorts by anchor
            walking.student.select(order)(walking.noise, walking.sigmas[:, 0])
        del states
        yield from ()

    phase = _record(rollout, networks, None, mode)
    return Phase(phase.memory, phase.flops / together)


def _blank_rollout(sample: Sample) -> Rollout:
    noise = sample.rng.normal("noise", sample.latent_shape)
    return Rollout(sample.fields.student, noise, sample.rng.uniform("sigmas", 2), sample.rng.index("anchor", 1))


def _states_kept(module: CDMModule, sample: Sample) -> list[Tensor]:
    """Return the tensors that a full rollout keeps until its end: a state and a velocity for each step."""
    if module.objective.rollout != "full":
        return []
    steps = round(module.schedule.mean_length)
    return [sample.rng.normal("states", (2 * steps, *sample.latent_shape))]


def blank_sample(module: CDMModule, networks: Networks, iteration: int) -> Sample:
    """Return an input of the losses for `PROBE` prompts, like that of training, but of tensors without contents."""
    backbone, rng = module.backbone, BlankRandom(PROBE)
    text, no_text = backbone.blank_conditioning(PROBE), repeat_rows(backbone.blank_conditioning(1), PROBE)
    return Sample(
        prompts=[""] * PROBE,
        fields=bind_networks(networks, backbone, text, no_text, module.compute_dtype),
        rng=rng,
        shift=_unchanged,
        shift_steps=_unchanged,
        latent_shape=backbone.latent_shape,
        iteration=iteration,
        latents=rng.normal("latents", backbone.latent_shape) if module.objective.needs_latents else None,
    )


def _at_a_point(module: CDMModule, sample: Sample) -> Sample:
    """Return `sample` together with the state of the rollout that the objective's losses need."""
    x, v, x0_final = (sample.rng.normal("point", sample.latent_shape) for _ in range(3))
    sigma, next_sigma = sample.rng.uniform("sigma"), sample.rng.uniform("next")
    match module.objective.rollout:
        case "none":
            return sample
        case "full":
            return with_point(sample, FullTrajectoryPoint(x, v, sigma, next_sigma, x0_final=x0_final), steps=1)
        case _:
            return with_point(sample, TrajectoryPoint(x, v, sigma, next_sigma), steps=1)


def _unchanged(sigmas: Tensor) -> Tensor:
    return sigmas


def _record(
    run: Callable[[], Iterable[TermLosses]], networks: Networks, role: str | None, mode: FakeTensorMode
) -> Phase:
    """Measure `run` together with the backward pass of each loss that it yields. The gradients are dropped afterwards."""
    known = [t for network in every_network(networks) for t in storages(network)]
    trained = networks.trained
    parameters = [parameter for network in trained.values() for parameter in trainable(network)]
    others = [p for name, network in trained.items() if name != role for p in network.parameters()]
    with mode, LiveBytes(known, parameters if role else (), PROBE) as live, GPUAutocast():
        for losses in run():
            _run_backward(losses.total)
            for parameter in others:  # as `Updates.step` does
                parameter.grad = None
            del losses
    for parameter in parameters:
        parameter.grad = None
    return Phase(live.timeline, live.flops / PROBE)


def _run_backward(loss: Tensor) -> None:
    """Run the backward pass by calling the autograd engine, because `torch.autograd.backward` would turn `GPUAutocast` off."""
    seed = (torch.ones_like(loss),)
    _engine_run_backward((loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)


def every_network(networks: Networks) -> tuple[nn.Module, ...]:
    """Return all networks, including the frozen base of the LoRA adapters. The last one is always the teacher."""
    return (*networks.children(), *networks.unregistered)
