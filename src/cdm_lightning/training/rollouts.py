"""Make the samples for an objective's losses from a batch of prompts: text, random draws and the student's rollout.

A rollout is the student's own path from noise, in K steps. The losses use one step of it, the *anchor*, which is drawn for
each sample; the *point* is the state there (`core.rollout`). Only this file computes the rollouts of several iterations as one
batch; `data/batches.py` then reads their prompts together. Shapes: B samples, K steps, latents (B, C, H, W).
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

    A group never goes beyond the next update of the student. Until then the student does not change, so the rollouts are the
    same as one by one, with fewer network calls. `period` is the number of iterations from one student update to the next
    (`Objective.student_period`); None means that each iteration is a group of its own.
    """

    together: int = 1
    period: int | None = None

    def of(self, iteration: int) -> range:
        """Return the iterations of the group that this iteration belongs to."""
        if self.period is None:
            return range(iteration, iteration + 1)
        turn = iteration % self.period
        first = iteration - turn % self.together
        return range(first, min(first + self.together, iteration - turn + self.period))


class Rollouts(ABC):
    """Makes the samples of an iteration, which are the inputs of the losses, from a batch of prompts.

    Their random draws depend only on `seed`, the iteration and a sample's index in the global batch. `bind` gives the networks
    for some prompts, `backbone`, `resolution` and `schedule` the image size and the sigmas. A batch is computed in `accumulate`
    parts, with a sample for each. `groups` says which iterations roll out as one batch (default: each alone), `needs_latents`
    whether samples have latents of real images. `agree_on_calls` takes the number of network calls that a rollout needs and
    returns the number to make, which must be equal in all processes that hold shards of one network. `timer` adds up the time.
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
        """Return the samples of an iteration (counted from 0) for the objective's losses, one for each part of the batch."""

    def bound(self, batch: PromptBatch, iteration: int) -> list[Sample]:
        """Return a `Sample` for each part of the batch, before its rollout: networks with text, random draws, image size, latents.

        Raises UserError if the objective needs latents of real images and the batch has no images.
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
                )
            )
        return samples

    def _latents(self, part: PromptBatch, backbone: Backbone) -> Tensor:
        if part.images is None:
            raise UserError("the objective needs real images, but this batch has none; build the data with images=True")
        return backbone.encode_images(fit_to(part.images.to(self.device), backbone.image_size))

    def draw(self, sample: Sample) -> Rollout:
        """Draw the random numbers of a rollout: noise, the sigmas of K steps (the same K for all samples), an anchor per sample."""
        noise = sample.rng.normal("rollout.noise", sample.latent_shape)
        sigmas = self.schedule.sample(sample.rng, sample.shift_steps)
        anchor = sample.rng.index("rollout.anchor", sigmas.shape[1] - 1)
        return Rollout(sample.fields.student, noise, sigmas, anchor)

    def forget(self) -> None:
        """Drop rollouts that an earlier training computed in advance."""
        return


class NoRollouts(Rollouts):
    """Makes samples without a rollout, for objectives that do not use the student's own path."""

    def samples(self, batch: PromptBatch, iteration: int) -> list[Sample]:
        """Return a plain `Sample` for each part of the batch."""
        return self.bound(batch, iteration)


class FullRollouts(Rollouts):
    """Makes samples by rollouts to the end of the student's path, for objectives that use what comes after the anchor."""

    def samples(self, batch: PromptBatch, iteration: int) -> list[RolledOutSample]:
        """Return a sample with a `FullTrajectoryPoint` at the anchors for each part of the batch."""
        samples = self.bound(batch, iteration)
        with self.timer("rollout"):
            return [self._rolled_out(sample, self.draw(sample)) for sample in samples]

    @staticmethod
    def _rolled_out(sample: Sample, rollout: Rollout) -> RolledOutSample:
        trajectory = simulate(rollout.student, rollout.noise, rollout.sigmas)
        return with_point(sample, trajectory.at(rollout.anchor), rollout.steps)


@dataclass(frozen=True)
class _AtAnchor:
    """A sample whose rollout has reached the anchors, where its states are x (B, C, H, W)."""

    sample: Sample
    rollout: Rollout
    x: Tensor

    def rolled_out(self) -> RolledOutSample:
        """Return the sample with its point at the anchor, which takes one more call of the student."""
        return with_point(self.sample, self.rollout.point(self.x), self.rollout.steps)


class AnchorRollouts(Rollouts):
    """Makes samples by rollouts that stop at each sample's anchor, so that the steps after it are not computed.

    The first iteration of a group rolls out the whole group, whose batches come with its own batch (`batch.group`). The
    results of the later iterations are kept until those iterations need them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting: dict[int, list[_AtAnchor]] = {}  # by iteration

    def samples(self, batch: PromptBatch, iteration: int) -> list[RolledOutSample]:
        """Return a sample with the `TrajectoryPoint` at the anchor for each part of the batch."""
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
        """Drop rollouts of an earlier training, which may be of other prompts or of another student."""
        self._waiting = {}


KINDS: dict[RolloutKind, type[Rollouts]] = {"to_anchor": AnchorRollouts, "full": FullRollouts, "none": NoRollouts}


def with_point(sample: Sample, point: TrajectoryPoint, steps: int) -> RolledOutSample:
    """Return the sample together with the point at the anchor of its rollout, which has `steps` steps."""
    of_sample = {field.name: getattr(sample, field.name) for field in fields(Sample)}
    return RolledOutSample(**of_sample, point=point, steps=steps)
