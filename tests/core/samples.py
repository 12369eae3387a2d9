"""Samples for losses without a module: networks, a point and random draws as an objective gets them."""

from collections.abc import Iterable

from torch import Tensor

from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.core.schedules import Shift
from cdm_lightning.objectives.base import RolledOutSample, TermLosses, VelocityFields


def unshifted(sigmas: Tensor) -> Tensor:
    """No shift."""
    return sigmas


def sample_of(
    fields: VelocityFields,
    point: TrajectoryPoint,
    rng: StepRandom,
    shift: Shift = unshifted,
    iteration: int = 0,
) -> RolledOutSample:
    """The sample of an iteration with these networks, point and draws."""
    return RolledOutSample(
        prompts=["a prompt"] * len(rng),
        fields=fields,
        rng=rng,
        shift=shift,
        shift_steps=shift,
        latent_shape=tuple(point.x.shape[1:]),
        iteration=iteration,
        point=point,
    )


def summed(losses: Iterable[TermLosses]) -> TermLosses:
    """All of them as one loss, for one backward pass; figures of the same name are added."""
    total, terms, logs = 0.0, {}, {}
    for loss in losses:
        total = total + loss.total
        terms |= loss.terms
        logs |= {name: logs.get(name, 0.0) + value for name, value in loss.logs.items()}
    return TermLosses(total, terms, logs)
