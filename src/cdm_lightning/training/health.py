"""Figures of the health of a run: how far the fake score is from the teacher, and the student's images from the teacher's.

All figures are 0-d tensors on the device of their inputs, so that measuring does not wait for a GPU. Shapes: B samples of
shape * = (C, H, W).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_lightning.core.flow import VelocityField, evaluate_together, interpolate
from cdm_lightning.metrics.colour import ColourStatistics

COLOURS = ("brightness", "saturation", "contrast")
SAMPLED = 1024  # weights of each parameter whose change is measured
NONE = 1e-6  # a colour statistic of at most this is as good as 0
TINY = 1e-12  # keeps ratios of zeros finite


def rms(values: Tensor) -> Tensor:
    """Return the root mean square of all values: 0-d, float32."""
    return values.float().square().mean().sqrt()


def compared(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Return the gap, the cosine and the magnitude ratio of the fake score's velocities against the teacher's, both (B, *).

    gap = rms(real - fake) / rms(real). cosine is the mean over the samples. magnitude = rms(fake) / rms(real).
    """
    real, fake = real.float(), fake.float()
    size = rms(real).clamp(min=TINY)
    cosine = F.cosine_similarity(real.flatten(1), fake.flatten(1)).mean()
    return {"gap": rms(real - fake) / size, "cosine": cosine, "magnitude": rms(fake) / size}


def score_figures(
    teacher: VelocityField, score: VelocityField, samples: dict[str, Tensor], noise: Tensor, sigma: Tensor
) -> dict[str, Tensor]:
    """Return gap, cosine, magnitude and the error of the fake score, for each kind of samples: {"gap_KIND": ...}.

    `samples` maps a kind, such as "fresh", to clean samples (B, *). All kinds get the same `noise` (B, *) and `sigma`
    (B,). The error is rms(v_fake - (noise - x0)), which the fake score's own loss lowers. Fields that can be joined are
    called once for all kinds.
    """
    noised = [interpolate(x0, noise, sigma) for x0 in samples.values()]
    real = evaluate_together([(teacher, x, sigma) for x in noised])
    fake = evaluate_together([(score, x, sigma) for x in noised])
    figures = {}
    for (kind, x0), v_real, v_fake in zip(samples.items(), real, fake):
        found = compared(v_real, v_fake) | {"error": rms(v_fake.float() - (noise - x0))}
        figures |= {f"{name}_{kind}": value for name, value in found.items()}
    return figures


def image_figures(x0: Tensor, images: Tensor, per_prompt: int, colour: ColourStatistics) -> dict[str, Tensor]:
    """Return the colour statistics of images (B, 3, H, W), and mean, spread and diversity of their latents x0 (B, *).

    The samples of one prompt lie beside each other, `per_prompt` of each. diversity is the root mean square distance of
    samples of the same prompt from their mean. patch_grid is left out for images that are not larger than a patch.
    """
    means = colour(images).mean(0)
    figures = dict(zip(COLOURS, means[:3]))
    if max(images.shape[-2:]) > colour.patch:
        figures["patch_grid"] = means[3] / means[4].clamp(min=TINY)
    by_prompt = x0.float().unflatten(0, (-1, per_prompt))
    spread = rms(by_prompt - by_prompt.mean(1, keepdim=True))
    return {**figures, "x0_mean": x0.float().mean(), "x0_std": x0.float().std(), "diversity": spread}


def against(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's figures divided by the teacher's. x0_mean is their difference in standard deviations instead.

    A ratio is 1 if both figures are 0, such as the saturation of grey images.
    """
    ratios = {name: _ratio(value, teacher[name]) for name, value in student.items() if name != "x0_mean"}
    shift = (student["x0_mean"] - teacher["x0_mean"]) / teacher["x0_std"].clamp(min=TINY)
    return {**ratios, "x0_mean": shift}


def _ratio(value: Tensor, other: Tensor) -> Tensor:
    both_none = (value.abs() <= NONE) & (other.abs() <= NONE)
    return torch.where(both_none, torch.ones_like(value), value / other.clamp(min=TINY))


def some_weights(network: nn.Module) -> list[Tensor]:
    """Return a copy of the first 1024 weights of each trained parameter; of a sharded one, those of this process."""
    weights = [parameter.detach() for parameter in network.parameters() if parameter.requires_grad]
    local: Sequence[Tensor] = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in weights]
    return [weight.flatten()[:SAMPLED].float().clone() for weight in local]


def squares(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the sums of squares of the weights' change and of the weights before: {"change": ..., "weights": ...}."""
    change = torch.stack([(new - old).square().sum() for old, new in zip(before, after, strict=True)]).sum()
    return {"change": change, "weights": torch.stack([old.square().sum() for old in before]).sum()}
