"""Images of a pipeline of a family that this project does not know. Shapes: images (B, 3, H, W) in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cdm_lightning.backbones.foreign_pipeline import LoadedPipeline
from cdm_lightning.core.rng import stream
from cdm_lightning.evaluation.samplers import SamplerSpec


@dataclass(frozen=True)
class ForeignMaker:
    """Makes images with the pipeline's own call (see `measuring.Maker`)."""

    pipeline: LoadedPipeline

    def images(self, spec: SamplerSpec, prompts: Sequence[str], indices: Sequence[int], seed: int) -> Tensor:
        """Return the images (B, 3, H, W) in [0, 1] of B prompts, on the CPU.

        All random numbers of an image, also those that a scheduler draws between steps, come from a generator that is
        seeded with `seed` and the prompt's index. Therefore the batch size changes an image by rounding at most.
        """
        generators = [stream(seed, "foreign pipeline", index) for index in indices]
        return self.pipeline.images(prompts, generators, spec.nfe, spec.guidance_scale)

    def take_counts(self) -> dict[str, float]:
        """Return the "network_calls" and the images "flagged" by a safety checker since the last call."""
        found = dict(self.pipeline.counts)
        self.pipeline.counts.update(dict.fromkeys(found, 0.0))
        return found
