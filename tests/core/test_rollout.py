"""Rollouts: exact end points, and stopping at the anchor changes nothing but the number of calls."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from closed_form import BatchField, Network, point_mass

from cdm_lightning.core.flow import FunctionField, interpolate
from cdm_lightning.core.lengths import FixedLength
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import FullTrajectoryPoint, Rollout, TrajectoryPoint, sample, simulate, walk
from cdm_lightning.core.schedules import RandomSchedule, uniform_sigmas

SHAPE = (3, 4, 4)


def setting(batch: int, steps: int):
    """A nonlinear student with conditioning, noise, sigmas and anchors of one iteration."""
    rng = StepRandom(0, 0, range(batch), "cpu")
    sigmas = RandomSchedule(FixedLength(steps)).sample(rng, lambda s: s)
    network = Network(lambda x, sigma: torch.tanh(2 * x.roll(1, dims=1) - x) * sigma.view(-1, 1, 1, 1))
    student = BatchField(network, rng.uniform("offset"))
    return student, rng.normal("noise", SHAPE), sigmas, rng.index("anchor", steps)


def stop_at(student, noise, sigmas, anchor) -> TrajectoryPoint:
    """The point of one rollout that stops at its anchors."""
    rollout = Rollout(student, noise, sigmas, anchor)
    return rollout.point(*walk([rollout]))


def test_a_point_mass_is_reached_from_anywhere():
    student = point_mass(0.75, 5)
    _, noise, sigmas, anchor = setting(5, 6)
    trajectory = simulate(student, noise, sigmas)
    assert len(trajectory) == 6
    torch.testing.assert_close(trajectory.final, torch.full_like(noise, 0.75))
    for n in range(6):  # the path is the straight line from noise to data
        torch.testing.assert_close(trajectory.x[n], interpolate(torch.full_like(noise, 0.75), noise, sigmas[:, n]))
    point = trajectory.at(anchor)
    for x0 in (point.x0, point.x0_final):
        torch.testing.assert_close(x0, torch.full_like(noise, 0.75))
    target = torch.full((5,), 0.3)
    torch.testing.assert_close(point.move_to(target), interpolate(torch.full_like(noise, 0.75), noise, target))


def test_gaussian_data_keep_their_width():
    """The exact field of N(m, c^2) data: the sampler's x0 is m + c noise, as the flow's closed form says."""
    m, c = 1.5, 0.5

    def velocity(x, sigma):
        s = sigma.view(-1, 1, 1, 1).double()
        variance = (1 - s) ** 2 * c**2 + s**2
        return (s - (1 - s) * c**2) / variance * (x - (1 - s) * m) - m

    noise = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = sample(FunctionField(velocity), noise, torch.linspace(1, 0, 2001, dtype=torch.float64))
    torch.testing.assert_close(x0, m + c * noise, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 5), (16, 7), (16, 28)])
def test_stopping_at_the_anchor_gives_the_points_of_full_rollouts(batch, steps):
    student, noise, sigmas, anchor = setting(batch, steps)
    full = simulate(student, noise, sigmas).at(anchor)
    student.network.calls.clear()
    stopped = stop_at(student, noise, sigmas, anchor)
    assert torch.equal(stopped.sigma, full.sigma)
    torch.testing.assert_close(stopped.x, full.x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stopped.v, full.v, rtol=1e-5, atol=1e-5)
    walking = [int((anchor > n).sum()) for n in range(int(anchor.max()))]
    assert student.network.batches == [*walking, batch]  # the call at the anchor is one for all
    assert not any(call.with_grad for call in student.network.calls)
    assert not isinstance(stopped, FullTrajectoryPoint)  # nothing is known of what comes after the anchor


@pytest.mark.parametrize("anchors", [[0, 0, 0], [2, 2, 2], [0, 2, 0], [2, 1, 0]])
def test_any_pattern_of_anchors(anchors):
    student, noise, sigmas, _ = setting(3, 3)
    anchor = torch.tensor(anchors)
    full, stopped = simulate(student, noise, sigmas).at(anchor), stop_at(student, noise, sigmas, anchor)
    torch.testing.assert_close(stopped.x, full.x)
    torch.testing.assert_close(stopped.v, full.v)
    assert torch.equal(stopped.sigma, full.sigma)


@pytest.mark.parametrize("steps", [(5, 2), (2, 5), (1, 4, 1), (1, 1)])
def test_rollouts_of_several_lengths_walk_as_one_batch(steps):
    """The same states, in as many calls as the longest of them takes."""
    rollouts = [Rollout(*setting(4 + n, k)) for n, k in enumerate(steps)]
    networks = [rollout.student.network for rollout in rollouts]
    alone = [walk([rollout])[0] for rollout in rollouts]
    for network in networks:
        network.calls.clear()
    students = [BatchField(networks[0], rollout.student.offset) for rollout in rollouts]
    together = walk([replace(rollout, student=student) for rollout, student in zip(rollouts, students)])
    longest = max(int(rollout.anchor.max()) for rollout in rollouts)
    walking = [sum(int((rollout.anchor > n).sum()) for rollout in rollouts) for n in range(longest)]
    assert networks[0].batches == walking
    for x, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(x, expected)


def agree(asked: list[int], calls: int) -> int:
    """As many calls as there are to make, noted."""
    asked.append(calls)
    return calls


def test_rollouts_that_one_call_cannot_serve_walk_one_by_one():
    first, other = (Rollout(*setting(3, 4)) for _ in range(2))  # of two networks
    larger = replace(first, noise=first.noise.repeat(1, 1, 2, 1))
    for pair in ((first, other), (first, larger)):
        asked: list[int] = []
        walked = walk(pair, partial(agree, asked))
        assert asked == [int(rollout.anchor.max()) for rollout in pair]
        for x, rollout in zip(walked, pair, strict=True):
            torch.testing.assert_close(x, walk([rollout])[0])


def test_half_of_the_calls_are_saved():
    student, noise, sigmas, anchor = setting(400, 28)
    stop_at(student, noise, sigmas, anchor)
    mean_calls = sum(student.network.batches) / 400
    assert mean_calls == pytest.approx((28 + 1) / 2, rel=0.05)


def test_what_follows_the_anchor():
    student, noise, sigmas, _ = setting(4, 3)
    trajectory = simulate(student, noise, sigmas)
    point = trajectory.at(torch.tensor([0, 1, 2, 1]))
    after = trajectory.at(torch.tensor([1, 2, 2, 2]))
    assert torch.equal(point.x0_final, trajectory.final)
    torch.testing.assert_close(after.x0[2], trajectory.final[2])


def test_the_sampler_takes_the_steps_of_a_rollout():
    student, noise, _, _ = setting(6, 3)
    sigmas = torch.cat([uniform_sigmas(4), torch.zeros(1)])
    assert torch.equal(sample(student, noise, sigmas), simulate(student, noise, sigmas.expand(6, -1)).final)


def test_no_gradients_are_kept():
    weight = torch.ones((), requires_grad=True)
    student = FunctionField(lambda x, sigma: weight * x)
    _, noise, sigmas, anchor = setting(3, 3)
    assert not simulate(student, noise, sigmas).final.requires_grad
    assert not stop_at(student, noise, sigmas, anchor).v.requires_grad
    assert not sample(student, noise, sigmas[0]).requires_grad
