"""The data loaders of a run: an endless stream of prompts for training, and a fixed list of prompts for validation."""

import sys
from collections.abc import Callable
from functools import cached_property
from typing import cast

import lightning as L
import torch
from torch.utils.data import DataLoader

from cdm_lightning.data.batches import (
    DrawnPrompts,
    EndlessBatches,
    PromptBatch,
    collate,
    evaluation_batches,
    spans,
)
from cdm_lightning.data.loader import SteadyLoader
from cdm_lightning.data.mixture import MixedPrompts
from cdm_lightning.data.prompts import Prompts
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import BatchSize, Count, Seconds, Seed, Workers

LONGEST_TIMEOUT = 10**6  # seconds, eleven days; longer ones overflow in the operating system


class PromptDataModule(L.LightningDataModule):
    """Data loaders that deliver `PromptBatch`es of training and validation prompts.

    A resumed run continues at batch number `trainer.global_step`, so the state of the loaders need not be saved. `seed`
    fixes the order of the training prompts. Validation uses the first `val_prompts` prompts of `val` (None: all). Batch
    sizes are per process; if `val_batch_size` is None, `batch_size` is used. With `images`, each training prompt comes
    with its real image.

    `groups(n)` gives the iterations whose rollouts are computed together with the rollout of iteration n, n included
    (default: n alone). The batch of the first of these iterations lists the batches of all of them in its attribute
    `group`.

    Raises `UserError` for a number out of its range, and if `images` is set but `train` has no images. If no batch
    arrives within `worker_timeout` seconds, the run ends with `UserError`.
    """

    def __init__(
        self,
        train: Prompts,
        val: Prompts,
        batch_size: BatchSize,
        val_batch_size: BatchSize | None = None,
        val_prompts: Count | None = None,
        seed: Seed = 0,
        num_workers: Workers = 0,
        groups: Callable[[int], range] | None = None,
        images: bool = False,
        worker_timeout: Seconds = 600.0,
    ) -> None:
        super().__init__()
        self.groups, self.images = groups, images
        if images and not train.has_images:
            raise UserError(
                f"data.train: the objective needs real images, but there are none in {_without_images(train)}; "
                "choose a set of captioned images, such as data=captioned_images (docs/prompts.md)"
            )
        self.train, self.val, self.seed, self.num_workers = train, val, seed, num_workers
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.val_prompts = len(val) if val_prompts is None else min(val_prompts, len(val))
        if min(self.batch_size, self.val_batch_size, self.val_prompts) < 1:
            raise UserError(
                f"data: batch_size={self.batch_size}, val_batch_size={self.val_batch_size} and val_prompts={self.val_prompts} must "
                "each be at least 1"
            )
        if num_workers < 0:
            raise UserError(
                f"data.num_workers={num_workers} must be at least 0; set 0 to read the prompts in the training process"
            )
        if not 0 < worker_timeout <= LONGEST_TIMEOUT:
            raise UserError(
                f"data.worker_timeout={worker_timeout} must be above 0 and at most {LONGEST_TIMEOUT} seconds, "
                "because longer times overflow in the operating system"
            )
        self.worker_timeout = worker_timeout
        self._loaders: list[SteadyLoader] = []

    def prepare_data(self) -> None:
        """Print how many training and validation prompts were left out, and for a mixture also each source's share."""
        for name, prompts in (("training", self.train), ("validation", self.val)):
            if prompts.summary:
                print(f"{name} prompts: {prompts.summary}", file=sys.stderr, flush=True)

    def train_dataloader(self) -> DataLoader:
        """Return the endless loader of training batches, from the batch of iteration `trainer.global_step` on."""
        batches = self._batches(cast(L.Trainer, self.trainer).global_step)
        return self._loader(DrawnPrompts(self.train, self.images), batches, self.num_workers)

    def coming(self, iteration: int, count: int, parts: int = 1) -> list[list[str]]:
        """Return the prompts of this process's training batches in `count` iterations, starting with `iteration`.

        If the rollouts of one of these iterations are computed together with those of other iterations, the batches of
        the other iterations are included. Each batch is split into at most `parts` parts, as `PromptBatch.split` splits
        it. The result has one list of prompts for each part, in the order of the iterations.
        """
        groups = self.groups or (lambda number: range(number, number + 1))
        last = iteration + count - 1
        texts = []
        for number in range(groups(iteration).start, groups(last).stop):
            prompts = [self.train[draw.prompt] for draw in self._all_batches.batch(number)]
            texts += [prompts[span] for span in spans(len(prompts), parts)]
        return texts

    @cached_property
    def _all_batches(self) -> EndlessBatches:
        return self._batches(0)

    def _batches(self, start: int) -> EndlessBatches:
        """Return this process's training batches, from the one of iteration `start` on."""
        trainer = cast(L.Trainer, self.trainer)
        return EndlessBatches(
            len(self.train),
            self.batch_size,
            self.seed,
            start=start,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            order=self.train.order(self.seed),
            groups=self.groups,
        )

    def val_dataloader(self) -> DataLoader:
        """Return the loader of this rank's validation prompts, in the order of `val`.

        Raises `UserError` if there are fewer validation prompts than processes.
        """
        trainer = cast(L.Trainer, self.trainer)
        rank, world_size = trainer.global_rank, trainer.world_size
        if self.val_prompts < world_size:
            raise UserError(
                f"data: {self.val_prompts} validation prompts are too few for {world_size} processes; set data.val_prompts "
                f"to at least {world_size}, and use a data.val with at least that many prompts"
            )
        batches = evaluation_batches(self.val_prompts, self.val_batch_size, rank, world_size)
        return self._loader(DrawnPrompts(self.val), batches, 0)

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> PromptBatch:
        """Return the batch unchanged.

        It stays on the CPU, because prompts are texts and random numbers are drawn on the CPU.
        """
        return batch

    def kill_workers(self) -> None:
        """Kill loader workers that are still alive, for example because they hang. Call this after training."""
        for loader in self._loaders:
            loader.kill_workers()

    def _loader(self, prompts: DrawnPrompts, batches: EndlessBatches | list, num_workers: int) -> DataLoader:
        loader = SteadyLoader(
            prompts,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
            patience=self.worker_timeout if num_workers else 0.0,
            is_alone=cast(L.Trainer, self.trainer).world_size == 1,
        )
        self._loaders.append(loader)
        return loader


def _without_images(prompts: Prompts) -> str:
    """Return the names of a mixture's sources without images, for a message.

    Returns "these prompts" if `prompts` is not a mixture.
    """
    sources = prompts.sources if isinstance(prompts, MixedPrompts) else {}
    return ", ".join(name for name, source in sources.items() if not source.has_images) or "these prompts"
