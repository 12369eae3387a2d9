"""The ladder: teacher and student at several numbers of steps, on the same prompts and noise, measured side by side.

Shapes: images (N, 3, H, W) in [0, 1], features (N, D). Images are generated once, in batches, and measured by all
metrics before the next batch: nothing but features and the few images of the picture is kept.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.console import Progress
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation import SamplerSpec, device_of, generate
from cdm_lightning.metrics.diversity import pairwise_diversity
from cdm_lightning.metrics.frechet import FeatureStatistics, FrechetDistance, extract

REAL = "real images"
STEPS = (
    SamplerSpec("teacher 50 steps", "teacher", 50),
    SamplerSpec("teacher 50 steps, guidance 1.5", "teacher", 50, 1.5),
    SamplerSpec("teacher 50 steps, guidance 2", "teacher", 50, 2.0),
    SamplerSpec("teacher 4 steps", "teacher", 4),
    SamplerSpec("teacher 4 steps, guidance 1.5", "teacher", 4, 1.5),
    SamplerSpec("teacher 4 steps, guidance 2", "teacher", 4, 2.0),
    SamplerSpec("student 1 step", "student", 1),
    SamplerSpec("student 2 steps", "student", 2),
    SamplerSpec("student 4 steps", "student", 4),
    SamplerSpec("student 8 steps", "student", 8),
)
MakeImages = Callable[[Sequence[str], Sequence[int], int], Tensor]  # (prompts, indices, seed) -> (B, 3, H, W)


class ImageTextScorer(Protocol):
    """Anything that says how well images fit their prompts; `metrics.clip_score.CLIPScorer` is one."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W)."""


class AdherenceJudge(Protocol):
    """Anything that says whether an image shows what its prompt asks for; `metrics.shapes_classifier` has one."""

    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) bool for images (B, 3, H, W)."""


@dataclass(frozen=True)
class LadderRow:
    """The figures of one sampler; None where a figure was not asked for or does not apply."""

    sampler: str
    frechet_real: float
    frechet_teacher: float | None
    clip_score: float | None
    adherence: float | None
    diversity: float | None
    network_calls: int
    seconds_per_image: float | None  # decoding included, text encoding too unless it is remembered


@dataclass(frozen=True)
class LadderResult:
    """All rows, the images of the first prompts by sampler (P, 3, H, W), those prompts, and what was asked for.

    `measured` is what another run of the same evaluation can take over as `known`.
    """

    rows: list[LadderRow]
    images: dict[str, Tensor]
    prompts: list[str]
    settings: dict
    measured: dict[str, "Measured"]


@dataclass
class Measured:
    """What is kept of one sampler's images."""

    features: Tensor  # (N, D)
    clip_score: float | None
    adherence: float | None
    diversity: float | None
    seconds: float
    shown: Tensor  # (P, 3, H, W)


@dataclass(frozen=True)
class LadderEvaluation:
    """What to measure, and on what.

    The first `count` of `prompts` are used. `reference` gives the real images in batches. `teacher_reference` names the
    sampler whose images are the second reference of the Fréchet distance. Image k of a prompt starts from the noise of
    (`seed` + k, prompt index); k > 0 only for the diversity, of the first `diversity_prompts` prompts. `real_images`
    adds a row of real images of the same prompts: what a perfect sampler would get.
    Raises `UserError` for settings that contradict each other.
    """

    prompts: Sequence[str]
    reference: Iterable[Tensor]
    extractor: nn.Module
    scorer: ImageTextScorer | None = None
    judge: AdherenceJudge | None = None
    samplers: Sequence[SamplerSpec] = STEPS
    teacher_reference: str = "teacher 50 steps, guidance 1.5"
    real_images: MakeImages | None = None
    count: int = 512
    batch_size: int = 64
    seed: int = 0
    diversity_prompts: int = 32
    images_per_prompt: int = 4
    shown: int = 8

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.samplers]
        if len(set(names)) < len(names):
            raise UserError(f"evaluation: two samplers have the same name among {', '.join(names)}")
        if self.teacher_reference not in names:
            raise UserError(f"evaluation: teacher_reference {self.teacher_reference!r} is none of {', '.join(names)}")
        if self.count < 2 or self.batch_size < 1 or self.diversity_prompts > self.count:
            raise UserError("evaluation: needs count >= 2, batch_size >= 1 and diversity_prompts <= count")
        if self.diversity_prompts and self.images_per_prompt < 2:
            raise UserError("evaluation: diversity needs images_per_prompt >= 2, or set diversity_prompts to 0")
        if len(self.prompts) < self.count:
            raise UserError(f"evaluation: {self.count} prompts are asked for, the file has {len(self.prompts)}")

    def run(
        self,
        backbone: Backbone,
        networks: Mapping[str, nn.Module],
        compute_dtype: torch.dtype = torch.float32,
        silent: bool = False,
        known: Mapping[str, Measured] | None = None,
    ) -> LadderResult:
        """Measure all samplers with `networks` {"student", "teacher"}, on the device where they and `backbone` are.

        Samplers in `known` (the teacher's, from an earlier run of this very evaluation) are not run again.
        """
        for part in (self.extractor, self.scorer, self.judge):
            if isinstance(part, nn.Module):
                part.to(device_of(next(iter(networks.values()))))
        progress = Progress("measuring real images", self._total_calls, silent=silent)
        real = FeatureStatistics.of_images(self.extractor, self.reference)
        measured = {}
        if self.real_images is not None:
            measured[REAL] = self._measure(self.real_images, 0, progress)
        for spec in self.samplers:
            if known and spec.name in known:
                measured[spec.name] = known[spec.name]
                progress.advance(spec.network_calls * self._images)
                continue
            progress.describe(f"evaluating {spec.name}")

            def make(prompts: Sequence[str], indices: Sequence[int], seed: int, spec: SamplerSpec = spec) -> Tensor:
                network = networks[spec.network]
                return generate(backbone, network, spec, prompts, indices, seed, self.batch_size, compute_dtype)

            measured[spec.name] = self._measure(make, spec.network_calls, progress)
        progress.close()
        return LadderResult(
            rows=self._rows(measured, real),
            images={name: one.shown for name, one in measured.items()},
            prompts=self._prompts[: self.shown],
            settings=self._settings(real, backbone),
            measured=measured,
        )

    @cached_property
    def _prompts(self) -> list[str]:
        return [self.prompts[i] for i in range(self.count)]

    @property
    def _images(self) -> int:
        return self.count + self.diversity_prompts * (self.images_per_prompt - 1)

    @property
    def _total_calls(self) -> int:
        return self._images * sum(spec.network_calls for spec in self.samplers)

    def _measure(self, make: MakeImages, calls: int, progress: Progress) -> Measured:
        """Generate and measure one sampler's images batch by batch."""
        make(self._prompts[:1], [0], self.seed)  # not timed: whatever is set up at a first call
        features, scores, fits, shown, seconds = [], [], [], [], 0.0
        for start in range(0, self.count, self.batch_size):
            prompts = self._prompts[start : start + self.batch_size]
            began = time.perf_counter()
            images = make(prompts, range(start, start + len(prompts)), self.seed)
            seconds += time.perf_counter() - began
            features.append(extract(self.extractor, images).cpu())
            if self.scorer is not None:
                scores.append(self.scorer.score(images, prompts).cpu())
            if self.judge is not None:
                fits.append(self.judge.adherence(images, prompts).float().cpu())
            shown.append(images[: max(0, self.shown - start)])
            progress.advance(len(prompts) * calls)
        features = torch.cat(features)
        return Measured(
            features=features,
            clip_score=float(torch.cat(scores).mean()) if scores else None,
            adherence=float(torch.cat(fits).mean()) if fits else None,
            diversity=self._diversity(make, features, calls, progress),
            seconds=seconds,
            shown=torch.cat(shown),
        )

    def _diversity(self, make: MakeImages, first: Tensor, calls: int, progress: Progress) -> float | None:
        """Diversity from the features (N, D) of image 0 of each prompt and of further images made for it."""
        if not self.diversity_prompts:
            return None
        copies = [first[: self.diversity_prompts]]
        for copy in range(1, self.images_per_prompt):
            prompts = self._prompts[: self.diversity_prompts]
            images = make(prompts, range(len(prompts)), self.seed + copy)
            copies.append(extract(self.extractor, images).cpu())
            progress.advance(len(prompts) * calls)
        return pairwise_diversity(torch.stack(copies, dim=1))

    def _rows(self, measured: Mapping[str, Measured], real: FeatureStatistics) -> list[LadderRow]:
        teacher = FeatureStatistics.of_features([measured[self.teacher_reference].features])
        calls = {spec.name: spec.network_calls for spec in self.samplers}
        return [
            LadderRow(
                sampler=name,
                frechet_real=_distance(real, one.features),
                frechet_teacher=None if name == self.teacher_reference else _distance(teacher, one.features),
                clip_score=one.clip_score,
                adherence=one.adherence,
                diversity=one.diversity,
                network_calls=calls.get(name, 0),
                seconds_per_image=one.seconds / self.count if name in calls else None,
            )
            for name, one in measured.items()
        ]

    def _settings(self, real: FeatureStatistics, backbone: Backbone) -> dict:
        names = ("count", "batch_size", "seed", "teacher_reference", "diversity_prompts", "images_per_prompt")
        facts = {"reference_images": real.count, "backbone": backbone.fingerprint, "threads": torch.get_num_threads()}
        return {**{name: getattr(self, name) for name in names}, **facts}


def _distance(reference: FeatureStatistics, features: Tensor) -> float:
    distance = FrechetDistance(reference, sync=False)
    distance.update(features)
    return distance.compute()
