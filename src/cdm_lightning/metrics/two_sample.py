"""The classifier two-sample test (Lopez-Paz and Oquab, arXiv:1610.06545). Shapes: features (N, D).

A classifier learns to tell a sampler's images from those of a reference. If it is right no more often than by chance on images
that it has not seen, it cannot tell them apart.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cdm_lightning.core.rng import stream
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import FeatureName, Name, Positive, Seed, Several
from cdm_lightning.metrics.against import AgainstReference, are_finite
from cdm_lightning.metrics.base import MeasuredImages

NORMAL_95 = 1.959964  # the 97.5 % quantile of the normal distribution


def fit(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression, and return its weights (D,) and its bias (0-d).

    It minimises the mean cross entropy plus `penalty` / 2 times the squared length of the weights, by L-BFGS.
    `features` (N, D) are float64 and `labels` (N,) are 0 or 1.
    """
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits = features @ weights + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        value = value + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    return weights.detach(), bias.detach()


def correct_by_folds(own: Tensor, reference: Tensor, folds: int, penalty: float, order: Tensor) -> int:
    """Return how many of the 2 N features are told apart correctly by classifiers that were fitted without them.

    `own` and `reference` are (N, D). `order` (N,) is a permutation: its entries number i, i + `folds`, ... are part i. The
    classifier of a part is fitted on all others. Rows of the same number are in the same part, because they
    may belong to the same prompt.
    """
    correct = 0
    for fold in range(folds):
        tested = torch.zeros(len(own)).bool()
        tested[order[fold::folds]] = True
        learned = torch.cat([own[~tested], reference[~tested]])
        labels = torch.cat([torch.ones(len(learned) // 2), torch.zeros(len(learned) // 2)]).double()
        mean, spread = learned.mean(0), learned.std(0).clamp(min=1e-12)
        weights, bias = fit((learned - mean) / spread, labels, penalty)
        seen = [((one[tested] - mean) / spread) @ weights + bias for one in (own, reference)]
        correct += int((seen[0] > 0).sum() + (seen[1] <= 0).sum())
    return correct


def p_value(correct: int, count: int) -> float:
    """Return the probability that at least `correct` of `count` guesses by chance are right (the binomial test)."""
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(correct, count + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which `correct` of `count` were found (Wilson, 1927)."""
    share, square = correct / count, NORMAL_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return middle - half, middle + half


class TwoSampleTest(AgainstReference):
    """How well a logistic regression tells a sampler's images from a reference, on images that it has not seen.

    The figures are "accuracy", "low" and "high" (the ends of its 95 % interval) and "p_value", the probability of such
    an accuracy if the images cannot be told apart. An accuracy of 0.5 means that they cannot; 1 means that they can
    always. The images are divided into `folds` parts, and each part is judged by a classifier that was fitted on the
    others, with the `penalty` of `fit`. Images of the same prompt are in the same part. `seed` determines the
    parts, and which images of the larger set are used. The interval and the p-value take the judgements as independent.
    They are not quite, because the classifiers share most of their images. The other arguments are those of
    `AgainstReference`.
    """

    figures_without_interval = ("accuracy", "low", "high", "p_value")
    no_interval = "repeated images would be learned and judged; low and high are its own interval"

    def __init__(
        self,
        reference: Iterable[Tensor] | None = None,
        sampler: Name | None = None,
        feature: FeatureName = "clip",
        folds: Several = 5,
        penalty: Positive = 0.01,
        seed: Seed = 0,
    ) -> None:
        super().__init__(reference, sampler, feature)
        if folds > 100:
            raise UserError(f"the metric TwoSampleTest: folds={folds} must be at most 100")
        self.folds, self.penalty, self.seed, self.least_images = folds, penalty, seed, 2 * folds

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> dict[str, float] | None:
        """Return the figures, or None if there is no reference (see `AgainstReference.pair`)."""
        found = self.pair(measured, others)
        if found is None or not are_finite(*found):
            return None if found is None else {"accuracy": float("nan")}
        size, rng = min(map(len, found)), stream(self.seed, "images of the two-sample test")
        own, reference = (
            one if len(one) == size else one[torch.randperm(len(one), generator=rng)[:size]] for one in found
        )
        order = torch.randperm(size, generator=stream(self.seed, "parts of the two-sample test"))
        correct = correct_by_folds(own, reference, self.folds, self.penalty, order)
        low, high = wilson(correct, 2 * size)
        return {"accuracy": correct / (2 * size), "low": low, "high": high, "p_value": p_value(correct, 2 * size)}

    def caution(self, measured: MeasuredImages) -> str | None:
        """Return a warning if `measured` has fewer images than features, otherwise None."""
        count, width = measured.features[self.feature].shape
        if count > width or self.too_few(count):
            return self.too_few(count)
        return f"{count} images are few for {width} features: an accuracy near 0.5 may only mean that the classifier learned little"
