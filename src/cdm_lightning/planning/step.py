"""One iteration of a run, done on tensors without contents: the real networks, objective, backward pass and autocast.

Nothing is estimated here: `Networks`, `BoundField` and the objective are those of training, on fake tensors, so their memory
and their floating-point operations are those of the code that will run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward

from cdm_lightning.backbones.base import BoundField, Conditioning, repeat_rows
from cdm_lightning.core.flow import VelocityField
from cdm_lightning.core.objective import TermLosses, VelocityFields
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.module import CDMModule, Part
from cdm_lightning.networks import Networks
from cdm_lightning.planning.live import PROBE, GPUAutocast, LiveBytes, Timeline, storages


@dataclass(frozen=True)
class Phase:
    """A part of an iteration: its memory by moment, and floating-point operations of one sample."""

    memory: Timeline
    flops: float


@dataclass(frozen=True)
class Step:
    """An iteration's parts: a student's call of the rollout, an update of the fake score, one of the student.

    Rollouts that walk together are one call, and the text of those whose iteration comes later lies beside the first update.
    The student's memory is that of its whole turn: its call at the anchor waits for its backward pass while the fake score is
    updated. Its operations are those beyond a rollout and that update.
    """

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

    def select(self, rows: slice) -> "BlankRandom":
        """As many draws as there are rows."""
        return BlankRandom(len(range(self.batch)[rows]))

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
        return _bind(module, networks, cond(batch), repeat_rows(cond(1), batch))

    trains_at_anchor = module.trains_at_anchor(iteration)
    together = len(module.rolled_out_together(iteration))

    def point(field: VelocityField | None = None) -> TrajectoryPoint:
        x, v, first, last = (rng.normal("point", backbone.latent_shape) for _ in range(4))
        ahead = (first, last) if module.objective.needs_full_rollout else (None, None)
        made = TrajectoryPoint(x, v, rng.uniform("sigma"), *ahead)
        return made if field is None else replace(made, v_with_grad=field(x, made.sigma))

    def same(sigmas: Tensor) -> Tensor:
        return sigmas

    def rollout() -> Iterator[TermLosses]:
        students = [fields().student for _ in range(together)]
        everyone = BlankRandom(together * batch)
        with torch.no_grad():
            student = students[0].join(students[1:]) if together > 1 else students[0]
            walking = student.select(
                torch.empty(len(everyone), dtype=torch.int64)
            )  # its text is copied in another order
            walking(everyone.normal("noise", backbone.latent_shape), everyone.uniform("sigma"))
        yield from ()

    def fake_score() -> Iterator[TermLosses]:
        _waiting = [fields().student for _ in range(together - 1)]
        yield module.objective.fake_score_loss(fields(), point(), rng, same)

    def turn() -> Iterator[TermLosses]:
        seen = fields()
        at = point(seen.student if trains_at_anchor else None)
        whole = Part(seen, rng, SimpleNamespace(shift_sigmas=same), 1.0, point=at)
        for _, losses in module.fake_score_losses([whole], step=0):
            yield losses
            del losses
        networks.fake_score.zero_grad(set_to_none=True)
        yield from module.objective.student_losses(seen, at, rng, same, iteration)

    call = _record(rollout, networks, (), mode)
    call = replace(call, flops=call.flops / together)
    update = _record(fake_score, networks, (networks.fake_score,), mode)
    both = _record(turn, networks, (networks.fake_score, networks.student), mode)
    before = update.flops + (call.flops if trains_at_anchor else 0.0)
    return Step(rollout=call, fake_score=update, student=replace(both, flops=both.flops - before))


def _bind(module: CDMModule, networks: Networks, text: Conditioning, no_text: Conditioning) -> VelocityFields:
    """What `CDMModule.bind` gives, of networks that the module does not own and text that nothing encodes."""
    bound = [
        BoundField(module.backbone, network, words, module.compute_dtype)
        for network, words in (
            (networks.student, text),
            (networks.fake_score, text),
            (networks.teacher, text),
            (networks.teacher, no_text),
        )
    ]
    return VelocityFields(*bound)


def _record(
    run: Callable[[], Iterable[TermLosses]], networks: Networks, trained: Sequence[nn.Module], mode: FakeTensorMode
) -> Phase:
    """Run a part with the backward pass of each loss that it gives; gradients are dropped afterwards."""
    known = [t for network in every_network(networks) for t in storages(network)]
    parameters = [parameter for network in trained for parameter in network.parameters()]
    with mode, LiveBytes(known, parameters, PROBE) as live, GPUAutocast():
        for losses in run():
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
