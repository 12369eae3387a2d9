"""Backward simulation: the student's own deterministic path from noise, and the one point of it that is trained on.

Shapes: B samples of shape * = (C, H, W), K steps, sigmas (B, K + 1) falling from 1 to 0. Nothing here keeps gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import VelocityField, denoise, move, per_sample


@dataclass(frozen=True)
class TrajectoryPoint:
    """One state of each sample's rollout."""

    x: Tensor  # (B, *)
    v: Tensor  # (B, *), the student's velocity at (x, sigma)
    sigma: Tensor  # (B,)

    @property
    def x0(self) -> Tensor:
        """The student's clean prediction at this point, (B, *)."""
        return denoise(self.x, self.v, self.sigma)

    def move_to(self, sigma: Tensor) -> Tensor:
        """The off-trajectory state at sigma (B,) in the direction of v, (B, *)."""
        return move(self.x, self.v, self.sigma, sigma)


@dataclass(frozen=True)
class FullTrajectoryPoint(TrajectoryPoint):
    """A point of a rollout that was simulated to its end, with what came after the point."""

    x0_next: Tensor  # (B, *), the clean prediction one step later
    x0_final: Tensor  # (B, *), the end of the rollout


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

    def at(self, anchor: Tensor) -> FullTrajectoryPoint:
        """The point with index anchor (B,) of [0, K) for each sample; after the last comes the final state."""
        anchor = anchor.to(self.final.device)
        point = self._states(anchor)
        ahead = self._states((anchor + 1).clamp(max=len(self) - 1))
        is_last = per_sample(anchor == len(self) - 1, self.final)
        x0_next = torch.where(is_last, self.final, ahead.x0)
        return FullTrajectoryPoint(point.x, point.v, point.sigma, x0_next=x0_next, x0_final=self.final)

    def _states(self, step: Tensor) -> TrajectoryPoint:
        samples = torch.arange(len(step), device=step.device)
        return TrajectoryPoint(self.x[step, samples], self.v[step, samples], self.sigmas[samples, step])


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
    """The random draws of a rollout, and the student that walks it."""

    student: VelocityField
    noise: Tensor  # (B, *)
    sigmas: Tensor  # (B, K + 1)
    anchor: Tensor  # (B,) of [0, K), on the CPU: which calls are made depends on it

    @torch.no_grad()
    def point(self, x: Tensor) -> TrajectoryPoint:
        """The points at the anchors, whose states x (B, *) `walk` returned: one call of the student for the whole batch."""
        sigma = self.sigmas.gather(1, self.anchor.to(self.sigmas.device)[:, None]).squeeze(1)
        return TrajectoryPoint(x, self.student(x, sigma), sigma)


def walk(rollouts: Sequence[Rollout], agree_on_calls: Callable[[int], int] = lambda calls: calls) -> list[Tensor]:
    """The states (B, *) of each rollout at its anchors; all walk as one batch where one call of the student serves them.

    `rollout.point(x)` of a state is what `simulate(...).at(anchor)` gives, to float rounding, without the steps after each
    anchor.

    Processes that hold shards of one network must all call it equally often: `agree_on_calls` takes the number of calls that
    this walk needs and returns how many to make. The additional calls run on one sample, and their results are dropped.
    """
    joined = join_rollouts(rollouts)
    if joined is None:
        return [_walk(rollout, agree_on_calls) for rollout in rollouts]
    return list(_walk(joined, agree_on_calls).split([len(rollout.noise) for rollout in rollouts]))


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout | None:
    """The rollouts one after the other as one, shorter ones filled up with sigma 0; None where one call cannot serve all."""
    first, *others = rollouts
    if not others:
        return first
    one_shape = all(other.noise.shape[1:] == first.noise.shape[1:] for other in others)
    student = first.student.join([other.student for other in others]) if one_shape else None
    if student is None:
        return None
    longest = max(rollout.sigmas.shape[1] for rollout in rollouts)
    return Rollout(
        student,
        torch.cat([rollout.noise for rollout in rollouts]),
        torch.cat([F.pad(rollout.sigmas, (0, longest - rollout.sigmas.shape[1])) for rollout in rollouts]),
        torch.cat([rollout.anchor for rollout in rollouts]),
    )


@torch.no_grad()
def _walk(rollout: Rollout, agree_on_calls: Callable[[int], int]) -> Tensor:
    """The states (B, *) at the anchors.

    Step n runs only for the samples with anchor > n. Sorted by falling anchor these are a prefix of the batch, so a step
    drops rows from its end; the dropped rows have reached their anchor. Nothing here waits for the device.
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
