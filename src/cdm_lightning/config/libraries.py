"""The allowed values for options of other libraries' classes, and Lightning's options that must not be set.

The libraries' own annotations have no ranges. Some options of Lightning's trainer must not be set, because the trainer would
fail, ignore them, or change which prompts a run sees. For each of them, the message names the option to use instead.
"""

from types import NoneType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len

from cdm_lightning.kinds import (
    Count,
    CountOrNone,
    DevicesOption,
    FolderInside,
    FolderToWrite,
    Iterations,
    Name,
    NotNegative,
    Positive,
    Processes,
    Share,
    ShareBelowOne,
    Text,
)

TRAINER = "lightning.pytorch.Trainer"
Duration = Annotated[str, Text("a time as DD:HH:MM:SS", pattern=r"\d+:\d+:\d+:\d+")]
Batches = Annotated[int, Ge(0), Le(10**9)] | Share  # a number of batches, or a share of them
Prefix = Annotated[str, Text("a prefix", may_be_empty=True)]
LOGGER: dict[str, Any] = {
    "save_dir": FolderToWrite,
    "name": FolderInside | None,
    "prefix": Prefix,
    "version": CountOrNone | FolderInside | None,
}
ADAM: dict[str, Any] = {
    "betas": Annotated[list[ShareBelowOne], Len(2, 2)],
    "eps": Positive,
    "weight_decay": NotNegative,
    "amsgrad": bool,
}
OPTIONS: dict[str, dict[str, Any]] = {
    TRAINER: {
        "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
        "devices": DevicesOption,
        "num_nodes": Processes,
        "max_steps": Iterations,
        "max_epochs": Literal[-1],
        "log_every_n_steps": Iterations,
        "val_check_interval": Iterations,
        "limit_val_batches": Batches,
        "check_val_every_n_epoch": NoneType,
        "num_sanity_val_steps": CountOrNone,
        "default_root_dir": FolderToWrite,
        "profiler": Literal["simple", "advanced", "pytorch"] | None,
        "max_time": Duration | None,
        "use_distributed_sampler": Literal[False],
    },
    "lightning.pytorch.loggers.CSVLogger": LOGGER | {"flush_logs_every_n_steps": Count},
    "cdm_lightning.callbacks.loggers.CSVLogger": LOGGER | {"flush_logs_every_n_steps": Count},
    "lightning.pytorch.loggers.TensorBoardLogger": LOGGER,
    "lightning.pytorch.loggers.WandbLogger": LOGGER
    | {"name": Name | None, "version": Name | None, "project": Name | None},
    "torch.optim.AdamW": ADAM | {"fused": bool | None, "foreach": bool | None},
    "torchao.optim.AdamW8bit": ADAM | {"block_size": Count, "bf16_stochastic_round": bool},
}
INSTEAD = {  # Lightning's options that must not be set, and what to do instead
    "strategy": "choose a group: strategy=ddp, fsdp2 or hsdp",
    "callbacks": "add a callback as callbacks.NAME._target_=CLASS",
    "logger": "choose a group: logger=csv, tensorboard, wandb or none",
    "precision": "set module.compute_dtype",
    "plugins": "set module.compute_dtype, or choose a strategy",
    "accumulate_grad_batches": "set compute.accumulate",
    "gradient_clip_val": "set optim.NETWORK.max_grad_norm for each trained network, such as optim.student.max_grad_norm",
    "gradient_clip_algorithm": "gradients are clipped by their norm: set optim.student.max_grad_norm",
    "limit_train_batches": "set trainer.max_steps; a run has no epochs",
    "limit_test_batches": "set trainer.limit_val_batches",
    "limit_predict_batches": "set trainer.limit_val_batches",
    "overfit_batches": "set data.train.path=FILE to a file with few prompts",
    "fast_dev_run": "use debug=fast",
    "min_steps": "set trainer.max_steps",
    "min_epochs": "set trainer.max_steps; a run has no epochs",
    "reload_dataloaders_every_n_epochs": "remove it: a run has no epochs",
    "enable_checkpointing": "set checkpoint.every",
    "model_registry": "set checkpoint.folder and checkpoint.every",
    "barebones": "choose callbacks=none logger=none",
    "sync_batchnorm": "remove it: no network here has batch normalisation",
}


def options_of(target: str) -> dict[str, Any]:
    """Return {option: annotation} for a class of another library, given by its dotted name.

    The result is empty if the class is not listed here.
    """
    return OPTIONS.get(target, {})


def instead_of(target: str | None, name: str) -> str | None:
    """Return what to set instead of the option `name` of Lightning's `Trainer`, for an error message.

    Returns None if the option may be set.
    """
    return INSTEAD.get(name) if target == TRAINER else None
