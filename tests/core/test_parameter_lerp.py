"""Merge and moving average: numbers, in place, and by name."""

import threading

import pytest
import torch
from torch import nn

from cdm_lightning.core.ema import HostFollower, lerp_parameters_, warmed_up_decay


def linear(weight: float, bias: float) -> nn.Linear:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, weight)
    nn.init.constant_(layer.bias, bias)
    return layer


def test_lerp_moves_every_parameter_in_place():
    target, source = linear(1.0, -1.0), linear(3.0, 0.0)
    pointers = [p.data_ptr() for p in target.parameters()]
    lerp_parameters_(target, source, 0.001)  # the merge of the fake score: F <- 0.999 F + 0.001 G
    torch.testing.assert_close(target.weight, torch.full((2, 2), 1.002))
    torch.testing.assert_close(target.bias, torch.full((2,), -0.999))
    assert [p.data_ptr() for p in target.parameters()] == pointers
    assert torch.equal(source.weight, torch.full((2, 2), 3.0))
    assert target.weight.requires_grad
    assert target.weight.grad_fn is None


def test_lerp_by_1_copies_and_by_0_keeps():
    target, source = linear(1.0, -1.0), linear(3.0, 0.25)
    lerp_parameters_(target, source, 0.0)
    assert torch.equal(target.weight, torch.ones(2, 2))
    lerp_parameters_(target, source, 1.0)
    assert torch.equal(target.bias, source.bias)


def test_averages_with_warm_up():
    assert [warmed_up_decay(step, 0.999) for step in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert warmed_up_decay(10**6, 0.999) == 0.999
    average, student, expected = linear(0.0, 0.0), linear(1.0, 1.0), 0.0
    for step in range(20):
        decay = warmed_up_decay(step, 0.999)
        lerp_parameters_(average, student, 1 - decay)
        expected = decay * expected + (1 - decay)
    torch.testing.assert_close(average.weight, torch.full((2, 2), expected))


def test_a_network_that_lacks_a_parameter_is_refused():
    with pytest.raises(ValueError, match="bias"):
        lerp_parameters_(nn.Linear(2, 2, bias=False), nn.Linear(2, 2), 0.5)


def test_what_the_target_alone_has_stays_as_it_is():
    target = linear(1.0, -1.0)
    lerp_parameters_(target, nn.Linear(2, 2, bias=False), 1.0)
    assert torch.equal(target.bias, torch.full((2,), -1.0))


def test_a_follower_on_the_host_computes_the_same_beside_the_main_thread():
    target, source, follower = linear(1.0, -1.0), linear(3.0, 0.25), HostFollower()
    expected = linear(1.0, -1.0)
    for number in range(3):
        lerp_parameters_(expected, source, 0.1 * (number + 1))
        follower.follow(target, source, 0.1 * (number + 1))
        follower.release()
        with torch.no_grad():
            source.weight.add_(1)  # the source goes on while the target follows
    follower.settle()
    assert all(map(torch.equal, target.parameters(), expected.parameters()))


def test_a_follower_settles_before_its_target_is_read():
    whole, source, follower = nn.Sequential(linear(1.0, -1.0)), linear(3.0, 0.25), HostFollower()
    target, moved = whole[0], threading.Event()
    follower.guard(target)
    move = follower._move
    follower._move = lambda *values: (moved.wait(5), move(*values))
    for read in (lambda: target(torch.ones(1, 2)), lambda: whole.state_dict()):
        moved.clear()
        before = target.weight.clone()
        follower.follow(target, source, 0.5)
        assert torch.equal(target.weight, before)
        threading.Timer(0.05, moved.set).start()
        read()
        assert torch.equal(target.weight, before.lerp(source.weight, 0.5))


def test_an_error_of_a_follower_is_raised_where_it_settles():
    source, follower = linear(3.0, 0.0), HostFollower()
    follower.follow(nn.Linear(3, 2), source, 0.5)
    with pytest.raises(RuntimeError, match="size"):
        follower.settle()
    follower.settle()  # it is told once
