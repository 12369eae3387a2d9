"""What Lightning, Hydra's objects and logging add to an iteration: `Trainer.fit` against a bare loop of the same computation.

Both run in turn, iteration by iteration, on networks of their own: a callback that comes last runs the bare iteration.
"""

import statistics
import tempfile
import time

import lightning as L
import torch

from benchmarks.set_up import attach, build_networks
from cdm_lightning.config import build, compose
from cdm_lightning.data.text_memory import RememberedText
from cdm_lightning.metrics.suite import MetricSuite
from cdm_lightning.module import CDMModule
from cdm_lightning.terminal.quiet import quiet_libraries

WARM_UP = 4  # iterations, not counted
SETTINGS = (
    "experiment=tiny_sd3_cdm",
    "callbacks=default",
    "~callbacks.sample_grid",
    "logger=csv",
    "trainer.limit_val_batches=0",
    "trainer.accelerator=cpu",
)


class BareBeside(L.Callback):
    """After each iteration of the trainer, the same one of `module` without it; the seconds of both."""

    def __init__(self, module: CDMModule) -> None:
        self.module = module
        self.framed: list[float] = []
        self.bare: list[float] = []
        self._last = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: tuple, *_: object
    ) -> None:
        """The trainer's iteration is over: note it, run the bare one, start the clock anew."""
        start = time.perf_counter()
        self.framed.append(start - self._last)
        self.module.training_step(batch, 0)
        self._last = time.perf_counter()
        self.bare.append(self._last - start)


def frame_cost(iterations: int) -> dict[str, float]:
    """Seconds of `iterations` in the demo's configuration with and without the frame, and its cost as a share of the bare."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*SETTINGS, f"output_dir={folder}", f"trainer.max_steps={iterations + WARM_UP}"])
        quiet_libraries()
        module, beside = build(config, "module"), BareBeside(bare_module(config))
        data = build(config, "data", groups=module.groups.of)
        texts = [data.train[number] for number in range(len(data.train))]
        module.backbone.use_text_memory(RememberedText(module.backbone.encode_prompts, texts, 10**9))
        callbacks = build(config, "callbacks", offered={"metrics": MetricSuite})
        trainer = build(config, "trainer")(
            callbacks=[*callbacks, beside], logger=build(config, "logger"), enable_checkpointing=False
        )
        trainer.fit(module, data)
    same = all(map(torch.equal, module.networks.student.parameters(), beside.module.networks.student.parameters()))
    if not same:
        raise RuntimeError("the bare loop does not compute what the trainer does")
    framed, bare = beside.framed[WARM_UP:], beside.bare[WARM_UP:]
    ratios = [a / b - 1 for a, b in zip(framed, bare)]
    return {
        "framed_seconds": sum(framed) / iterations,
        "bare_seconds": sum(bare) / iterations,
        "cost": sum(framed) / sum(bare) - 1,
        "median_cost": statistics.median(ratios),
    }


def bare_module(config: object) -> CDMModule:
    """Another module of the configuration, ready for `training_step` without a trainer."""
    module, data = build(config, "module"), build(config, "data")
    build_networks(module, torch.device("cpu"))
    module.train()
    texts = [data.train[number] for number in range(len(data.train))]
    module.backbone.use_text_memory(RememberedText(module.backbone.encode_prompts, texts, 10**9))
    attach(module)
    return module
