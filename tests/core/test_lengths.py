"""Length distributions: histograms against the probabilities that their definitions give."""

import math

import pytest
import torch

from cdm_lightning.core.lengths import (
    CategoricalLength,
    FixedLength,
    GeometricLength,
    LogUniformLength,
    UniformLength,
)
from cdm_lightning.core.rng import stream

DRAWS = 4000


def normalised(weights: dict[int, float]) -> dict[int, float]:
    return {k: weight / sum(weights.values()) for k, weight in weights.items()}


CASES = {
    "uniform": (UniformLength(), dict.fromkeys(range(1, 29), 1 / 28)),
    "uniform-range": (UniformLength(low=3, high=5), dict.fromkeys(range(3, 6), 1 / 3)),
    "fixed": (FixedLength(), {4: 1.0}),
    "geometric": (GeometricLength(), normalised({k: 0.85**k for k in range(1, 29)})),
    "geometric-growing": (GeometricLength(ratio=2.0, high=3), {1: 1 / 7, 2: 2 / 7, 3: 4 / 7}),
    "log-uniform": (LogUniformLength(), {k: math.log((k + 1) / k) / math.log(29) for k in range(1, 29)}),
    "categorical": (CategoricalLength(lengths=[2, 4, 8], weights=[1, 0, 3]), {2: 0.25, 8: 0.75}),
    "categorical-equal": (CategoricalLength(lengths=(1, 9)), {1: 0.5, 9: 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_histogram(name):
    distribution, expected = CASES[name]
    draws = [distribution.sample(stream(0, name, n)) for n in range(DRAWS)]
    assert all(type(draw) is int for draw in draws)
    assert set(draws) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    chi_square = sum((draws.count(k) - DRAWS * p) ** 2 / (DRAWS * p) for k, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_one_generator_gives_a_sequence():
    generator = torch.Generator().manual_seed(0)
    assert len({UniformLength().sample(generator) for _ in range(50)}) > 15


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformLength(low=0),
        lambda: UniformLength(low=5, high=4),
        lambda: FixedLength(0),
        lambda: GeometricLength(ratio=0),
        lambda: GeometricLength(high=0),
        lambda: LogUniformLength(low=0),
        lambda: CategoricalLength(lengths=()),
        lambda: CategoricalLength(lengths=(0, 1)),
        lambda: CategoricalLength(lengths=(1, 2), weights=(1,)),
        lambda: CategoricalLength(lengths=(1, 2), weights=(1, -1)),
        lambda: CategoricalLength(lengths=(1, 2), weights=(0, 0)),
    ],
)
def test_no_distribution_over_whole_steps_is_refused(make):
    with pytest.raises(ValueError, match=r"low=|ratio=|length"):
        make()
