"""Schedules: strictly falling from 1 to 0, the same K everywhere, other sigmas, and the space they live in."""

import numpy as np
import pytest
import torch

from cdm_lightning.core.lengths import FixedLength, UniformLength
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.schedules import (
    FixedSchedule,
    RandomSchedule,
    _strictly_decreasing,
    inference_sigmas,
    uniform_sigmas,
)


def identity(sigmas):
    return sigmas


def shift3(sigmas):
    return 3 * sigmas / (1 + 2 * sigmas)


def step(iteration: int, slots=range(8)) -> StepRandom:
    return StepRandom(0, iteration, slots, "cpu")


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("space", ["before_shift", "after_shift"])
def test_random_schedule_falls_strictly_from_1_to_0(stratified, space):
    schedule = RandomSchedule(UniformLength(), stratified=stratified, space=space)
    lengths = set()
    for iteration in range(200):
        sigmas = schedule.sample(step(iteration), shift3)
        assert sigmas.dtype == torch.float32
        assert (sigmas[:, 0] == 1).all()
        assert (sigmas[:, -1] == 0).all()
        assert (sigmas.diff(dim=1) < 0).all()
        lengths.add(sigmas.shape[1] - 1)
    assert lengths == set(range(1, 29))


def test_k_is_the_same_on_all_processes_and_the_sigmas_are_not():
    schedule = RandomSchedule(UniformLength(low=2))
    for iteration in range(30):
        one, two = (schedule.sample(step(iteration, slots), identity) for slots in (range(4), range(4, 8)))
        assert one.shape == two.shape
        assert torch.equal(torch.cat([one, two]), schedule.sample(step(iteration), identity))
        inner = torch.cat([one, two])[:, 1:-1]
        assert inner.unique().numel() == inner.numel()  # each sample has its own
    assert not torch.equal(schedule.sample(step(0), identity), schedule.sample(step(1), identity))


@pytest.mark.parametrize("stratified", [False, True])
def test_inner_sigmas_fill_the_range_evenly(stratified):
    schedule = RandomSchedule(FixedLength(9), sigma_min=0.2, sigma_max=0.8, stratified=stratified)
    inner = schedule.sample(step(0, range(2000)), identity)[:, 1:-1]
    counts = torch.histc(inner, 10, 0.2, 0.8)
    assert inner.min() >= 0.2
    assert inner.max() <= 0.8
    assert ((counts / inner.numel() - 0.1).abs() < 0.01).all()


def test_stratified_has_one_sigma_in_each_bin():
    inner = RandomSchedule(FixedLength(6), 0.25, 0.75, stratified=True).sample(step(0), identity)[:, 1:-1]
    bins = ((inner - 0.25) / 0.1).floor().long()
    assert torch.equal(bins, torch.tensor([4, 3, 2, 1, 0]).expand(8, -1))
    plain = RandomSchedule(FixedLength(6), 0.25, 0.75).sample(step(0), identity)[:, 1:-1]
    assert not torch.equal(((plain - 0.25) / 0.1).floor().long(), bins)


def test_space_decides_whether_the_shift_applies():
    before, after = (RandomSchedule(FixedLength(5), space=space) for space in ("before_shift", "after_shift"))
    plain = before.sample(step(0), identity)
    torch.testing.assert_close(before.sample(step(0), shift3), shift3(plain))
    assert torch.equal(after.sample(step(0), shift3), plain)
    assert before.sample(step(0, range(500)), shift3)[:, 1:-1].min() >= 0.5  # 0.25 before SD3's shift


def test_equal_sigmas_are_set_apart_by_one_unit():
    ties = torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.5, 0.25]])
    apart = _strictly_decreasing(ties)
    assert (apart.diff() < 0).all()
    torch.testing.assert_close(apart, ties, rtol=3e-7, atol=0)
    assert torch.equal(_strictly_decreasing(apart), apart)


def test_fixed_schedule():
    sigmas = FixedSchedule().sample(step(0), shift3)
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]).expand(8, -1))
    after = FixedSchedule(sigmas=[1.0, 0.4], space="after_shift").sample(step(0), shift3)
    assert torch.equal(after, torch.tensor([1.0, 0.4, 0.0]).expand(8, -1))
    assert FixedSchedule(sigmas=[1.0]).sample(step(0), shift3).shape == (8, 2)


def test_inference_sigmas_are_those_that_diffusers_is_given():
    for nfe in range(1, 65):
        assert np.array_equal(uniform_sigmas(nfe).numpy(), np.linspace(1.0, 1 / nfe, nfe).astype(np.float32))
    torch.testing.assert_close(inference_sigmas(4, shift3), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    assert torch.equal(inference_sigmas(1, shift3), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomSchedule(FixedLength(), space="shifted"), "space"),
        (lambda: RandomSchedule(FixedLength(), sigma_min=0.0), "sigma_min"),
        (lambda: RandomSchedule(FixedLength(), sigma_min=0.9, sigma_max=0.5), "sigma_min"),
        (lambda: FixedSchedule(sigmas=(0.9, 0.5)), "must start at 1"),
        (lambda: FixedSchedule(sigmas=(1.0, 0.5, 0.5)), "strictly"),
        (lambda: FixedSchedule(sigmas=(1.0, 0.5, 0.0)), "above 0"),
        (lambda: FixedSchedule(sigmas=()), "sigmas"),
        (lambda: FixedSchedule(space="none"), "space"),
        (lambda: uniform_sigmas(0), "nfe"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
