"""Loss functions on tensors. A loss is a 0-d float32 tensor.

In the shapes, B is the number of samples, and * stands for the shape (C, H, W) of a sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def flow_matching_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error (0-d) between `velocity` (B, *) and its target, which is noise - x0."""
    return F.mse_loss(velocity.float(), noise.float() - x0.float())


def mean_abs_distance(a: Tensor, b: Tensor, floor: float) -> Tensor:
    """Return the mean of |a - b| for each of B samples, but at least `floor`: (B, 1, 1, 1).

    `a` and `b` are (B, *). The mean is taken over all elements of a sample.
    """
    dims = tuple(range(1, a.ndim))
    return (a.float() - b.float()).abs().mean(dim=dims, keepdim=True).clamp(min=floor)


def directed_loss(x0_student: Tensor, direction: Tensor, x0_teacher: Tensor, floor: float) -> Tensor:
    """Return a loss (0-d). A step of gradient descent on this loss moves x0_student (B, *) along `direction` (B, *).

    The loss is the mean squared error between x0_student and the target x0_student + direction / n. No gradient flows
    through the target. n is the `mean_abs_distance` of x0_teacher and x0_student, at least `floor`. All terms of CDM
    have this form (arXiv:2605.06376).

    The gradient with respect to x0_student is -2 (direction / n) / numel, where numel is the number of elements of
    x0_student. The gradient is 0 where direction / n is not finite.
    """
    x0_student = x0_student.float()
    with torch.no_grad():
        step = direction.float() / mean_abs_distance(x0_teacher, x0_student, floor)
        target = x0_student + step.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return F.mse_loss(x0_student, target)
