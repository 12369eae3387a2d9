"""Sigma levels of training (ranges, atoms, caps, spaces) and weight ramps."""

import pytest
import torch

from cdm_lightning.core.levels import CappedUniformLevels, LogitNormalLevels, UniformLevels
from cdm_lightning.core.ramps import LinearRamp, weight_at
from cdm_lightning.core.rng import StepRandom

N = 8000
RNG = StepRandom(0, 0, range(N), "cpu")
CEILING = torch.full((N,), 0.5)


def identity(sigmas):
    return sigmas


def shift3(sigmas):
    return 3 * sigmas / (1 + 2 * sigmas)


def test_uniform_levels_clamp_and_do_not_rescale():
    sigma = UniformLevels().sample(RNG, "a", CEILING, shift3)
    assert sigma.shape == (N,)
    assert abs((sigma == 0.02).float().mean() - 0.02) < 0.007  # 2 % of the draws on each end
    assert abs((sigma == 0.98).float().mean() - 0.02) < 0.007
    counts = torch.histc(sigma, 12, 0.02, 0.98) / N
    assert (counts[1:-1] - 0.08).abs().max() < 0.015  # a rescaled draw would have 0.0833 in all twelve
    assert torch.equal(sigma, RNG.uniform("a").clamp(0.02, 0.98))


def test_uniform_levels_shift_before_the_clamp():
    sigma = UniformLevels(space="before_shift").sample(RNG, "a", CEILING, shift3)
    assert torch.equal(sigma, shift3(RNG.uniform("a")).clamp(0.02, 0.98))


def test_capped_levels_stay_under_the_ceiling_of_each_sample():
    ceiling = torch.linspace(0.05, 1.0, N)
    sigma = CappedUniformLevels().sample(RNG, "a", ceiling, shift3)
    assert torch.equal(sigma, (RNG.uniform("a") * ceiling).clamp(0.02, 0.98))
    assert (sigma <= ceiling).all()
    share = (sigma / ceiling)[ceiling > 0.5]
    assert abs(share.mean() - 0.5) < 0.02
    assert CappedUniformLevels().sample(RNG, "a", torch.full((N,), 0.01), identity).eq(0.02).all()  # clamped up


def test_logit_normal_levels():
    sigma = LogitNormalLevels(mean=0.4, std=0.5).sample(RNG, "a", CEILING, shift3)
    logits = sigma.logit()
    assert abs(logits.mean() - 0.4) < 0.02
    assert abs(logits.std() - 0.5) < 0.02
    shifted = LogitNormalLevels(mean=0.4, std=0.5, space="before_shift").sample(RNG, "a", CEILING, shift3)
    torch.testing.assert_close(shifted, shift3(sigma))
    wide = LogitNormalLevels(std=9.0).sample(RNG, "a", CEILING, shift3)
    assert wide.min() == torch.tensor(0.02)
    assert wide.max() == torch.tensor(0.98)


@pytest.mark.parametrize("levels", [UniformLevels(), CappedUniformLevels(), LogitNormalLevels()])
def test_purposes_have_their_own_draws(levels):
    one, two = (levels.sample(RNG, purpose, CEILING, identity) for purpose in "ab")
    assert (one == two).float().mean() < 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformLevels(low=0.0), "low"),
        (lambda: UniformLevels(low=0.6, high=0.5), "low"),
        (lambda: UniformLevels(space="shifted"), "space"),
        (lambda: CappedUniformLevels(high=1.0), "high"),
        (lambda: LogitNormalLevels(std=0.0), "std"),
        (lambda: LinearRamp(1.0, over=0), "over"),
        (lambda: LinearRamp(1.0, over=5, start=-1), "start"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_linear_ramp():
    ramp = LinearRamp(value=2.0, over=4, start=10)
    assert [weight_at(ramp, n) for n in (0, 9, 10, 11, 12, 13, 14, 10**6)] == [0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert weight_at(LinearRamp(2.0, over=4), 0) == 0.5
    assert weight_at(0.3, 10**6) == 0.3
