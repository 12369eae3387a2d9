"""Loss functions on tensors. A loss is a 0-d float32 tensor. Shapes: B samples of shape * = (C, H, W)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def flow_matching_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error (0-d) between a velocity (B, *) and its target noise - x0."""
    return F.mse_loss(velocity.float(), noise.float() - x0.float())


def mean_abs_distance(a: Tensor, b: Tensor, floor: float) -> Tensor:
    """Return the mean of |a - b| over each sample of a and b (B, *), or `floor` if that is larger: (B, 1, 1, 1)."""
    dims = tuple(range(1, a.ndim))
    return (a.float() - b.float()).abs().mean(dim=dims, keepdim=True).clamp(min=floor)


def directed_loss(x0_student: Tensor, direction: Tensor, x0_teacher: Tensor, floor: float) -> Tensor:
    """Return a loss (0-d); a step of gradient descent on it moves x0_student (B, *) along `direction` (B, *).

    The loss is the mean squared error between x0_student and the constant target x0_student + direction / n, where n is the
    `mean_abs_distance` of x0_teacher and x0_student. All terms of CDM have this form (arXiv:2605.06376). The gradient with
    respect to x0_student is -2 (direction / n) / numel; elements where direction / n is not finite have gradient 0.
    """
    x0_student = x0_student.float()
    with torch.no_grad():
        step = direction.float() / mean_abs_distance(x0_teacher, x0_student, floor)
        target = x0_student + step.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return F.mse_loss(x0_student, target)
