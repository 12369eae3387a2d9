"""One iteration of a run, done on tensors without contents: the real networks, objective, backward pass and autocast.

Nothing is estimated here: `Networks`, `BoundField` and the objective are those of training, on fake tensors, so their memory
and their floating-point operations are those of the code that will run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward

from cdm_lightning.backbones.base import BoundField, Conditioning
from cdm_lightning.core.objective import TermLosses, VelocityFields
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.module import CDMModule
from cdm_lightning.networks import Networks
from cdm_lightning.planning.live import PROBE, GPUAutocast, LiveBytes, Timeline, storages


@dataclass(frozen=True)
class Phase:
    """A part of an iteration: its memory by moment, and floating-point operations of one sample."""

    memory: Timeline
    flops: float


@dataclass(frozen=True)
class Step:
    """An iteration's parts: a student's call of the rollout, an update of the fake score, one of the student."""

    rollout: Phase
    fake_score: Phase
    student: Phase


class BlankRandom:
    """Stands in for `StepRandom` where no number is looked at: draws of the right shape, without contents."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return self.batch

    def again(self, repeat: int) -> "BlankRandom":
        """Itself."""
        return self

    def uniform(self, purpose: str, n: int | None = None) -> Tensor:
        """(B,), or (B, n)."""
        return torch.empty(self.batch if n is None else (self.batch, n))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape)."""
        return torch.empty(self.batch, *shape)


def trace_step(
    module: CDMModule, networks: Networks, mode: FakeTensorMode, cond: Callable[[int], Conditioning], iteration: int
) -> Step:
    """The parts of `iteration` of `module` on `networks`, all of whose tensors belong to `mode`.

    `cond` makes the conditioning of a batch.
    """
    backbone, batch = module.backbone, PROBE
    rng = BlankRandom(batch)

    def fields() -> VelocityFields:
        text, no_text = cond(batch), cond(batch)
        bound = [
            BoundField(backbone, network, words, module.compute_dtype)
            for network, words in (
                (networks.student, text),
                (networks.fake_score, text),
                (networks.teacher, text),
                (networks.teacher, no_text),
            )
        ]
        return VelocityFields(*bound)

    def point() -> TrajectoryPoint:
        x, v, first, last = (rng.normal("point", backbone.latent_shape) for _ in range(4))
        ahead = (first, last) if module.objective.needs_full_rollout else (None, None)
        return TrajectoryPoint(x, v, rng.uniform("sigma"), *ahead)

    def same(sigmas: Tensor) -> Tensor:
        return sigmas

    def rollout() -> None:
        with torch.no_grad():
            fields().student(rng.normal("noise", backbone.latent_shape), rng.uniform("sigma"))

    def fake_score() -> TermLosses:
        return module.objective.fake_score_loss(fields(), point(), rng, same)

    def student() -> TermLosses:
        return module.objective.student_loss(fields(), point(), rng, same, iteration)

    return Step(
        rollout=_record(rollout, networks, None, mode),
        fake_score=_record(fake_score, networks, networks.fake_score, mode),
        student=_record(student, networks, networks.student, mode),
    )


def _record(
    run: Callable[[], TermLosses | None], networks: Networks, trained: nn.Module | None, mode: FakeTensorMode
) -> Phase:
    """Run a part and, where it has a loss, its backward pass; gradients are dropped afterwards."""
    known = [t for network in every_network(networks) for t in storages(network)]
    parameters = [] if trained is None else list(trained.parameters())
    with mode, LiveBytes(known, parameters, PROBE) as live, GPUAutocast():
        losses = run()
        if losses is not None:
            _run_backward(losses.total)
            del losses
    for parameter in parameters:
        parameter.grad = None
    return Phase(live.timeline, live.flops / PROBE)


def _run_backward(loss: Tensor) -> None:
    """The engine itself: `torch.autograd.backward` would switch `GPUAutocast` off, which recomputed blocks need on."""
    seed = (torch.ones_like(loss),)
    _engine_run_backward((loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)


def every_network(networks: Networks) -> tuple[nn.Module, ...]:
    """All networks, with the frozen base that adapters sit on."""
    return (networks.student, networks.fake_score, networks.student_ema, *networks.unregistered)
