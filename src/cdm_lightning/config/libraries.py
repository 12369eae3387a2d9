"""The allowed values for options of other libraries' classes, and Lightning's options that must not be set.

The libraries' own annotations have no ranges. Some options of Lightning's trainer must not be set, because the trainer
would fail, ignore them, or change which prompts a run sees. `instead_of` returns what to set instead, and the error
message contains it.
"""

import pkgutil
from functools import cache
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
OPTIMIZER: dict[str, Any] = {  # of the optimizers of any library
    "weight_decay": NotNegative,
    "maximize": Literal[False],  # it would train away from the target
    "differentiable": Literal[False],  # a step would fail
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
    "lightning.pytorch.loggers.TensorBoardLogger": LOGGER
    | {
        "sub_dir": FolderInside | None,
        "max_queue": Count,
        "flush_secs": Count,
        "filename_suffix": Annotated[str, Text("letters, digits, . _ and -", may_be_empty=True, pattern=r"[\w.-]*")],
    },
    "lightning.pytorch.loggers.WandbLogger": LOGGER
    | {"name": Name | None, "version": Name | None, "project": Name | None},
    "torch.optim.Adam": ADAM,
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


OF_OPTIMIZERS = {  # options of the optimizers of any library that must not be set
    "lr": "set learning_rate.peak, next to optimizer",
    "params": "remove it: these are the weights of the network",
}
REPLACED = {  # classes of Lightning that fail or do nothing in this package, and what to use instead
    "StochasticWeightAveraging": "set ema.decay for an average of the student",
    "WeightAveraging": "set ema.decay for an average of the student",
    "EMAWeightAveraging": "set ema.decay for an average of the student",
    "GradientAccumulationScheduler": "set compute.accumulate",
    "BatchSizeFinder": "set data.batch_size; `python -m cdm_lightning.plan` computes the largest that fits",
    "LearningRateFinder": "set optim.NETWORK.learning_rate.peak",
    "BackboneFinetuning": "choose lora=lora to train a part of the weights",
    "ModelPruning": "remove it: no network here can be pruned in training",
    "LambdaCallback": "write a class of your own: a configuration cannot hold functions",
}


def options_of(target: str) -> dict[str, Any]:
    """Return {option: annotation} for the class `target` of another library.

    `target` is any dotted name of the class. The options are those that `OPTIONS` lists for the class, or else for its
    nearest base class in `OPTIONS`. An optimizer also has the options in `OPTIMIZER`. The result is empty for any other
    class.
    """
    found = OPTIMIZER if _is_optimizer(target) else {}
    if target in OPTIONS:
        return found | OPTIONS[target]
    listed = {(name.partition(".")[0], name.rpartition(".")[2]): options for name, options in OPTIONS.items()}
    return found | next((listed[name] for name in _ancestry(target) if name in listed), {})


def instead_of(target: str | None, name: str) -> str | None:
    """Return what to set instead of the option `name` of the class `target`, for an error message.

    `target` is a dotted name. Some options of Lightning's `Trainer` and of optimizers must not be set. Returns None for
    every other option.
    """
    if target is None:
        return None
    if target == TRAINER or ("lightning", "Trainer") in _ancestry(target):
        return INSTEAD.get(name)
    return OF_OPTIMIZERS.get(name) if _is_optimizer(target) else None


def replacement_of(target: str) -> str | None:
    """Return what to use instead of a callback or strategy of Lightning that cannot be used here, or None if it can be."""
    ancestry = _ancestry(target)
    if not ancestry or ancestry[0][0] not in ("lightning", "pytorch_lightning"):
        return None
    if any(name == "Strategy" for _, name in ancestry):
        return INSTEAD["strategy"]
    return REPLACED.get(ancestry[0][1])


@cache
def _ancestry(target: str) -> tuple[tuple[str, str], ...]:
    """Return (package, name) of a class and of the classes above it, nearest first. () if there is no such class."""
    try:
        found = pkgutil.resolve_name(target)
    except Exception:  # the check of the arguments reports it
        return ()
    return (
        tuple((above.__module__.partition(".")[0], above.__name__) for above in found.__mro__)
        if isinstance(found, type)
        else ()
    )


def _is_optimizer(target: str) -> bool:
    return ("torch", "Optimizer") in _ancestry(target)
