"""Every option has a kind, every value is checked against it before anything is built, and what comes at the end is checked too."""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from cdm_lightning import export, extract_lora, plan, pretrain, sample
from cdm_lightning.config import compose
from cdm_lightning.config.arguments import alternatives, annotations_of, check_arguments
from cdm_lightning.config.folders import folders_to_write, require_writable_folders
from cdm_lightning.config.libraries import INSTEAD, OPTIONS
from cdm_lightning.config.whole import OBJECTS, check_config
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.pictures import require_one_picture
from cdm_lightning.kinds import AnyFinite, Count, FolderToWrite, PathKind, Share, Text

CONF = Path(__file__).parents[2] / "conf"


# ---- every option has a kind


def targets(node: Any) -> Iterator[str]:
    """The `_target_`s of a file of the configuration."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(child)
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield node["_target_"]


def without_kind(name: str, hint: Any) -> list[str]:
    """What in an annotation is a number without a range, a text without a meaning or a path without a kind."""
    found = []
    for kind in alternatives(hint):
        base, marks = (get_args(kind)[0], get_args(kind)[1:]) if get_origin(kind) is Annotated else (kind, ())
        if get_origin(base) is not Literal and get_origin(base) is not None:
            found += [wrong for part in get_args(base) for wrong in without_kind(name, part) if part is not Ellipsis]
        elif base in (int, float) and not any(isinstance(mark, Ge | Gt | AnyFinite) for mark in marks):
            found.append(f"{name}: a number without a range")
        elif base in (int,) and not any(isinstance(mark, Le | Lt) for mark in marks) and name != "indices":
            found.append(f"{name}: a whole number without an upper limit")
        elif base is str and not any(isinstance(mark, Text | PathKind) for mark in marks) and name != "prompts":
            found.append(f"{name}: a text without choices or meaning")
        elif base is Path and not any(isinstance(mark, PathKind) for mark in marks):
            found.append(f"{name}: a path without a kind")
    return found


def constructor_without_kind(target: Any) -> list[str]:
    function = target.__init__ if isinstance(target, type) else target
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    untold = [
        name for name in inspect.signature(target).parameters if name not in hints and name not in ("args", "kwargs")
    ]
    return [
        *untold,
        *(
            wrong
            for name, hint in hints.items()
            if get_origin(hint) is not Callable
            for wrong in without_kind(name, hint)
        ),
    ]


def test_every_constructor_that_conf_names_says_the_kind_of_each_option():
    named = {target for file in CONF.rglob("*.yaml") for target in targets(yaml.safe_load(file.read_text()))}
    own = sorted(name for name in named if name.startswith("cdm_lightning.") and name not in OPTIONS)
    assert len(own) > 50
    assert {name: wrong for name in own if (wrong := constructor_without_kind(get_object(name)))} == {}
    assert named - set(own) <= OPTIONS.keys()
    for library, options in OPTIONS.items():
        assert [wrong for name, hint in options.items() for wrong in without_kind(name, hint)] == [], library


def test_an_option_without_a_kind_is_seen():
    def make(
        rate: float, name: str | None, sizes: Sequence[int], folder: str | Path, good: Count, mode: Literal["a"]
    ) -> None: ...

    assert [wrong.partition(":")[0] for wrong in constructor_without_kind(make)] == [
        "rate",
        "name",
        "sizes",
        "folder",
        "folder",
    ]

    def untold(rate) -> None: ...

    assert constructor_without_kind(untold) == ["rate"]


# ---- every value of every option

NOWHERE = ([1, "x", []], {"a": 1}, "a\0b")  # of no option
NO_NUMBERS = (*NOWHERE, math.nan, math.inf, -math.inf, True, "text", "", 10**30)
NEGATIVE = ("max_epochs", "devices", "mean", "value", "teacher_lora_scale")  # numbers that may be -1
WITHOUT_END = ("max_grad_norm",)  # numbers that may be infinite
SWITCHES = ("gradient_checkpointing",)  # numbers that may be a truth value


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[DictConfig | ListConfig, str | int, str]]:
    """The place, the name and the dotted key of each option that holds a value of its own."""
    for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
        key = f"{prefix}{name}"
        if str(name).startswith("_") or OmegaConf.is_missing(node, name):
            continue
        raw = node._get_node(name)._value()
        if isinstance(node[name], DictConfig | ListConfig):
            if not isinstance(raw, str):
                yield from leaves(node[name], f"{key}.")
        elif not (isinstance(raw, str) and "${" in raw):
            yield node, name, key


def senseless(key: str, value: Any) -> list[Any]:
    """Values that make no sense for an option whose value is this one."""
    name = key.rpartition(".")[2]
    if isinstance(value, bool):
        return [*NOWHERE, "text", math.nan, 2.5, -1]
    if isinstance(value, int | float):
        bad = [
            one
            for one in NO_NUMBERS
            if not (one in (math.inf, 10**30) and name in WITHOUT_END) and not (one is True and name in SWITCHES)
        ]
        if name == "devices":  # a text and a list have a meaning here
            bad = [one for one in bad if one not in (10**30,)]
        bad += [] if name in NEGATIVE else [-1]
        return bad + ([2.5] if isinstance(value, int) and name not in ("shard_megabytes", "remember_megabytes") else [])
    return list(NOWHERE)


def refusal_of(config: DictConfig, node: DictConfig | ListConfig, key: str) -> str | None:
    """The line for a value in `node`, whose option is `key`. Only the object that takes the option is checked, which is faster."""
    try:
        if key.partition(".")[0] not in OBJECTS:
            check_config(config)
        else:
            while not (isinstance(node, DictConfig) and "_target_" in node):
                node = node._get_parent()
            check_arguments(node, node._get_full_key(""))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("experiment", ["toy2d_cdm", pytest.param("tiny_sd3_cdm", marks=pytest.mark.slow)])
def test_no_senseless_value_is_accepted_and_each_is_refused_in_one_line(experiment, tmp_path):
    config = compose([f"experiment={experiment}", f"output_dir={tmp_path}"])
    check_config(config)
    OmegaConf.set_struct(config, False)
    tried, accepted = 0, []
    for node, name, key in list(leaves(config)):
        if experiment == "tiny_sd3_cdm" and not key.startswith(("backbone", "callbacks.ladder", "metric.f", "data.")):
            continue  # as in toy2d_cdm
        before = node._get_node(name)._value()
        for value in senseless(key, before):
            node[name] = value
            tried += 1
            line = refusal_of(config, node, key)
            node[name] = before
            if line is None:
                accepted.append((key, value))
            else:
                assert "\n" not in line
                assert key in line or key.rpartition(".")[0] in line, line
    assert accepted == []
    assert tried > 150
    check_config(config)


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    config = compose(["experiment=toy2d_cdm", "output_dir=outputs/nowhere"])
    OmegaConf.set_struct(config, False)
    return config


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("+sheduler.length=3", "the option sheduler has no effect, because nothing uses it; did you mean schedule"),
        (
            "+max_steps=3",
            "the option max_steps has no effect, because nothing uses it; did you mean trainer.max_steps?",
        ),
        ("+validation.every=3", "the option validation.every has no effect"),
        ("+modul=3", "did you mean module?"),
    ],
)
def test_an_added_option_that_is_a_mistake_for_another_is_refused(added, told):
    config = compose(["experiment=toy2d_cdm", "output_dir=outputs/nowhere", added])
    with pytest.raises(UserError) as refused:
        check_config(config)
    assert told in str(refused.value)


def test_an_added_option_may_be_a_note_or_be_used_by_others():
    overrides = [
        "+my.width=32",
        "+most=7",
        "+note=second_try",
        "trainer.max_steps=${most}",
        "checkpoint.every=${my.width}",
    ]
    config = compose(["experiment=toy2d_cdm", "output_dir=outputs/nowhere", *overrides])
    check_config(config)
    assert (config.trainer.max_steps, config.checkpoint.every) == (7, 32)
    check_config(OmegaConf.create(OmegaConf.to_yaml(config, resolve=True)))  # as the started processes read it


@pytest.mark.parametrize(
    "group", ["module", "optim", "data", "backbone", "trainer", "schedule", "objective", "strategy", "checkpoint"]
)
def test_whole_groups_of_the_wrong_kind(group, composed):
    for value in (None, 3, [3], {}, "text"):
        config = copy.deepcopy(composed)
        config[group] = value
        if not (group == "optim" and value == {}):
            with pytest.raises(UserError, match=f"^{group}"):
                check_config(config)
    del config[group]
    with pytest.raises(UserError, match=f"the option {group} is required, but missing"):
        check_config(config)


def test_numbers_are_told_with_their_range():
    from cdm_lightning.kinds.values import told

    assert told([Count]) == "a whole number of at least 1 and at most 1e9"
    assert told([Share, type(None)]) == "a number of at least 0 and at most 1 or null"
    assert told(alternatives(FolderToWrite)) == "a folder to write"


# ---- through the command line


def own_file(folder: Path, name: str, text: str) -> str:
    """Write a file of the configuration and return the override that adds its folder."""
    path = folder / "mine" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"hydra.searchpath=[file://{folder / 'mine'}]"


def test_the_place_where_a_value_was_set_is_named(refused, tmp_path):
    assert refused("data.batch_size=0").endswith("and at most 1e6 (set on the command line)")
    (tmp_path / "mine/experiment").mkdir(parents=True)
    added = own_file(tmp_path, "experiment/mine", "# @package _global_\ndefaults: [toy2d_cdm]\ndata: {batch_size: 0}\n")
    line = refused(added, base=["experiment=mine"])
    assert line.endswith("(set in mine/experiment/mine.yaml)"), line


def test_files_of_the_configuration_with_mistakes(refused, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/metric").mkdir(parents=True)
    broken = own_file(tmp_path, "experiment/broken", "# @package _global_\ndata:\n  batch_size: [1\nseed: 3\n")
    assert "experiment/broken.yaml, line 4: this is not valid YAML" in refused(broken, base=["experiment=broken"])
    bare = own_file(tmp_path, "experiment/bare", "defaults: [toy2d_cdm]\ndata: {batch_size: 4}\n")
    assert "must begin with the line `# @package _global_`" in refused(bare, base=["experiment=bare"])
    bare = own_file(tmp_path, "metric/bare", "metric:\n  mine: {_target_: cdm_lightning.metrics.base.Metric}\n")
    assert "metric=NAME selects must begin with the line" in refused(bare, "metric=[bare]")


def test_words_that_need_quotes(refused):
    line = refused("data.train.path=grün#1.txt")
    assert line.endswith("""as in 'data.train.path="grün#1.txt"'""")
    assert "write KEY=VALUE" in refused("trainer.max_steps")


def test_lightnings_options_name_what_to_use_here(refused):
    some = {
        "accumulate_grad_batches=2": "set compute.accumulate",
        "gradient_clip_val=1": "set optim.NETWORK.max_grad_norm",
        "strategy=ddp": "strategy=ddp, fsdp2 or hsdp",
        "limit_train_batches=3": "set trainer.max_steps",
    }
    for option, cure in some.items():
        assert cure in refused(f"+trainer.{option}")
    known = annotations_of("lightning.pytorch.Trainer")
    assert INSTEAD.keys() <= known.keys()


def test_what_comes_at_the_end_is_checked_before_the_first_step(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "checkpoint.folder=file/x cannot be written" in refused("checkpoint.folder=file/x")
    small = ("callbacks=ladder", "callbacks.ladder.evaluation.count=2")
    assert "export_nfe=0 must be a whole number of at least 1" in refused(*small, "callbacks.ladder.export_nfe=0")
    line = refused(
        "callbacks=metrics",
        "metric=[energy_distance]",
        "trainer.limit_val_batches=1",
        "checkpoint.best=val/none_such/x",
    )
    assert (
        "checkpoint.best=val/none_such/x must be a figure that validation logs; set it to one of these: val/energy_distance/"
        in line
    )
    line = refused("callbacks=metrics", "metric=[shapes_adherence]", "trainer.limit_val_batches=1")
    assert "metric.adherence cannot measure images of prompt 1" in line
    one = ("callbacks=metrics", "metric=[energy_distance]", "trainer.limit_val_batches=1", "data.val_prompts=1")
    line = refused(*one, "checkpoint.best=val/energy_distance/student_4")
    assert "checkpoint.best=val/energy_distance/student_4 must be a figure that validation logs" in line  # of 1 image
    line = refused("metric=[shapes_frechet]", "metric.frechet_real.reference.count=1")
    assert "metric.frechet_real.reference.count=1 must be a whole number of at least 2" in line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["~data.val"], "data: the option val is missing; set it"),
        (["~run_name"], "hydra.run.dir refers to the option run_name, which is missing; set run_name=VALUE"),
        (["~checkpoint.folder"], "the option checkpoint.folder is required, but missing; set checkpoint.folder=VALUE"),
        (
            ["~trainer.devices"],
            "strategy.devices=${trainer.devices} cannot be resolved (Interpolation key 'trainer.devices' not found)",
        ),
        (["hydra.run.dir=null"], "cannot apply hydra.run.dir=null: "),
        (["hydra.run.dir=''"], "hydra.run.dir is empty; set a folder"),
        (
            ["optim.student.learning_rate.peak=???"],
            "optim.student.learning_rate.peak is required, but has no value; set ",
        ),
        (["trainer.max_steps='3'"], "trainer.max_steps='3' must be a whole number"),
    ],
)
def test_what_is_missing_or_misread_says_what_to_type(overrides, line, refused):
    said = refused(*overrides)
    assert line in said
    assert "object_type" not in said
    assert "full_key" not in said


def test_objects_of_another_class(refused):
    assert "module._target_=builtins.dict gives a dict, but module must be a CDMModule" in refused(
        "module._target_=builtins.dict"
    )
    for key in ("resolution", "schedule.length", "objective.ca_levels"):
        said = f"{key}._target_=builtins.object is the class object, but {key} must be "
        assert said in refused(f"{key}._target_=builtins.object")
    lightnings = "lightning.pytorch.strategies.DDPStrategy"
    assert "cannot be used here; choose a group: strategy=ddp" in refused(f"strategy._target_={lightnings}")
    assert "callbacks.mine must be a Callback" in refused("+callbacks.mine._target_=builtins.dict")
    assert "compute.compile_backend=fast is no backend of torch.compile" in refused("compute.compile_backend=fast")
    assert "backbone._target_=no.such cannot be found" in refused("backbone._target_=no.such")


def test_any_schedule_and_any_callbacks_go_with_the_demo(tmp_path):
    for group in ("schedule", "callbacks", "ema"):
        for option in sorted(path.stem for path in (CONF / group).glob("*.yaml")):
            config = compose(["experiment=tiny_sd3_cdm", f"output_dir={tmp_path}", f"{group}={option}", "seed=1"])
            check_config(config)
    compose(["experiment=tiny_sd3_cdm", f"output_dir={tmp_path}", "callbacks=none", "ema.decay=0.9"])


# ---- arguments of the other commands


@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        (sample, ["--guidance-scale", "nan"], "'nan' must be a number"),
        (sample, ["--guidance-scale", "inf"], "'inf' must be a number"),
        (sample, ["--steps", "1e6"], "'1e6' must be a whole number of at least 1 and at most 1000"),
        (sample, ["--steps", "1000000"], "at most 1000"),
        (sample, ["--batch-size", "0"], "--batch-size: '0' must be a whole number of at least 1"),
        (sample, ["--seed", "-1"], "--seed: '-1' must be a whole number of at least 0"),
        (sample, ["--height", "99999999"], "at most 32768"),
        (sample, ["--output", "x" * 300 + ".png"], "a name in it is longer than 255 bytes"),
        (sample, ["--output", "a\0b.png"], "it has a NUL character"),
        (sample, ["--output", ""], "it is empty"),
        (sample, ["--output", "."], "is a folder"),
        (sample, ["--nonsense"], "unrecognized arguments: --nonsense"),
        (sample, ["--guidance-scale", "1e300"], "must be a number of at least 0 and at most 1000"),
        (sample, ["--guidance-scale", "-1"], "must be a number of at least 0"),
        (sample, ["--batch-size", "1e9"], "must be a whole number"),
        (sample, ["--batch-size", "10000000"], "at most 1e6"),
        (sample, ["--width", "0"], "--width: '0' must be a whole number of at least 1"),
        (export, ["--nfe", "0"], "--nfe: '0' must be a whole number of at least 1 and at most 1000"),
        (export, ["--nfe", "1000000"], "at most 1000"),
        (export, ["--nfe", "nan"], "'nan' must be a whole number"),
        (export, ["--nfe", "1.5"], "'1.5' must be a whole number"),
        (export, ["--height", "-8"], "--height: '-8' must be a whole number of at least 1"),
        (export, ["--width", "1e5"], "'1e5' must be a whole number of at least 1 and at most 32768"),
        (export, ["--output", "a\0b"], "it has a NUL character"),
        (export, ["--output", "x" * 300], "a name in it is longer than 255 bytes"),
        (export, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (export, ["--form", "weights", "--nfe", "2"], "--nfe 2 has no effect with --form weights; leave it out"),
        (
            export,
            ["--form", "checkpoint", "--dtype", "float16"],
            "--dtype float16 has no effect with --form checkpoint",
        ),
        (sample, ["--output", "a.jpg"], "--output=a.jpg: the picture is a PNG file; pass a name that ends in .png"),
        (extract_lora, ["--rank", "0"], "--rank: '0' must be a whole number of at least 1"),
        (extract_lora, ["--rank", "1.5"], "must be a whole number"),
    ],
)
def test_arguments_of_commands(command, arguments, line, capsys):
    good = {
        export: ["run", "--output", "out"],
        sample: ["--model", "m", "--prompt", "p"],
        extract_lora: ["--base", "a", "--tuned", "b", "--output", "c"],
    }
    with pytest.raises(SystemExit) as stop:
        command.main([*good[command], *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("utilisation=2", "must be a number of at least 0.0001 and at most 1"),
        ("utilisation=1e-300", "must be a number of at least 0.0001 and at most 1"),
        ("peak_tflops=nan", "must be a number of at least 0.001"),
        ("peak_tflops=1e-12", "must be a number of at least 0.001"),
        ("peak_tflops=1e300", "must be a number of at least 0.001 and at most 1e6"),
        (f"gpus={'9' * 5000}x80", "gpus=9{60}: write COUNTxGB, for example"),
        (f"gpus=1x{'9' * 400}", "with a whole COUNT of at most 100,000 and GB from 0.001 to 100,000"),
        ("gpus=100001x80", "with a whole COUNT of at most 100,000"),
        ("gpus=1x0.0001", "GB from 0.001"),
        ("reserve=1", "must be a number of at least 0 and below 1"),
        ("json=.", "is a folder"),
        ("json=", "it is empty"),
        ("trainer.max_steps=nan", "trainer.max_steps=nan must be a whole number"),
        ("compute.accumulate=1.5", "compute.accumulate=1.5 must be a whole number"),
    ],
)
def test_arguments_of_the_planner(argument, line):
    with pytest.raises(UserError, match=line):
        plan.plan(["experiment=toy2d_cdm", "gpus=1x8", argument])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("+foo=1", "foo is no option of pretrain; the options are: output, work_dir"),
        ("+thread=1", "thread is no option of pretrain; did you mean threads?"),
        ("+recipe.clap={lr: 1}", "recipe.clap is no option of pretrain; did you mean recipe.clip?"),
        ("+vae.lr=1", "vae is no option of pretrain"),
    ],
)
def test_unknown_options_of_pretrain(override, line):
    with pytest.raises(UserError, match=re.escape(line)):
        pretrain.check_options(compose(["stages=[]", override], "pretrain"))
    pretrain.check_options(compose(["stages=[]"], "pretrain"))


def test_one_picture_has_an_end():
    require_one_picture(200, (32, 32))
    with pytest.raises(UserError, match=r"2,048 images are too many for one picture \(1,016 x 79,376 pixels"):
        require_one_picture(2048, (32, 32))


def test_a_truth_value_as_a_folder_is_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose(["experiment=toy2d_cdm", "output_dir=true"])
    check_config(config)
    require_writable_folders(config)
    assert ("checkpoint.folder", Path("True/checkpoints")) in folders_to_write(config, "", Path(str(config.output_dir)))
