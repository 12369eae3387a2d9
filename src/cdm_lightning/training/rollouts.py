"""Make the inputs of an objective's losses from a batch of prompts: text, random numbers and the student's rollout.

A rollout is the student's own path from noise, in K steps. The losses use one of these steps, the *anchor*, which is
drawn at random for each sample. The *point* is the state at the anchor (see `core.rollout`). The rollouts of several
iterations can be computed as one batch; the prompts of these iterations are then read together (see `data.batches`).
Shapes: B samples, K steps, latents (B, C, H, W).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import Rollout, TrajectoryPoint, simulate, walk
from cdm_lightning.core.schedules import SigmaSchedule
from cdm_lightning.data.batches import PromptBatch
from cdm_lightning.data.images import fit_to
from cdm_lightning.errors import UserError
from cdm_lightning.objectives.base import RolledOutSample, RolloutKind, Sample, VelocityFields
from cdm_lightning.training.phases import PhaseTimer
from cdm_lightning.training.resolution import Resolution

Bind = Callable[
    [Sequence[str], Backbone], VelocityFields
]  # (prompts, backbone) -> the networks with the text of these prompts


@dataclass(frozen=True)
class RolloutGroups:
    """Groups of up to `together` successive iterations whose rollouts are computed as one batch.

    A rollout is the student's own path from noise. A group ends at the latest with the next update of the student.
    Until then the student stays the same, so a group gives the same rollouts as single iterations, with fewer network
    calls. `period` is the number of iterations from one student update to the next (see `Objective.student_period`). If
    `period` is None, each iteration is its own group.
    """

    together: int = 1
    period: int | None = None

    def of(self, iteration: int) -> range:
        """Return the iterations of the group that contains `iteration`."""
        if self.period is None:
            return range(iteration, iteration + 1)
        turn = iteration % self.period
        first = iteration - turn % self.together
        return range(first, min(first + self.together, iteration - turn + self.period))


class Rollouts(ABC):
    """Makes the samples of an iteration, which are the inputs of the losses, from a batch of prompts.

    - `bind(prompts, backbone)` returns the networks as velocity fields that are conditioned on these prompts.
    - `resolution` chooses the image size of each iteration, and returns `backbone` with this size.
    - `schedule` draws the sigmas of the rollouts.
    - `seed`: the random numbers of a prompt depend on this seed, the iteration and the prompt's index in the global
      batch only.
    - `groups`: the iterations whose rollouts are computed as one batch; by default each iteration is computed
      separately.
    - `accumulate`: the number of parts of a batch. Each part becomes one `Sample`, which can hold many prompts.
    - `needs_latents`: whether samples have latents of real images.
    - `agree_on_calls` takes the number of student calls that this process needs and returns the number that it must
      make: processes that hold shards of one network must make equally many.
    - `timer` adds up the seconds that rollouts take.
    """

    def __init__(
        self,
        bind: Bind,
        backbone: Backbone,
        resolution: Resolution,
        schedule: SigmaSchedule,
        seed: int,
        device: torch.device,
        *,
        groups: RolloutGroups | None = None,
        accumulate: int = 1,
        needs_latents: bool = False,
        agree_on_calls: Callable[[int], int] = lambda calls: calls,
        timer: PhaseTimer | None = None,
    ) -> None:
        self.bind, self.backbone, self.resolution, self.schedule = bind, backbone, resolution, schedule
        self.seed, self.device = seed, device
        self.groups, self.accumulate, self.needs_latents = groups or RolloutGroups(), accumulate, needs_latents
        self.agree_on_calls, self.timer = agree_on_calls, timer or PhaseTimer()

    @abstractmethod
    def samples(self, batch: PromptBatch, iteration: int) -> Sequence[Sample]:
        """Return the samples of an iteration (counted from 0), one for each part of the batch."""

    def bound(self, batch: PromptBatch, iteration: int) -> list[Sample]:
        """Return a `Sample` without a rollout for each part of the batch.

        A sample holds random numbers, the shape of its latents, and the networks as velocity fields, which are
        conditioned on its prompts. With `needs_latents`, a sample also holds latents of real images, and UserError is
        raised if the batch has no images.
        """
        samples = []
        for part in batch.split(self.accumulate):
            rng = StepRandom(self.seed, iteration, part.indices.tolist(), self.device)
            backbone = self.resolution.draw(self.backbone, rng)
            samples.append(
                Sample(
                    prompts=part.prompts,
                    fields=self.bind(part.prompts, backbone),
                    rng=rng,
                    shift=backbone.shift_sigmas,
                    shift_steps=backbone.shift_steps,
                    latent_shape=backbone.latent_shape,
                    iteration=iteration,
                    latents=self._latents(part, backbone) if self.needs_latents else None,
                    decode=backbone.decode_latents,
                )
            )
        return samples

    def _latents(self, part: PromptBatch, backbone: Backbone) -> Tensor:
        if part.images is None:
            raise UserError(
                "the objective needs real images, but this batch has none; build the PromptDataModule with images=True"
            )
        return backbone.encode_images(fit_to(part.images.to(self.device), backbone.image_size))

    def draw(self, sample: Sample) -> Rollout:
        """Draw the random numbers of a rollout: the noise, the sigmas of its K steps, and an anchor for each prompt.

        K is the same for all prompts of `sample`.
        """
        noise = sample.rng.normal("rollout.noise", sample.latent_shape)
        sigmas = self.schedule.sample(sample.rng, sample.shift_steps)
        anchor = sample.rng.index("rollout.anchor", sigmas.shape[1] - 1)
        return Rollout(sample.fields.student, noise, sigmas, anchor)

    def forget(self) -> None:
        """Drop the rollouts that were computed in advance. Call this before another training begins."""
        return


class NoRollouts(Rollouts):
    """Makes samples without a rollout, for objectives that do not use the student's own path."""

    def samples(self, batch: PromptBatch, iteration: int) -> list[Sample]:
        """Return a `Sample` without a rollout for each part of the batch."""
        return self.bound(batch, iteration)


class FullRollouts(Rollouts):
    """Makes samples by rollouts to the clean image, for losses that use the path after the anchor (a random step)."""

    def samples(self, batch: PromptBatch, iteration: int) -> list[RolledOutSample]:
        """Return a sample for each part of the batch.

        The `point` of each sample is a `FullTrajectoryPoint`: the state at the anchor, with the end of the rollout.
        """
        samples = self.bound(batch, iteration)
        with self.timer("rollout"):
            return [self._rolled_out(sample, self.draw(sample)) for sample in samples]

    @staticmethod
    def _rolled_out(sample: Sample, rollout: Rollout) -> RolledOutSample:
        trajectory = simulate(rollout.student, rollout.noise, rollout.sigmas)
        return with_point(sample, trajectory.at(rollout.anchor), rollout.steps)


@dataclass(frozen=True)
class _AtAnchor:
    """A sample whose rollout has reached each prompt's anchor (its randomly drawn step); x (B, C, H, W) are the states there."""

    sample: Sample
    rollout: Rollout
    x: Tensor

    def rolled_out(self) -> RolledOutSample:
        """Return the sample with its point: the state at the anchor and the student's velocity there.

        The velocity takes one call of the student.
        """
        return with_point(self.sample, self.rollout.point(self.x), self.rollout.steps)


class AnchorRollouts(Rollouts):
    """Makes samples by rollouts that stop at each prompt's anchor, a randomly drawn step; later steps are not computed.

    In the first iteration of a group (see `RolloutGroups`), the rollouts of all iterations of the group are computed.
    The prompts of these iterations are in `batch.group`. The rollouts of later iterations are kept until `samples` is
    called for these iterations.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting: dict[int, list[_AtAnchor]] = {}  # by iteration

    def samples(self, batch: PromptBatch, iteration: int) -> list[RolledOutSample]:
        """Return a sample for each part of the batch. The `point` of each sample is the state at the anchor."""
        if iteration not in self._waiting:
            self._roll_out_group(batch, iteration)
        with self.timer("rollout"):
            return [part.rolled_out() for part in self._waiting.pop(iteration)]

    def _roll_out_group(self, batch: PromptBatch, iteration: int) -> None:
        batches = dict(zip(self.groups.of(iteration), batch.group, strict=True)) if batch.group else {iteration: batch}
        samples = [self.bound(of_iteration, number) for number, of_iteration in batches.items()]
        with self.timer("rollout"):
            parts = [self._walked(part) for part in zip(*samples)]  # the first parts of all iterations, then the second
        by_iteration = dict(zip(batches, map(list, zip(*parts))))
        # A resumed run rolls out the whole group again, so that its results are the same; finished iterations are dropped.
        self._waiting = {number: waiting for number, waiting in by_iteration.items() if number >= iteration}

    def _walked(self, samples: Sequence[Sample]) -> list[_AtAnchor]:
        rollouts = [self.draw(sample) for sample in samples]
        states = walk(rollouts, self.agree_on_calls)
        return [_AtAnchor(*of_sample) for of_sample in zip(samples, rollouts, states)]

    def forget(self) -> None:
        """Drop the rollouts that were computed in advance.

        Call this before another training begins, because the new training may have other prompts or another student.
        """
        self._waiting = {}


KINDS: dict[RolloutKind, type[Rollouts]] = {"to_anchor": AnchorRollouts, "full": FullRollouts, "none": NoRollouts}


def with_point(sample: Sample, point: TrajectoryPoint, steps: int) -> RolledOutSample:
    """Return `sample` with `point`, one state of its rollout. `steps` is the number of steps of that rollout."""
    of_sample = {field.name: getattr(sample, field.name) for field in fields(Sample)}
    return RolledOutSample(**of_sample, point=point, steps=steps)
