"""What is read from somebody else's run, checkpoint or text cache has the types, names and shapes of our own, or is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from cdm_lightning.checkpoint.stored import HEADER, read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.config.registered import typed_nodes
from cdm_lightning.data import text_shards
from cdm_lightning.errors import UserError
from cdm_lightning.export import export_checkpoint
from cdm_lightning.exporting.pipeline import model_card
from cdm_lightning.run.folder import Run
from cdm_lightning.run.same import require_same_configuration
from cdm_lightning.run.student import open_student
from cdm_lightning.train import train
from faults.test_stored import reseal

SD3 = {"_target_": "cdm_lightning.backbones.sd3.SD3Backbone", "pretrained": "somewhere"}
ADAPTER = {"_target_": "cdm_lightning.lora.plan.Adapter", "rank": 2, "alpha": 2.0, "targets": ["linear"]}


@pytest.fixture(scope="module")
def templates(toy_overrides, tmp_path_factory) -> dict[str, Path]:
    """A run of all weights and a run of LoRA adapters, of one iteration each; tests work on copies."""
    place = tmp_path_factory.mktemp("templates")
    for name, options in {
        "full": (),
        "lora": ("lora=lora", "lora.student.targets=blocks", "lora.fake_score.targets=blocks"),
    }.items():
        steps = ("trainer.max_steps=1", "checkpoint.every=1")
        train(compose([f"output_dir={place / name}", *toy_overrides, *steps, *options]))
    return {name: place / name for name in ("full", "lora")}


@pytest.fixture
def copied(templates, tmp_path):
    return lambda name: shutil.copytree(templates[name], tmp_path / name)


def refusal(task) -> str:
    with pytest.raises(UserError) as error:
        task()
    assert "\n" not in str(error.value)
    return str(error.value)


def told(task) -> str:
    """What the task returns, or "error: " and the line of its refusal."""
    try:
        return task()
    except UserError as error:
        return f"error: {error}"


# ---- the configuration of a run


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("text_dtype", [1]),
        ("text_dtype", "float8"),
        ("teacher_dtype", {"a": 1}),
        ("height", "abc"),
        ("height", 32.0),
        ("width", -8),
        ("width", True),
        ("teacher_lora_scale", "abc"),
        ("teacher_lora_scale", float("nan")),
        ("max_sequence_length", 1e9),
        ("pretrained", None),
        ("revision", [5]),
        ("teacher_lora", {"a": 1}),
        ("compact_text", "maybe"),
    ],
)
def test_the_backbone_s_options_have_their_kinds(option, value):
    line = refusal(lambda: typed_nodes({"backbone": {**SD3, option: value}}, Path("config.yaml")))
    assert line.startswith(f"config.yaml: backbone.{option}")
    typed_nodes({"backbone": SD3}, Path("config.yaml"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", "abc"),
        ("rank", 0),
        ("rank", 2.5),
        ("alpha", "x"),
        ("alpha", float("inf")),
        ("targets", 5),
        ("targets", [[5]]),
        ("use_dora", "x"),
    ],
)
def test_the_adapters_options_have_their_kinds(option, value):
    plan = {"_target_": "cdm_lightning.lora.plan.LoRAPlan", "student": {**ADAPTER, option: value}}
    assert f"lora.student.{option}" in refusal(lambda: typed_nodes({"lora": plan}, Path("config.yaml")))
    typed_nodes({"lora": {**plan, "student": ADAPTER}}, Path("config.yaml"))


@pytest.mark.parametrize(
    "change", [{"objective": 5}, {"module": [1]}, {"trainer": 5}, {"backbone": None}, {"optim": [1]}, {"data": "x"}]
)
def test_a_model_card_of_such_a_configuration_is_written_or_refused_in_one_line(change, copied):
    folder = copied("full")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | change))
    record = {"nfe": 4, "weights": "student", "iteration": 1, "dtype": "float32"}
    card = told(lambda: model_card("x", record, Run(folder)))
    assert "iterations of training | 1" in card or (card.startswith("error: ") and str(folder) in card)
    assert card.startswith("# x") or "\n" not in card


@pytest.mark.parametrize("change", ["trainer.devices", "data", "trainer"])
@pytest.mark.parametrize("value", [None, 5, "abc", {"a": 1}])
def test_a_damaged_configuration_of_the_run_itself_is_named_when_it_is_resumed(change, value, templates):
    config = yaml.safe_load((templates["full"] / "config.yaml").read_text())
    require_same_configuration(config, config, templates["full"])
    saved = json.loads(json.dumps(config))
    *above, last = change.split(".")
    node = saved[above[0]] if above else saved
    if value is None:
        del node[last]
    else:
        node[last] = value
    line = refusal(lambda: require_same_configuration(saved, config, templates["full"]))
    assert str(templates["full"]) in line


# ---- checkpoints


@pytest.mark.parametrize("value", [5, [[1]], "x", [1], None, True])
def test_a_record_whose_optimizers_are_no_mapping_is_refused(value, copied):
    folder = copied("full")
    path = next((folder / "checkpoints").glob("iteration_*"))
    single = export_checkpoint(folder, folder / "single.safetensors", form="checkpoint")
    record = json.loads((path / "state.json").read_text()) | {"optimizers": value}
    (path / "state.json").write_text(json.dumps(record))
    reseal(path)
    assert path.name in refusal(lambda: read_checkpoint(path))
    tensors, metadata = contents(single)
    save_file(tensors, single, metadata={**metadata, HEADER: json.dumps(record)})
    assert single.name in refusal(lambda: read_checkpoint(single))


def contents(file: Path) -> tuple[dict, dict]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


CHANGES = {
    "is missing": lambda tensors, name: tensors.pop(name),
    "has the shape": lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}),
    "instead of floating-point": lambda tensors, name: tensors.update({name: tensors[name].to(torch.int64)}),
    "belongs to another network": lambda tensors, name: tensors.update({f"{name}.x": tensors[name].clone()}),
}


@pytest.mark.parametrize("said", CHANGES)
@pytest.mark.parametrize("which", ["full", "lora"])
def test_tensors_that_do_not_fit_the_network_are_refused(which, said, copied, tmp_path):
    folder = copied(which)
    single = export_checkpoint(folder, tmp_path / "single.safetensors", form="checkpoint")
    tensors, metadata = contents(single)
    name = sorted(name for name in tensors if name.startswith("networks.student.") and tensors[name].shape[:1] > (1,))[
        -1
    ]
    CHANGES[said](tensors, name)
    save_file(tensors, single, metadata=metadata)
    line = refusal(open_student(single, "student").network)
    assert name in line
    assert said in line


# ---- text caches

MANIFEST = {
    "text_fingerprint": {"a": "b"},
    "dtype": "float32",
    "tensors": {"text": {"shape": [2, 3], "dtype": "float32"}},
    "format": 1,
}


@pytest.mark.parametrize(
    "change",
    [
        {"text_fingerprint": [1]},
        {"text_fingerprint": 5},
        {"text_fingerprint": {"a": 1}},
        {"dtype": "int8"},
        {"dtype": []},
        {"tensors": {}},
        {"tensors": [1]},
        {"tensors": {"text": 5}},
        {"tensors": {"text": {"shape": [10**30], "dtype": "float32"}}},
        {"tensors": {"text": {"shape": [10**9, 10**9], "dtype": "float32"}}},
        {"tensors": {"text": {"shape": [-1], "dtype": "float32"}}},
        {"tensors": {"text": {"shape": [1.5], "dtype": "float32"}}},
        {"tensors": {"text": {"shape": [2], "dtype": "load"}}},
        {"format": "1"},
        {"more": 1},
    ],
)
def test_a_manifest_that_says_something_else_is_refused(change, tmp_path):
    path = tmp_path / text_shards.MANIFEST
    path.write_text(json.dumps(MANIFEST))
    assert text_shards.read_manifest(tmp_path) is not None
    path.write_text(json.dumps(MANIFEST | change))
    assert refusal(lambda: text_shards.read_manifest(tmp_path)).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"keys": torch.zeros(2, 7, dtype=torch.uint8)},
        {"keys": torch.zeros((), dtype=torch.uint8)},
        {"keys": torch.zeros(2, 16)},
        {"keys": None},
        {"crc32": torch.zeros(3, dtype=torch.int64)},
        {"crc32": torch.zeros(2)},
        {"cond.text": torch.zeros(2, 3)},
        {"cond.text": torch.zeros(2, 2, 3, dtype=torch.int32)},
        {"cond.text": None},
    ],
)
def test_a_shard_with_other_tensors_is_refused(change, tmp_path):
    manifest = text_shards.Manifest(**MANIFEST)
    (tmp_path / text_shards.SHARDS).mkdir()
    path = text_shards.write_shard(tmp_path, manifest, [b"a" * 16, b"b" * 16], {"text": torch.ones(2, 2, 3)})
    assert list(text_shards.shard_keys(path, manifest)) == [b"a" * 16, b"b" * 16]
    tensors, metadata = contents(path)
    kept = {name: value for name, value in (tensors | change).items() if value is not None}
    save_file(kept, path, metadata=metadata)
    assert refusal(lambda: text_shards.shard_keys(path, manifest)).startswith(f"{path}: ")
