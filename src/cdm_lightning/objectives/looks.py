"""The inputs and outputs of teacher and fake score in each loss term of distribution matching.

Shapes: B samples of shape * = (C, H, W).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_lightning.core.flow import VelocityField, denoise, evaluate_together


@dataclass(frozen=True)
class Look:
    """The inputs of one loss term: the student's prediction, and the noised sample that teacher and fake score receive."""

    x0: Tensor  # (B, *), the student's prediction, with gradient
    seen: Tensor  # (B,), the sigma at which the student made the prediction
    x: Tensor  # (B, *), the prediction, noised again
    sigma: Tensor  # (B,), the sigma of x


@dataclass(frozen=True)
class Judged:
    """The outputs of teacher and fake score for the loss terms, and 0-d figures to log.

    All fields but `figures` map the name of a loss term to a tensor (B, *): an x0 prediction or a direction.
    """

    teacher: dict[str, Tensor]
    without_text: dict[str, Tensor]  # the teacher's x0 without text, for CA and other terms with guidance
    directions: dict[str, Tensor]  # T(c) - F(c), for all terms but CA
    figures: dict[str, Tensor]


def predict_together(calls: Sequence[tuple[VelocityField, Look]]) -> list[Tensor]:
    """Return an x0 prediction (B, *), in float32, for each pair in `calls`.

    A pair is a velocity field and a `Look`; the field is evaluated at the noised sample of the `Look`. Fields that can
    be evaluated in one batch share a network call.
    """
    velocities = evaluate_together([(velocity_field, look.x, look.sigma) for velocity_field, look in calls])
    return [denoise(look.x, v.float(), look.sigma) for v, (_, look) in zip(velocities, calls)]


@torch.no_grad()
def health(deltas: dict[str, Tensor], x0: Tensor | None) -> dict[str, Tensor]:
    """Return 0-d figures to log, by name, which show a failing run earlier than its losses or images do.

    `deltas` holds the direction (B, *) of each loss term by name. `x0` (B, *) is the student's prediction; if it is
    None, its mean and standard deviation are left out.
    """
    logs = {f"{term}_delta_rms": delta.square().mean().sqrt() for term, delta in deltas.items()}
    if "ca" in deltas and "dm" in deltas:
        logs["ca_dm_cosine"] = F.cosine_similarity(deltas["ca"].flatten(1), deltas["dm"].flatten(1)).mean()
    if x0 is not None:
        logs |= {"x0_mean": x0.mean(), "x0_std": x0.std()}
    logs["nonfinite_deltas"] = cast(Tensor, sum((~delta.isfinite()).sum() for delta in deltas.values())).float()
    return logs
