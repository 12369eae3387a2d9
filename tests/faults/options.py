"""Bad values for every option of two experiments, and bad options."""

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from faults.bases import SD3, TOY
from faults.cases import Case

# What an option's last name says about its values; all of these are senseless there.
COUNTS = [
    "every",
    "keep",
    "max_skipped",
    "nfe",
    "export_nfe",
    "batch_size",
    "val_batch_size",
    "val_prompts",
    "num_prompts",
    "student_every",
    "fake_score_steps",
    "low",
    "high",
    "count",
    "shard_megabytes",
    "max_characters",
    "num_nodes",
    "hidden",
    "depth",
    "repeat",
    "log_every_n_steps",
    "val_check_interval",
    "accumulate",
    "rank",
    "fit_steps",
    "image_size",
    "max_sequence_length",
    "devices",
]
SHARES = ["decay", "decay_from", "end_share", "p", "drop_probability"]  # from 0 to 1
POSITIVE = ["peak", "eps", "scale", "std", "temperature"]  # above 0, finite
NOT_NEGATIVE = [
    "dm_weight",
    "ca_weight",
    "cdm_weight",
    "weight",
    "weight_decay",
    "warmup",
    "gradient_clip",
    "remember_megabytes",
    "num_workers",
]
SENSELESS = {
    **dict.fromkeys(COUNTS, ("0.5", "-3", "nan", "inf", "1e30")),
    **dict.fromkeys(SHARES, ("-0.5", "1.5", "nan", "inf")),
    **dict.fromkeys(POSITIVE, ("-1", "nan", "inf", "-inf")),
    **dict.fromkeys(NOT_NEGATIVE, ("-1", "nan", "-inf")),
}
FREE = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
UNCHECKED = ("hydra", "metric", "feature")
ENDLESS = {  # what is asked for without end, or takes all of the machine
    "trainer.max_steps": ("-1", "9999999999999999999999"),
    "trainer.max_epochs": ("-1",),
    "data.num_workers": ("9999999999999999999999",),
}
WRONG_FOR_NUMBERS = ("abc", "[1]", "{a: 1}", "nan", "true")
WRONG_FOR_TRUTHS = ("maybe", "[true]", "{a: 1}", "3.5")
WRONG_FOR_LISTS = ("abc", "3", "{a: 1}")
WRONG_FOR_TEXTS = ("[a]", "{a: 1}")
EDGES_FOR_NUMBERS = ("null", "0", "-1", "1e308", "inf", "-inf", "1e-320", "9999999999999999999999", "2.5")
EDGES_FOR_TEXTS = ("null", "''", "3", "true", "' '", "' a '", "/", ".", "~", "'ü😀'", "a" * 300, "'a\nb'")
EDGES_FOR_LISTS = ("[]", "[null]", "[3]", "[abc]", "[{a: 1}]", "[[]]", "null")
EDGES_FOR_TRUTHS = ("null", "0")
LIGHTNING = (  # options of the trainer that this project gives no meaning of its own
    "+trainer.accumulate_grad_batches=2",
    "+trainer.gradient_clip_val=1",
    "+trainer.limit_train_batches=1",
    "+trainer.overfit_batches=1",
    "+trainer.fast_dev_run=true",
    "+trainer.fast_dev_run=abc",
    "+trainer.strategy=ddp",
    "+trainer.callbacks=[]",
    "+trainer.logger=false",
    "+trainer.precision=16-mixed",
    "+trainer.precision=3",
    "+trainer.max_time=abc",
    "+trainer.benchmark=maybe",
    "+trainer.deterministic=warn",
    "+trainer.detect_anomaly=abc",
    "+trainer.barebones=true",
    "+trainer.plugins=[abc]",
    "+trainer.profiler=none_such",
    "+trainer.sync_batchnorm=abc",
    "+trainer.reload_dataloaders_every_n_epochs=1",
    "+trainer.inference_mode=3",
    "+trainer.min_steps=5",
    "+trainer.model_registry=x",
)
WRITTEN = (  # what is no option, no value, or no text of Hydra's grammar, and must be refused
    "objective.cdm_wieght=0",
    "objektive=cdm",
    "experiment=none_such",
    "+experiment=[a,b]",
    "backbone=none_such",
    "backbone@x=toy2d",
    "data=",
    "=3",
    "trainer.max_steps",
    "trainer..max_steps=3",
    "trainer.max_steps=[1",
    "trainer.max_steps={a",
    "run_name='open",
    "run_name=${none_such}",
    "run_name=${none_such:x}",
    "run_name=${run_name}",
    "seed=${trainer}",
    "seed=${module.seed}",
    "seed=-1",
    "seed=4294967296",
    "seed=1.5",
    "seed=null",
    "resume=sometimes",
    "resume=null",
    "resume=[]",
    "resume=.",
    "resume=''",
    "~optim",
    "~module",
    "~data",
    "~backbone",
    "~trainer",
    "~checkpoint",
    "~none_such",
    "~data.train",
    "~backbone._target_",
    "module=null",
    "module=3",
    "module.schedule=abc",
    "module.optim=null",
    "module.backbone=null",
    "module.samplers=[3]",
    "validation.samplers=[3]",
    "validation.samplers=[[]]",
    "validation.samplers=null",
    "optim=null",
    "optim=3",
    "optim.student=null",
    "optim.student.optimizer=null",
    "optim.student.learning_rate=abc",
    "+optim.teacher.learning_rate.peak=1",
    "schedule=abc",
    "schedule.length=null",
    "data.train=[a]",
    "data.val=null",
    "backbone._target_=none.such",
    "backbone._target_=os.getcwd",
    "backbone._target_=3",
    "backbone._target_=null",
    "module._target_=builtins.dict",
    "data._target_=builtins.list",
    "trainer._target_=builtins.print",
    "strategy._target_=null",
    "strategy=none_such",
    "callbacks.progress=3",
    "+callbacks.mine=abc",
    "+callbacks.mine._target_=builtins.dict",
    "metric=[none_such]",
    "metric=abc",
    "logger=none_such",
    "logger=[csv]",
    "checkpoint=null",
    "checkpoint.best=val/none_such",
    "checkpoint.best=3",
    "checkpoint.best_is=worst",
    "trainer.devices=1000",
    "trainer.devices=[]",
    "trainer.devices=abc",
    "trainer.devices=[0,0]",
    "trainer.devices=-5",
    "trainer.accelerator=quantum",
    "trainer.max_steps=0.5",
    "trainer.max_steps=nan",
    "debug=none_such",
    "output_dir=null",
    "output_dir=[a]",
    "module.compute_dtype=int8",
    "module.compute_dtype=none_such",
    "text_cache=null",
    "text_cache.dtype=int4",
    "text_cache.folder=none_such",
    "lora=none_such",
    "resolution=null",
    "resolution=abc",
    "ema.decay=2",
    "ema=3",
    "compute=null",
    "compute.accumulate=0",
    "compute.accumulate=1000",
)
NAMES = (  # names that lead out of the run's folder, or are none
    "run_name=../../escaped",
    "run_name=..",
    "run_name=.",
    "run_name=''",
    "run_name=a/../../../escaped",
    "run_name=' '",
    "callbacks.sample_grid.folder=../../../escaped",
    "callbacks.sample_grid.folder=..",
    "callbacks.metrics.folder=../../../escaped",
    "callbacks.metrics.folder=''",
    "callbacks=ladder callbacks.ladder.evaluation.count=2 callbacks.ladder.export_folder=../../../escaped",
    "callbacks=ladder callbacks.ladder.evaluation.count=2 callbacks.ladder.export_folder=..",
)
OPEN = (  # may be accepted or not
    "optim={}",
    "optim.student={}",
    "data.train={}",
    "backbone={}",
    "run_name=grün",
    "run_name=a#b",
    "trainer.max_steps=0",
    "callbacks.sample_grid.folder=checkpoints",
    "hydra.run.dir=a#b",
    "run_name=" + "x" * 300,
    "run_name='a\nb'",
)
GOOD = (  # must be accepted
    "run_name='grün'",
    "run_name=a.b-c_1",
    "run_name='with blank'",
    "callbacks=none",
    "callbacks=none ema.decay=0.9",
    "schedule=fixed",
    "ema=none",
    "logger=none",
    "logger=csv",
    "checkpoint.keep=null",
    "checkpoint.best=val/energy_distance/student_4",
    "data.num_workers=1",
    "trainer.limit_val_batches=0",
    "compute.accumulate=2",
    "lora=none",
    "seed=4294967295",
)


def option_cases() -> list[Case]:
    """A wrong value and the edges of every option, the senseless ones by its name, and what is written wrongly."""
    cases = []
    for base in ("toy", "sd3"):
        for key, value in leaves(base):
            cases += _of_leaf(base, key, value)
    for kind, texts, expects in (
        ("options", WRITTEN, "refused"),
        ("options", LIGHTNING, "either"),
        ("options", OPEN, "either"),
        ("names", NAMES, "refused"),
        ("good inputs", GOOD, "runs"),
    ):
        for text in texts:
            more = [text] if "'" in text else text.split(" ")
            cases.append(Case(kind, f"toy {text[:90]}", "train", [*TOY, *more], expects))
    return cases


def _of_leaf(base: str, key: str, value: Any) -> Iterator[Case]:
    senseless, edges = _values(key, value)
    overrides = TOY if base == "toy" else SD3
    if base == "sd3" and key.startswith("callbacks."):
        overrides = [text for text in SD3 if text != "callbacks=none"]
        overrides += [f"callbacks.ladder.evaluation.{name}=2" for name in ("count", "batch_size")]
    for texts, expects in ((senseless, "refused"), (edges, "either")):
        for text in texts:
            if text not in ENDLESS.get(key, ()):
                yield Case("options", f"{base} {key}={text[:40]}", "train", [*overrides, f"{key}={text}"], expects)


def _values(key: str, value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Senseless values of an option, and values at the edge of sense."""
    group, _, name = key.rpartition(".")
    named = SENSELESS.get("decay" if group.endswith("levels") and name in ("low", "high") else name, ())  # sigmas
    if isinstance(value, bool):
        return WRONG_FOR_TRUTHS, EDGES_FOR_TRUTHS
    if isinstance(value, int | float):
        wrong = tuple(text for text in WRONG_FOR_NUMBERS if text != "true" or key != "compute.gradient_checkpointing")
        return tuple(dict.fromkeys((*wrong, *named))), tuple(text for text in EDGES_FOR_NUMBERS if text not in named)
    if isinstance(value, ListConfig):
        return WRONG_FOR_LISTS, EDGES_FOR_LISTS
    if value is None:
        return tuple(named), ("abc", "-1", "[a]", "{a: 1}", "nan")
    return WRONG_FOR_TEXTS, EDGES_FOR_TEXTS


@cache
def leaves(base: str) -> tuple[tuple[str, Any], ...]:
    """The options of an experiment and their values; those that only refer to others are left out."""
    from cdm_lightning.config import compose

    config = compose([*(TOY if base == "toy" else (text for text in SD3 if text != "callbacks=none")), "output_dir=."])
    return tuple(_leaves(config, ""))


def _leaves(node: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in node:
        key = f"{prefix}{name}"
        if (
            name in FREE
            or key in UNCHECKED
            or OmegaConf.is_interpolation(node, name)
            or OmegaConf.is_missing(node, name)
        ):
            continue
        if isinstance(node[name], DictConfig):
            yield from _leaves(node[name], f"{key}.")
        else:
            yield key, node[name]


def chosen(cases: list[Case], count: int, rng: random.Random) -> list[Case]:
    """So many of the cases, each name of an option once before any comes twice."""
    shuffled = rng.sample(cases, len(cases))
    groups: dict[str, list[Case]] = {}
    for case in shuffled:
        groups.setdefault(case.name.partition("=")[0], []).append(case)
    ordered: list[Case] = []
    while len(ordered) < len(cases):
        for group in groups.values():
            if group:
                ordered.append(group.pop())
    return ordered[:count]
