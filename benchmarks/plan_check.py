"""`python -m benchmarks.plan_check experiment=...`: the plan of a run beside what a GPU really takes for it.

Trains four iterations without logging, validation and checkpoints and compares `torch.cuda.max_memory_allocated` with the
planner's sum, and the time of an iteration with its FLOPs. The overrides are those of training.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch

from cdm_lightning.config import build, compose, fail
from cdm_lightning.data.caches import use_text_cache
from cdm_lightning.errors import UserError
from cdm_lightning.planning.layout import Layout
from cdm_lightning.planning.memory import total
from cdm_lightning.planning.recipe import Recipe, read_recipe
from cdm_lightning.terminal.quiet import quiet_libraries

ITERATIONS = 6  # of which the first two also make the optimizers' states


@dataclass(frozen=True)
class Check:
    """Bytes planned and measured, and FLOP/s reached in the measured iterations by the planner's count."""

    planned: float
    measured: float
    flops_per_second: float

    def __str__(self) -> str:
        ratio = self.planned / self.measured
        return (
            f"planned {self.planned / 1e9:.3f} GB, measured {self.measured / 1e9:.3f} GB, ratio {ratio:.3f}; "
            f"{self.flops_per_second / 1e12:.2f} TFLOP/s by the planner's count"
        )


class Peak(L.Callback):
    """The most memory that was allocated, and the seconds that it took, from the third iteration on."""

    bytes: int = 0
    seconds: float = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: object, index: int) -> None:
        """Start counting."""
        if index == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.seconds = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        """Stop counting."""
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.seconds
        self.bytes = torch.cuda.max_memory_allocated()


def check(overrides: list[str]) -> Check:
    """Plan, then train on the GPU that there is; UserError without one."""
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: the plan can be checked on one only")
    quiet_libraries()
    with TemporaryDirectory() as folder:
        config = compose([*overrides, f"output_dir={Path(folder)}"])
        module, peak = build(config, "module"), Peak()
        data = build(config, "data", groups=module.groups.of, images=module.objective.needs_latents)
        use_text_cache(build(config, "text_cache"), module, data, [])
        trainer = L.Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=ITERATIONS,
            max_epochs=-1,
            callbacks=[peak],
            logger=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, data)
    recipe: Recipe = read_recipe(build(config, "module"), config.text_cache.folder is not None)
    planned = total(recipe.sizes, Layout("single"), config.data.batch_size, config.compute.accumulate)
    flops = recipe.work.total * config.data.batch_size * (ITERATIONS - 2)
    return Check(planned, peak.bytes, flops / peak.seconds)


def main() -> None:
    """The command line."""
    try:
        print(check(sys.argv[1:]))
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
