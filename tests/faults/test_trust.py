"""A run's folder and a pipeline's folder are data: opening those of a stranger builds registered classes and nothing else."""

import itertools
import json
import os
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file

from cdm_lightning import sample
from cdm_lightning.backbones.families import BACKBONES
from cdm_lightning.backbones.pipeline_folder import copy_parts, read_index
from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import build, compose, registered
from cdm_lightning.errors import UserError
from cdm_lightning.export import export_checkpoint
from cdm_lightning.run.folder import Run
from cdm_lightning.run.same import require_same_configuration
from cdm_lightning.run.student import build_parts, open_student
from cdm_lightning.train import train

TOY = {"_target_": "cdm_lightning.backbones.toy2d.Toy2DBackbone", "hidden": 16, "depth": 1, "fit_steps": 20}
ADAPTER = {"_target_": "cdm_lightning.lora.plan.Adapter", "rank": 2, "alpha": 2.0, "targets": ["linear"]}
PLAN = {"_target_": "cdm_lightning.lora.plan.LoRAPlan", "student": ADAPTER}
CALL = {"_target_": "pathlib.Path.write_text", "self": "pwned", "data": "x"}
SPY = "somebody_elses_module"

BACKBONE_ATTACKS = {
    "a function of the package": {
        "_target_": "cdm_lightning.distributed.launch.run_processes",
        "folder": "x",
        "processes": 1,
        "program": ["-c", "open('pwned', 'w')"],
    },
    "a function of the library": CALL,
    "a pickle": {"_target_": "torch.load", "f": "x.pt", "weights_only": False},
    "numpy": {"_target_": "numpy.load", "file": "x.npy", "allow_pickle": True},
    "the search path": {"_target_": "site.addsitedir", "sitedir": "."},
    "a module is imported": {"_target_": f"{SPY}.Backbone"},
    "through a module of ours": {"_target_": "cdm_lightning.backbones.toy2d.os.system", "command": "touch pwned"},
    "a class method of ours": {"_target_": "cdm_lightning.backbones.toy2d.Toy2DBackbone.build_network"},
    "a base class": {"_target_": "cdm_lightning.backbones.base.Backbone"},
    "another class of ours": {"_target_": "cdm_lightning.module.CDMModule"},
    "with a space": {**TOY, "_target_": " cdm_lightning.backbones.toy2d.Toy2DBackbone"},
    "with another case": {**TOY, "_target_": "cdm_lightning.backbones.toy2d.toy2dbackbone"},
    "below an argument": {**TOY, "hidden": CALL},
    "below two": {**TOY, "hidden": {"a": {"b": CALL}}},
    "in a list": {**TOY, "hidden": [[CALL]]},
    "in a text that is YAML": {**TOY, "hidden": "${oc.create:{_target_:os.system,command:x}}"},
    "partial": {**TOY, "_partial_": True},
    "args": {**TOY, "_args_": [16]},
    "not recursive": {**TOY, "_recursive_": False},
    "convert": {**TOY, "_convert_": "none"},
    "mode": {**TOY, "_mode_": "x"},
    "dunder": {**TOY, "__class__": "x"},
    "an environment variable": {**TOY, "hidden": "${oc.env:HF_TOKEN}"},
    "an escaped interpolation": {**TOY, "hidden": "\\${oc.env:HF_TOKEN}"},
    "a decoder": {**TOY, "hidden": "${oc.decode:'{_target_: os.system}'}"},
    "a part of the file": {**TOY, "hidden": "${lora}"},
    "no class": {"hidden": 16},
    "classes by name": {"a": TOY},
    "a list": [TOY],
    "a text": "cdm_lightning.backbones.toy2d.Toy2DBackbone",
    "a class that is a list": {**TOY, "_target_": ["os.system"]},
    "a class that is a mapping": {**TOY, "_target_": {"_target_": "os.system"}},
    "no backbone": None,
    "a LoRA plan": PLAN,
    "a key that is no name": {**TOY, "a.b": 1},
    "a key that is a number": {**TOY, 3: 1},
    "bytes": {**TOY, "hidden": b"16"},
    "deep": {**TOY, "hidden": json.loads("[" * 200 + "]" * 200)},
}
LORA_ATTACKS = {
    "a function": CALL,
    "in a role": {**PLAN, "student": CALL},
    "in an adapter": {**PLAN, "student": {**ADAPTER, "targets": [CALL]}},
    "a backbone": {**PLAN, "student": TOY},
    "a partial adapter": {**PLAN, "student": {**ADAPTER, "_partial_": True}},
    "an interpolation": {**PLAN, "student": {**ADAPTER, "targets": "${oc.env:HOME}"}},
    "an adapter as the plan": ADAPTER,
}
LEVELS = "abcdefghi"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(  # 3 kilobytes that stand for 3 thousand million values
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in itertools.pairwise(LEVELS)
)
BOMB += "backbone: *i\n"
MERGES = BOMB.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}")


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """`run_folder(backbone=...)` is a folder with this configuration; nothing is built but what is asked for."""
    spy = tmp_path / "path"
    spy.mkdir()
    (spy / f"{SPY}.py").write_text("open('imported', 'w').close()\nclass Backbone: pass\n")
    monkeypatch.syspath_prepend(spy)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")

    def made(**config) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"backbone": TOY, **config}))
        return folder

    return made


def refuse(folder: Path, monkeypatch) -> str:
    """Open the folder in every way that there is; the one line, which is the same in all of them. Nothing is built or left."""
    for name in ("__init__", "build_network"):
        monkeypatch.setattr(Toy2DBackbone, name, lambda *_, **__: pytest.fail("something was built"))
    monkeypatch.setattr("cdm_lightning.run.student.build", lambda *_: pytest.fail("something was built"))
    lines = set()
    for open_it in (
        lambda: open_student(folder),
        lambda: sample.sample_images(str(folder), ["north"]),
        lambda: export_checkpoint(folder, "exported"),
        lambda: export_checkpoint(folder, "exported", form="lora", pretrained="/elsewhere"),
    ):
        with pytest.raises(UserError) as error:
            open_it()
        lines.add(str(error.value))
    assert os.listdir() == []
    assert SPY not in sys.modules
    (line,) = lines
    assert "\n" not in line
    assert len(line) < 600
    assert "hf_of_the_environment" not in line
    return line


@pytest.mark.parametrize("attack", BACKBONE_ATTACKS)
def test_the_backbone_of_a_run_s_folder_is_a_registered_class_with_plain_arguments(attack, run_folder, monkeypatch):
    assert "config.yaml" in refuse(run_folder(backbone=BACKBONE_ATTACKS[attack]), monkeypatch)


@pytest.mark.parametrize("attack", LORA_ATTACKS)
def test_so_is_its_lora_plan(attack, run_folder, monkeypatch):
    if attack == "an adapter as the plan":
        with pytest.raises(UserError, match="`lora` must describe a LoRA plan"):
            build_parts(Run(run_folder(lora=ADAPTER)))
    else:
        assert "config.yaml: lora" in refuse(run_folder(lora=LORA_ATTACKS[attack]), monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "backbone: !!python/object/apply:os.system ['touch pwned']",
        "backbone: !!python/name:os.system",
        BOMB,
        "backbone: &a [*a]",
        "a: &a {x: 1}\nbackbone: {<<: *a}",
        MERGES,
        "backbone: " + "[" * 1200,
        "backbone: " + "a" * (5 << 20),
        "\x00",
        "backbone: \x07",
    ],
    ids=lambda text: text[:30],
)
def test_the_file_itself_is_a_plain_tree_of_bounded_size(text, run_folder, monkeypatch):
    folder = run_folder()
    (folder / "config.yaml").write_text(text)
    assert "cannot be read" in refuse(folder, monkeypatch)


def test_a_configuration_of_our_own_is_a_plain_tree(toy_run):
    folder = toy_run("trainer.max_steps=1", "lora=none").folder
    backbone, plan = build_parts(Run(folder))
    assert type(backbone) is Toy2DBackbone
    assert plan.of("student") is None
    assert open_student(folder).iteration == 1


def test_all_backbones_of_the_package_are_registered_and_their_options_are_plain():
    files = (Path(__file__).parents[2] / "conf/backbone").glob("*.yaml")
    nodes = [yaml.safe_load(file.read_text()) for file in files]
    nodes = [node for node in nodes if "_target_" in node]
    assert {node["_target_"] for node in nodes} == BACKBONES
    for node in nodes:
        registered.require_registered(node, BACKBONES, "here", "cdm_lightning.backbone")


def compose_tree(*overrides: str) -> dict:
    return OmegaConf.to_container(compose([*overrides, "output_dir=x"]), resolve=True)


def test_a_class_of_one_s_own_can_be_registered_in_two_ways(run_folder, monkeypatch):
    module = "own_family_for_a_test"
    Path(f"{module}.py").write_text("from cdm_lightning.backbones.toy2d import Toy2DBackbone as Own\n")
    monkeypatch.syspath_prepend(os.getcwd())
    folder = run_folder(backbone={**TOY, "_target_": f"{module}.Own"})
    with pytest.raises(
        UserError, match=rf"{registered.TRUSTED}=MODULE.CLASS, or .* in the group 'cdm_lightning.backbone'"
    ):
        build_parts(Run(folder))
    assert module not in sys.modules
    monkeypatch.setenv(registered.TRUSTED, f"other.Class, {module}.Own")
    assert isinstance(build_parts(Run(folder))[0], Toy2DBackbone)
    monkeypatch.delenv(registered.TRUSTED)
    group = "cdm_lightning.backbone"
    monkeypatch.setattr(
        registered, "entry_points", lambda group: [EntryPoint("own", f"{module}:Own", group)] * (group == group)
    )
    assert isinstance(build_parts(Run(folder))[0], Toy2DBackbone)
    monkeypatch.setattr(registered, "entry_points", lambda group: [])
    with pytest.raises(UserError, match=group):
        build_parts(Run(folder))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "state.json", "COMPLETE.json", "trainer.pt"])
def test_links_in_a_run_s_folder_are_not_followed(name, toy_run, tmp_path):
    made = toy_run("trainer.max_steps=1")
    secret = tmp_path / "secret"
    (made.folder / "metrics.json").write_text("{}")
    file = next(path for path in (made.folder / name, made.checkpoint / name) if path.exists())
    file.rename(secret)
    file.symlink_to(secret)
    is_read = read_checkpoint(made.checkpoint).trainer_state if name == "trainer.pt" else None
    with pytest.raises(UserError, match=r"link|cannot be read|not a cdm_lightning checkpoint|is good"):
        is_read() if is_read else export_checkpoint(made.folder, tmp_path / "exported")


def test_a_resumed_run_s_file_does_not_choose_what_is_imported(toy_run, toy_overrides, run_folder, tmp_path):
    made = toy_run("trainer.max_steps=1")
    saved = yaml.safe_load((made.folder / "config.yaml").read_text())
    now = compose_tree(*toy_overrides, f"output_dir={made.folder}")
    require_same_configuration(saved, now, made.folder)
    run_folder()
    for spoilt in (
        {**saved, "objective": {**saved["objective"], "_target_": f"{SPY}.Objective", "gone": 1}},
        {**saved, "extra": {"_target_": f"{SPY}.Objective", "x": 1}},
        {**saved, "schedule": {**saved["schedule"], "length": {"_target_": f"{SPY}.Length", "high": 3}}},
    ):
        with pytest.raises(UserError, match="another configuration"):
            require_same_configuration(spoilt, now, made.folder)
    assert SPY not in sys.modules


# ---- checkpoints


def test_a_checkpoint_names_no_file_outside_its_folder(toy_run, tmp_path):
    made = toy_run("trainer.max_steps=1")
    marker = made.checkpoint / "COMPLETE.json"
    content = json.loads(marker.read_text())
    shard = next(name for name in content["files"] if name.endswith(".safetensors"))
    shutil.copy(made.checkpoint / shard, made.folder / shard)
    for name in (f"../{shard}", str(made.folder / shard), f"../../run/{shard}"):
        files = {key: of for key, of in content["files"].items() if key != shard} | {name: content["files"][shard]}
        marker.write_text(json.dumps({"files": files}))
        (made.checkpoint / shard).unlink(missing_ok=True)
        with pytest.raises(UserError):
            Run(made.folder).checkpoint(made.checkpoint)
        with pytest.raises(UserError):
            _ = read_checkpoint(made.checkpoint).sizes


@pytest.mark.parametrize("header", [2**62, 2**40, 2**31, 10**6, 0])
def test_a_header_that_says_too_much_is_a_damaged_file(header, toy_run):
    made = toy_run("trainer.max_steps=1")
    shard = next(made.checkpoint.glob("*.safetensors"))
    shard.write_bytes(header.to_bytes(8, "little") + shard.read_bytes()[8:])
    with pytest.raises(UserError, match="cannot be read"):
        _ = read_checkpoint(made.checkpoint).sizes


def test_tensors_cannot_be_larger_than_the_files(toy_run):
    import torch

    made = toy_run("trainer.max_steps=1")
    shard = next(made.checkpoint.glob("*.safetensors"))
    lie = {"a": {"saved_offsets": [1 << 50]}}
    save_file({"a": torch.zeros(2)}, shard, metadata={"DCP_SHARDING_INFO": json.dumps(lie), "format": "pt"})
    with pytest.raises(UserError, match="cannot be read"):
        _ = read_checkpoint(made.checkpoint).sizes


# ---- pipelines


@pytest.fixture
def pipeline(tiny_pipeline_folder, tmp_path) -> Path:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline_folder, folder)
    return folder


@pytest.mark.parametrize(
    "name", ["../secret", "/etc", "a/../../planted", "a/b", "..", ".", "", "a\\b", "a\nb", "x" * 300, "a\0b"]
)
def test_a_part_of_a_pipeline_is_one_component_of_a_path(name, pipeline, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("x")
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "AutoencoderKL"]}))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(UserError, match="must be a name"):
        copy_parts(pipeline, target, without=())
    assert os.listdir(target) == []
    with pytest.raises(UserError, match="must be a name"):
        sample.sample_images(str(pipeline), ["a ring"])


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        [SPY, "Model"],
        ["diffusers", "DiffusionPipeline"],
        ["diffusers", "StableDiffusion3Pipeline"],
        ["diffusers", "utils"],
        ["diffusers", "NoSuchClass"],
        ["diffusers.pipelines", "X"],
        ["transformers", "a.b"],
        ["transformers"],
        [1, 2],
        ["transformers", None],
        [{"a": 1}, "b"],
    ],
    ids=str,
)
def test_a_part_is_a_part_of_two_libraries(entry, pipeline):
    index = json.loads((pipeline / "model_index.json").read_text())
    for name in ("text_encoder_3", "another"):
        (pipeline / "model_index.json").write_text(json.dumps({**index, name: entry}))
        with pytest.raises(UserError, match=r"cannot be loaded; use a pipeline|must be \[library, class\]"):
            sample.sample_images(str(pipeline), ["a ring"])


def test_the_indices_of_all_families_are_accepted(tiny_folder):
    from tiny_pipelines import FAMILIES

    for name in FAMILIES:
        assert read_index(tiny_folder(name), name)["_class_name"]


def test_only_the_run_s_student_is_built_from_a_run_s_folder():
    """No other module reads a run's configuration and builds objects: it would need this check too."""
    package = Path(__file__).parents[2] / "src/cdm_lightning"
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if ".config()" in (text := path.read_text()) and ("build(" in text or "instantiate(" in text)
    }
    assert readers == {
        "run/student.py",
        "train.py",
    }  # train.py compares it with the command line's and builds the latter


def test_the_command_line_may_name_any_class(toy_overrides, tmp_path):
    """What the user types is a program, as before."""
    config = compose([*toy_overrides, f"output_dir={tmp_path}", "+x={_target_: pathlib.PurePath}"])
    assert str(build(config, "x")) == "."
    assert callable(train)
