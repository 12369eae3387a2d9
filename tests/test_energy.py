"""Energy distance: exact values, no bias, sensitivity."""

import math

import pytest
import torch

from cdm_lightning.metrics.energy import energy_distance


def normal(n: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_exact_values():
    a, b = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert energy_distance(a, b) == 2 * 2.5 - 5 - 0
    assert energy_distance(b + 7, b) == pytest.approx(2 * 7 * math.sqrt(2))


def test_two_normal_distributions_against_the_closed_form():
    # |N(d, 2)| has mean d erf(d / 2) + 2 exp(-d^2 / 4) / sqrt(pi); within each set d is 0
    d = 1.0
    expected = 2 * (d * math.erf(d / 2) + 2 * math.exp(-(d**2) / 4) / math.sqrt(math.pi)) - 4 / math.sqrt(math.pi)
    assert energy_distance(normal(3000, 0), normal(3000, 1, mean=d)).item() == pytest.approx(expected, rel=0.06)


def test_equal_distributions_give_zero_on_average():
    values = torch.stack([energy_distance(normal(50, 2 * seed), normal(50, 2 * seed + 1)) for seed in range(200)])
    assert values.min() < 0  # unbiased, hence of both signs
    assert abs(values.mean()) < 4 * values.std() / 200**0.5


def test_small_distances_in_large_sets_are_not_lost():
    a = 1000 + 1e-3 * normal(100, 0)
    assert energy_distance(a, a + 1e-3).item() == pytest.approx(energy_distance(a - 1000, a - 999.999).item(), rel=1e-6)


def test_a_single_point_is_refused():
    with pytest.raises(ValueError, match="2 points"):
        energy_distance(torch.zeros(1, 2), torch.zeros(5, 2))
