"""Flow algebra: exact values, round trips, and how calls are put together."""

import pytest
import torch
from closed_form import BatchField, Network, point_mass
from diffusers import FlowMatchEulerDiscreteScheduler

from cdm_lightning.core.flow import (
    FunctionField,
    GuidedField,
    denoise,
    evaluate_together,
    interpolate,
    move,
    per_sample,
    predict_x0,
)


def test_per_sample_shapes():
    assert per_sample(torch.ones(3), torch.ones(3, 4, 2, 2)).shape == (3, 1, 1, 1)
    assert per_sample(torch.tensor(0.5), torch.ones(3, 4, 2, 2)).ndim == 0


def test_interpolate_and_denoise_round_trip():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=generator, dtype=torch.float64)
    sigma = torch.rand(5, generator=generator, dtype=torch.float64)
    x, v = interpolate(x0, noise, sigma), noise - x0
    torch.testing.assert_close(denoise(x, v, sigma), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(move(x, v, sigma, torch.ones_like(sigma)), noise, rtol=0, atol=1e-14)
    other = torch.rand(5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(move(x, v, sigma, other), interpolate(x0, noise, other), rtol=0, atol=1e-14)
    assert torch.equal(interpolate(x0, noise, torch.zeros(5)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(5)), noise)


def test_move_is_the_euler_step_of_diffusers_bit_for_bit():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 8, 8, generator=generator)
    for n, timestep in enumerate(scheduler.timesteps):
        v = torch.randn(2, 4, 8, 8, generator=generator)
        theirs = scheduler.step(v, timestep, theirs).prev_sample
        ours = move(ours, v, scheduler.sigmas[n].expand(2), scheduler.sigmas[n + 1].expand(2))
        assert torch.equal(ours, theirs)


def test_predict_x0_is_exact_on_a_point_mass_and_float32():
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.7, 0.3, 0.1])
    torch.testing.assert_close(predict_x0(point_mass(1.5, 4), x, sigma), torch.full_like(x, 1.5))
    half = FunctionField(lambda x, sigma: x.bfloat16())
    assert predict_x0(half, x, sigma).dtype == torch.float32


def test_guided_field_extrapolates_in_one_call_with_the_unconditional_half_first():
    network = Network(lambda x, sigma: 0 * x)
    guided = GuidedField(BatchField(network, torch.full((3,), 2.0)), BatchField(network, torch.full((3,), 1.0)), 4.5)
    x, sigma = torch.zeros(3, 2, 1, 1), torch.ones(3)
    torch.testing.assert_close(predict_x0(guided, x, sigma), torch.full_like(x, 1 + 4.5 * (2 - 1)))
    assert network.batches == [6]
    assert network.calls[0].offset.tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_guidance_scale_1_calls_the_conditional_half_only():
    network = Network(lambda x, sigma: 0 * x)
    guided = GuidedField(BatchField(network, torch.ones(3)), BatchField(network, torch.zeros(3)), 1.0)
    assert torch.equal(
        guided(torch.zeros(3, 1, 1, 1), torch.ones(3)), guided.cond(torch.zeros(3, 1, 1, 1), torch.ones(3))
    )
    assert network.batches == [3, 3]


def test_guided_field_selects_rows_of_both_halves():
    network = Network(lambda x, sigma: 0 * x)
    guided = GuidedField(BatchField(network, torch.arange(4.0)), BatchField(network, torch.arange(4.0) * 10), 2.0)
    x, sigma, rows = torch.zeros(4, 1, 1, 1), torch.ones(4), torch.tensor([3, 1])
    assert torch.equal(guided.select(rows)(x[rows], sigma[rows]), guided(x, sigma)[rows])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_evaluate_together_groups_by_network_and_keeps_order(order):
    one, two = Network(lambda x, sigma: 0 * x), Network(lambda x, sigma: 1 + 0 * x)
    fields = [BatchField(one, torch.zeros(2)), BatchField(two, torch.ones(3)), BatchField(one, torch.ones(4)),
              FunctionField(lambda x, sigma: x)]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    calls = [
        (fields[i], torch.randn(n, 2, 1, 1, generator=generator), torch.rand(n, generator=generator) + 0.1)
        for i, n in enumerate((2, 3, 4, 5))
    ]
    expected = [field(x, sigma) for field, x, sigma in calls]
    one.calls.clear(), two.calls.clear()
    results = evaluate_together([calls[i] for i in order])
    for i, result in zip(order, results):
        torch.testing.assert_close(result, expected[i])
    assert one.batches == [6]
    assert two.batches == [3]


def test_evaluate_together_of_nothing():
    assert evaluate_together([]) == []


def test_function_fields_join_only_on_the_same_function():
    double = FunctionField(lambda x, sigma: 2 * x)
    assert double.join([FunctionField(double.function)]) is double
    assert double.join([FunctionField(lambda x, sigma: 2 * x)]) is None
    assert double.select(torch.tensor([0])) is double
