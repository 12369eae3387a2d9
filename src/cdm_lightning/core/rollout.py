"""Rollouts (backward simulation): the student's own deterministic path from noise to an image, in K Euler steps.

The losses use one step of the path, the *anchor*. For each sample, the anchor is drawn at random from the steps 0 to
K - 1. The *point* at the anchor is the state x at the start of this step, with the state's sigma and the student's
velocity at this state. Rollouts are computed without gradients.

In the shapes, B is the number of samples, and * stands for the shape (C, H, W) of a sample. The sigmas (B, K + 1)
decrease from 1 to 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import VelocityField, denoise, move
from cdm_lightning.core.transfer import send


@dataclass(frozen=True)
class TrajectoryPoint:
    """For each of B samples, one state on its rollout and the student's velocity at this state.

    The states of different samples may be at different steps of the rollout.
    """

    x: Tensor  # (B, *)
    v: Tensor  # (B, *), the student's velocity at (x, sigma)
    sigma: Tensor  # (B,)
    next_sigma: Tensor | None = None  # (B,), where the step that starts at the point ends

    @property
    def x0(self) -> Tensor:
        """The student's x0 prediction at this point, (B, *)."""
        return denoise(self.x, self.v, self.sigma)

    def move_to(self, sigma: Tensor) -> Tensor:
        """Take one Euler step from this point to `sigma` (B,), and return the states (B, *) that the step reaches.

        The step uses the student's velocity at this point. CDM's off-trajectory point is made in this way.
        """
        return move(self.x, self.v, self.sigma, sigma)


@dataclass(frozen=True)
class FullTrajectoryPoint(TrajectoryPoint):
    """A `TrajectoryPoint` on a rollout that was simulated to its end, with the rollout's final samples."""

    x0_final: Tensor = field(kw_only=True)  # (B, *), the end of the rollout


@dataclass(frozen=True)
class Trajectory:
    """A rollout (the student's path from noise to an image) of K steps.

    It consists of all states, the student's velocities at these states, and the final samples.
    """

    x: Tensor  # (K, B, *)
    v: Tensor  # (K, B, *)
    sigmas: Tensor  # (B, K + 1)
    final: Tensor  # (B, *), the state at sigma 0

    def __len__(self) -> int:
        """Return K, the number of steps."""
        return len(self.x)

    def at(self, anchor: Tensor) -> FullTrajectoryPoint:
        """Return each sample's point at the start of the step that `anchor` (B,) names. Steps count from 0 to K - 1."""
        anchor = send(anchor, self.final.device)
        point = self._states(anchor)
        return FullTrajectoryPoint(point.x, point.v, point.sigma, point.next_sigma, x0_final=self.final)

    def _states(self, step: Tensor) -> TrajectoryPoint:
        samples = torch.arange(len(step), device=step.device)
        x, v = self.x[step, samples], self.v[step, samples]
        return TrajectoryPoint(x, v, self.sigmas[samples, step], self.sigmas[samples, step + 1])


@torch.no_grad()
def simulate(student: VelocityField, noise: Tensor, sigmas: Tensor) -> Trajectory:
    """Compute the whole rollout (the student's path from noise to an image) of B samples by K calls of `student`.

    The rollout starts at `noise` (B, *) and follows `sigmas` (B, K + 1).
    """
    x, xs, vs = noise, [], []
    for sigma, next_sigma in pairwise(sigmas.T):
        v = student(x, sigma)
        xs.append(x)
        vs.append(v)
        x = move(x, v, sigma, next_sigma)
    return Trajectory(torch.stack(xs), torch.stack(vs), sigmas, x)


@dataclass(frozen=True)
class Rollout:
    """The inputs from which a rollout (the student's path from noise to an image) is computed.

    The inputs are the student, the initial noise, the sigmas, and each sample's anchor (a randomly drawn step).
    """

    student: VelocityField
    noise: Tensor  # (B, *)
    sigmas: Tensor  # (B, K + 1)
    anchor: Tensor  # (B,), from 0 to K - 1, on the CPU, where it decides which network calls are made

    @property
    def steps(self) -> int:
        """K, the number of steps."""
        return self.sigmas.shape[1] - 1

    @torch.no_grad()
    def point(self, x: Tensor) -> TrajectoryPoint:
        """Return each sample's state at its anchor (its randomly drawn step), with the student's velocity there.

        `x` (B, *) are the states at the anchors, which `walk` returns. One call of the student computes the velocities.
        """
        anchor = send(self.anchor, self.sigmas.device)[:, None]
        sigma, next_sigma = (self.sigmas.gather(1, anchor + step).squeeze(1) for step in (0, 1))
        return TrajectoryPoint(x, self.student(x, sigma), sigma, next_sigma)


def walk(rollouts: Sequence[Rollout], agree_on_calls: Callable[[int], int] = lambda calls: calls) -> list[Tensor]:
    """Compute each sample's rollout up to its anchor, a randomly drawn step, and return the states there.

    The result has one tensor of states (B, *) for each of `rollouts`. Each state is the one at which the anchor begins.
    The anchor itself and the steps after it are not computed. For the states x of a rollout, `rollout.point(x)` equals
    `simulate(...).at(anchor)` up to rounding. All rollouts are computed as one batch if `join_rollouts` can join them.

    `agree_on_calls` takes the number of student calls that this process needs and returns the number that it must make.
    It is for processes that hold shards of one network, because all of them must make the same number of calls. The
    additional calls run on one sample, and their results are dropped.
    """
    joined = join_rollouts(rollouts)
    if joined is None:
        return [_walk(rollout, agree_on_calls) for rollout in rollouts]
    return list(_walk(joined, agree_on_calls).split([len(rollout.noise) for rollout in rollouts]))


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout | None:
    """Concatenate rollouts (the student's paths from noise to an image) into one batch.

    Returns None if the student cannot be called on samples of all rollouts at once, for example because the samples
    differ in shape. Rollouts with fewer steps are padded with sigmas of 0.
    """
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
    """Return the states (B, *) at the anchors, the randomly drawn steps.

    Step n runs only for samples with anchor > n. The batch is sorted by decreasing anchor, so these samples come first,
    and after each step the finished samples are cut off at the end. The host never waits for the device.
    """
    student, noise, sigmas, anchor = rollout.student, rollout.noise, rollout.sigmas, rollout.anchor
    order = anchor.argsort(descending=True)
    steps = int(anchor.max())
    active = [int((anchor > n).sum()) for n in range(steps + 1)]  # number of samples that take step n; the last is 0
    idle = agree_on_calls(steps) - steps  # processes agree before the first step, so that none waits later
    by_anchor = send(order, noise.device)
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
    return torch.cat(arrived[::-1])[
        by_anchor.argsort()
    ]  # samples with the highest anchors arrive last, but are sorted first


@torch.no_grad()
def sample(field: VelocityField, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Compute samples x0 (B, *) by n Euler steps with the velocities of `field`. No noise is added in the steps.

    The steps lead from `noise` (B, *) along `sigmas` (n + 1,), which decrease to 0.
    """
    x = noise
    for sigma, next_sigma in pairwise(sigmas.to(noise.device)):
        x = move(x, field(x, sigma.expand(len(x))), sigma, next_sigma)
    return x
