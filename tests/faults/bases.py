"""The short commands that bad inputs are given to, and the stock of good folders that they are made from."""

import os
from pathlib import Path

from faults.cases import Case

TOY = (  # a plane with a network that is hardly fitted; validation runs at the end
    "experiment=toy2d_cdm",
    "run_name=mine",
    "trainer.accelerator=cpu",
    "backbone.hidden=8",
    "backbone.depth=1",
    "backbone.fit_steps=2",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "data.batch_size=2",
    "data.val_batch_size=4",
    "data.val_prompts=4",
)
TOY_RUN = (*TOY, "hydra.run.dir=toy", "checkpoint.every=1", "checkpoint.best=val/energy_distance/student_4")
PROMPTED = (*TOY, "data=prompts", "metric=[]", "trainer.limit_val_batches=0")
SD3 = (  # the bundled pipeline
    "experiment=tiny_sd3_cdm",
    "run_name=mine",
    "trainer.accelerator=cpu",
    "text_cache.remember_up_to=0",  # encode only the prompts of the batch
    "callbacks=none",
    "metric=[]",
    "trainer.max_steps=1",
    "trainer.limit_val_batches=0",
    "schedule.length.low=1",
    "schedule.length.high=2",
    "data.batch_size=2",
    "data.val_prompts=2",
)
ASKED = ("--prompt", "a red circle", "--steps", "1", "--output", "grid.png")
LORA = ("lora=lora", "lora.student.rank=2", "lora.fake_score.rank=2")


def stocking() -> list[Case]:
    """The commands that make the stock, in their order; they run in the folder of the stock."""
    return [
        Case("stock", "toy run", "train", [*TOY_RUN, "trainer.val_check_interval=1"], "runs"),
        Case("stock", "run", "train", [*SD3, "hydra.run.dir=run"], "runs"),
        Case("stock", "LoRA run", "train", [*SD3, *LORA, "hydra.run.dir=adapted"], "runs"),
        Case("stock", "export", "export", ["run", "--output", "exported"], "runs"),
        Case("stock", "LoRA", "export", ["adapted", "--form", "lora", "--output", "lora"], "runs"),
        Case("stock", "texts", "cache_text", [*SD3, "text_cache.folder=texts"], "runs"),
        Case("stock", "grid", "sample", ["--model", "exported", *ASKED], "runs"),
    ]


def make_stock(place: Path) -> Path:
    """Run these commands, unless they were all run before; the folder with what they made."""
    import shutil

    from faults import engine

    stock, done = place / "stock", place / "stock_is_complete"
    if done.exists():
        return stock
    shutil.rmtree(stock, ignore_errors=True)
    model = Path(__file__).parents[2] / "src" / "cdm_lightning" / "assets" / "tiny_sd3"
    box = place / "stocking"
    shutil.rmtree(box, ignore_errors=True)
    (box / "work").mkdir(parents=True)
    shutil.copytree(model, box / "work" / "model")
    for name in ("home", "tmp"):
        (box / name).mkdir()
    for case in stocking():
        status = engine.execute(case, case.arguments, box)
        if status:
            raise RuntimeError(f"{case.line}\nended with {status}:\n{(box / 'err.txt').read_text()}")
    os.rename(box / "work", stock)
    shutil.rmtree(box)
    done.touch()
    return stock
