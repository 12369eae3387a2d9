"""Backward simulation: the student's own deterministic path from noise, and the one point of it that is trained on.

Shapes: B samples of shape * = (C, H, W), K steps, sigmas (B, K + 1) falling from 1 to 0. Nothing here keeps gradients, but for
the call at the anchor where that is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import Rows, VelocityField, denoise, move, per_sample


@dataclass(frozen=True)
class TrajectoryPoint:
    """One state of each sample's rollout."""

    x: Tensor  # (B, *)
    v: Tensor  # (B, *), the student's velocity at (x, sigma)
    sigma: Tensor  # (B,)
    x0_next: Tensor | None = None  # (B, *), the clean prediction one step later; from full rollouts only
    x0_final: Tensor | None = None  # (B, *), the end of the rollout; from full rollouts only
    v_with_grad: Tensor | None = None  # (B, *), v with the student's graph, where the student is trained on this call

    def select(self, rows: Rows) -> "TrajectoryPoint":
        """The points of some samples."""
        parts = (self.x, self.v, self.sigma, self.x0_next, self.x0_final, self.v_with_grad)
        return TrajectoryPoint(*(None if part is None else part[rows] for part in parts))

    @property
    def x0(self) -> Tensor:
        """The student's clean prediction at this point, (B, *)."""
        return denoise(self.x, self.v, self.sigma)

    def move_to(self, sigma: Tensor) -> Tensor:
        """The off-trajectory state at sigma (B,) in the direction of v, (B, *)."""
        return move(self.x, self.v, self.sigma, sigma)


@dataclass(frozen=True)
class Trajectory:
    """All states of a rollout of K steps."""

    x: Tensor  # (K, B, *)
    v: Tensor  # (K, B, *)
    sigmas: Tensor  # (B, K + 1)
    final: Tensor  # (B, *), the state at sigma 0

    def __len__(self) -> int:
        """K."""
        return len(self.x)

    def at(self, anchor: Tensor) -> TrajectoryPoint:
        """The point with index anchor (B,) of [0, K) for each sample; after the last comes the final state."""
        anchor = anchor.to(self.final.device)
        samples = torch.arange(len(anchor), device=anchor.device)
        point = TrajectoryPoint(self.x[anchor, samples], self.v[anchor, samples], self.sigmas[samples, anchor])
        following = (anchor + 1).clamp(max=len(self) - 1)
        ahead = TrajectoryPoint(self.x[following, samples], self.v[following, samples], self.sigmas[samples, following])
        is_last = per_sample(anchor == len(self) - 1, self.final)
        return replace(point, x0_next=torch.where(is_last, self.final, ahead.x0), x0_final=self.final)


@torch.no_grad()
def simulate(student: VelocityField, noise: Tensor, sigmas: Tensor) -> Trajectory:
    """All K steps for all samples: noise (B, *), sigmas (B, K + 1)."""
    x, xs, vs = noise, [], []
    for sigma, next_sigma in pairwise(sigmas.T):
        v = student(x, sigma)
        xs.append(x)
        vs.append(v)
        x = move(x, v, sigma, next_sigma)
    return Trajectory(torch.stack(xs), torch.stack(vs), sigmas, x)


@dataclass(frozen=True)
class Rollout:
    """What a rollout is drawn as, and, once it has been walked, the states at the anchors; it ends there."""

    student: VelocityField
    noise: Tensor  # (B, *)
    sigmas: Tensor  # (B, K + 1)
    anchor: Tensor  # (B,) of [0, K), on the CPU: which calls are made depends on it
    x: Tensor | None = None  # (B, *), the states at the anchors

    def point(self, with_grad: bool = False) -> TrajectoryPoint:
        """The points at the anchors, by one call for the whole batch; `with_grad`: the student can be trained on that call."""
        sigma = self.sigmas.gather(1, self.anchor.to(self.sigmas.device)[:, None]).squeeze(1)
        with torch.set_grad_enabled(with_grad):
            v = self.student(self.x, sigma)
        return TrajectoryPoint(self.x, v.detach(), sigma, v_with_grad=v if with_grad else None)


def walk(rollouts: Sequence[Rollout], agree_on_calls: Callable[[int], int] = lambda calls: calls) -> list[Rollout]:
    """The rollouts at their anchors; they walk as one batch where one call of the student can serve them all.

    Their `point()` is what `simulate(...).at(anchor)` gives, to float rounding, without the steps after each anchor.

    Processes that hold shards of one network must all call it equally often: `agree_on_calls` is told how many calls
    a walk takes and says how many to make. Those beyond run on one sample, and nothing comes of them.
    """
    first, *others = rollouts
    one_shape = all(other.noise.shape[1:] == first.noise.shape[1:] for other in others)
    student = first.student.join([other.student for other in others]) if others and one_shape else None
    if student is None:
        return [replace(one, x=_walk(one, agree_on_calls)) for one in rollouts]
    longest = max(one.sigmas.shape[1] for one in rollouts)
    together = Rollout(
        student,
        torch.cat([one.noise for one in rollouts]),
        torch.cat([F.pad(one.sigmas, (0, longest - one.sigmas.shape[1])) for one in rollouts]),
        torch.cat([one.anchor for one in rollouts]),
    )
    arrived = _walk(together, agree_on_calls).split([len(one.noise) for one in rollouts])
    return [replace(one, x=x) for one, x in zip(rollouts, arrived)]


@torch.no_grad()
def _walk(rollout: Rollout, agree_on_calls: Callable[[int], int]) -> Tensor:
    """The states (B, *) at the anchors.

    Step n runs for the samples with anchor > n only. Sorted by falling anchor these are a prefix of the batch, so a
    step drops rows from its end; those dropped are there. Nothing here waits for the device.
    """
    student, noise, sigmas, anchor = rollout.student, rollout.noise, rollout.sigmas, rollout.anchor
    order = anchor.argsort(descending=True)
    steps = int(anchor.max())
    active = [int((anchor > n).sum()) for n in range(steps + 1)]  # samples that take step n; 0 at the end
    idle = agree_on_calls(steps) - steps  # asked before the first: nobody waits in between
    by_anchor = order.to(noise.device)
    x, sorted_sigmas = noise[by_anchor], sigmas[by_anchor]
    arrived = [x[active[0] :]]
    x = x[: active[0]]
    field = student.select(by_anchor[: active[0]]) if steps else student
    for n, (rows, staying) in enumerate(pairwise(active)):
        x = move(x, field(x, sorted_sigmas[:rows, n]), sorted_sigmas[:rows, n], sorted_sigmas[:rows, n + 1])
        arrived.append(x[staying:])
        x = x[:staying]
        if 0 < staying < rows:
            field = field.select(slice(staying))
    for _ in range(idle):
        student.select(slice(1))(noise[:1], sigmas[:1, 0])
    return torch.cat(arrived[::-1])[by_anchor.argsort()]  # those with the highest anchors arrive last and stand first


@torch.no_grad()
def sample(field: VelocityField, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Deterministic Euler sampling from noise (B, *) along sigmas (n + 1,) that end in 0: x0 (B, *)."""
    x = noise
    for sigma, next_sigma in pairwise(sigmas.to(noise.device)):
        x = move(x, field(x, sigma.expand(len(x))), sigma, next_sigma)
    return x
