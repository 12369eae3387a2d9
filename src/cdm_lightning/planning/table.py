"""The plan of a run, which can be turned into text and into JSON."""

from dataclasses import dataclass

from cdm_lightning.planning.advice import Remedy
from cdm_lightning.planning.layout import GPUs, Layout
from cdm_lightning.planning.live import Timeline
from cdm_lightning.planning.memory import (
    TEXT,
    VALIDATION,
    Sizes,
    checkpoint_bytes,
    gathered,
    phase_peaks,
    resting,
    total,
)
from cdm_lightning.planning.work import Work

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """The plan of one run on given GPUs, with everything that is printed.

    `batch` is the number of prompts on each GPU in an iteration, which the GPU computes in `accumulate` parts, one
    after another. `fits` is the largest number of prompts that fits into the memory of a GPU. `hours` is the length of
    the run if each GPU reaches the share `utilisation` of its peak of `peak_tflops` TFLOP/s. `remedies` are options
    that save memory, with the saved bytes. `further` are options whose saving is known only after planning again with
    them. `faster` are options that use free memory to save time. `source` says where the architecture comes from (see
    `Recipe.source`).
    """

    name: str
    gpus: GPUs
    layout: Layout
    batch: int
    accumulate: int
    iterations: int
    sizes: Sizes
    work: Work
    fits: int
    hours: float
    peak_tflops: float
    utilisation: float
    remedies: list[Remedy]
    further: list[str]
    faster: list[str]
    source: str

    @property
    def total(self) -> float:
        """The peak bytes of tensors on a GPU in training."""
        return total(self.sizes, self.layout, self.batch, self.accumulate)

    def parts(self) -> dict[str, float]:
        """Return the bytes on a GPU at the moment of the memory peak, by the name of the part. Their sum is `total`."""
        peaks = phase_peaks(self.sizes, self.layout, self.batch, self.accumulate)
        worst = max(peaks, key=peaks.__getitem__)
        timeline = self.sizes.phases.get(worst)
        gradients = self._gradients(worst, timeline)
        collected = gathered(self.sizes, self.layout) if timeline or worst == VALIDATION else 0.0
        parts = {**resting(self.sizes, self.layout), "gradients": gradients}
        if collected:
            parts["gathered blocks"] = collected
        return parts | {f"working memory ({worst})": peaks[worst] - gradients - collected}

    def _gradients(self, phase: str, timeline: Timeline | None) -> float:
        """Return the bytes of gradients in a phase. Without a timeline, the phase is the optimizer step, and the largest role
        counts.
        """
        if phase in (VALIDATION, TEXT):
            return 0.0
        if timeline is not None:
            return max(timeline.gradient, default=0.0) * self.sizes.gradient_share(phase, self.layout)
        sizes = self.sizes
        taken = {r: sizes.gradient_share(r, self.layout) * (s + sizes.step_copies[r]) for r, s in sizes.trained.items()}
        role = max(taken, key=taken.__getitem__)
        return sizes.trained[role] * sizes.gradient_share(role, self.layout)

    def as_json(self) -> dict[str, object]:
        """Return the plan as a dictionary for JSON, with sizes in bytes and work in floating-point operations."""
        return {
            "name": self.name,
            "gpus": str(self.gpus),
            "strategy": self.layout.strategy,
            "batch": self.batch,
            "bytes_by_part": {part: round(size) for part, size in self.parts().items()},
            "bytes": round(self.total),
            "usable_bytes": round(self.gpus.usable),
            "largest_batch": self.fits,
            "checkpoint_bytes": round(checkpoint_bytes(self.sizes)),
            "phase_bytes": {
                k: round(v) for k, v in phase_peaks(self.sizes, self.layout, self.batch, self.accumulate).items()
            },
            "flops_per_sample": self.work.total,
            "rollout_calls": self.work.rollout_calls,
            "hours": self.hours,
            "architecture": self.source,
        }

    def __str__(self) -> str:
        verdict = "fits" if self.total <= self.gpus.usable else "does NOT fit"
        parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
        lines = [f"{self.name} on {self.gpus} GB, strategy={self.layout.strategy}, {self.batch} prompts a GPU{parts}"]
        lines += [f"  {part:<34}{size / GB:9.2f} GB" for part, size in self.parts().items() if size]
        lines.append(f"  {'sum':<34}{self.total / GB:9.2f} GB of {self.gpus.usable / GB:.2f} usable: {verdict}")
        lines.append(f"  largest batch of a GPU {self.fits}; a checkpoint {checkpoint_bytes(self.sizes) / GB:.1f} GB")
        others = phase_peaks(self.sizes, self.layout, self.batch, self.accumulate).items()
        lines.append(
            "  peak of each phase, in GB, above what is held all the time: "
            + ", ".join(f"{k} {v / GB:.2f}" for k, v in others)
            + f"; {max(others, key=lambda item: item[1])[0]} takes most"
        )
        work = self.work
        lines.append(
            f"  a sample's iteration {work.total / 1e12:.1f} TFLOP: rollout {work.rollout / 1e12:.1f} "
            f"({work.rollout_calls:.2f} calls), "
            + ", ".join(f"{role} {flops / 1e12:.1f}" for role, flops in work.updates.items())
        )
        lines.append(
            f"  {self.iterations} iterations: {self.hours:.1f} hours at {self.utilisation:.0%} of {self.peak_tflops:g} TFLOP/s"
        )
        if verdict != "fits":
            lines += [
                f"  {r.overrides}: saves {r.saves / GB:.1f} GB, then the largest batch is {r.batch}"
                for r in self.remedies
            ]
            lines += [f"  {override}: plan again with it" for override in self.further]
        elif self.faster:
            lines.append(f"  memory is left to recompute less: plan again with {' or '.join(self.faster)}")
        return "\n".join([*lines, f"  architecture: {self.source}"])
