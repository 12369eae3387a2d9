"""Losses: exact values, and the gradient -2 (delta / n) / numel."""

import torch

from cdm_lightning.core.losses import directed_loss, flow_matching_loss, mean_abs_distance


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_flow_matching_loss():
    x0, noise = torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), 4.0)
    assert flow_matching_loss(torch.full_like(x0, 3.0), x0, noise) == 0
    assert flow_matching_loss(torch.full_like(x0, 1.0), x0, noise) == 4
    assert flow_matching_loss(x0.bfloat16(), x0, noise).dtype == torch.float32


def test_mean_abs_distance_is_per_sample_with_a_floor():
    a = torch.tensor([1.0, -2.0, 0.01]).view(3, 1, 1, 1).expand(3, 4, 2, 2)
    distance = mean_abs_distance(a, torch.zeros(3, 4, 2, 2), 0.1)
    torch.testing.assert_close(distance, torch.tensor([1.0, 2.0, 0.1]).view(3, 1, 1, 1))


def test_directed_loss_value():
    student, teacher = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0)
    assert directed_loss(student, torch.full_like(student, 3.0), teacher, 0.1) == (3 / 2) ** 2
    assert directed_loss(student, torch.full_like(student, 3.0), student, 0.1) == torch.tensor((3 / 0.1) ** 2)


def test_directed_loss_gradient_follows_the_formula():
    student, direction, teacher = (randn(3, 4, 5, 5, seed=seed, dtype=torch.float32) for seed in range(3))
    student.requires_grad_(True)
    directed_loss(student, direction, teacher, 0.1).backward()
    n = (teacher - student.detach()).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = -2 * (direction / n) / student.numel()
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-8)


def test_no_gradient_reaches_direction_or_teacher():
    student, direction, teacher = (randn(2, 1, 3, 3, seed=seed).requires_grad_(True) for seed in range(3))
    directed_loss(student, direction, teacher, 0.1).backward()
    assert direction.grad is None
    assert teacher.grad is None


def test_non_finite_directions_count_as_none():
    student, teacher = randn(2, 1, 2, 2).requires_grad_(True), randn(2, 1, 2, 2, seed=1)
    direction = torch.ones(2, 1, 2, 2)
    direction[0, 0, 0] = torch.tensor([float("nan"), float("inf")])
    directed_loss(student, direction, teacher, 0.1).backward()
    assert torch.equal(student.grad[0, 0, 0], torch.zeros(2))
    assert (student.grad[0, 0, 1] < 0).all()
    teacher[1] = float("nan")  # then n and with it the whole sample's step are unknown
    student.grad = None
    directed_loss(student, direction, teacher, 0.1).backward()
    assert torch.equal(student.grad[1], torch.zeros(1, 2, 2))


def test_half_precision_inputs_are_computed_in_float32():
    student, direction, teacher = (randn(2, 1, 4, 4, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    half = directed_loss(student, direction, teacher, 0.1)
    assert half.dtype == torch.float32
    assert torch.equal(half, directed_loss(student.float(), direction.float(), teacher.float(), 0.1))
