"""Faults of model folders: parts that are missing, settings of another kind, weights that are not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cdm_lightning.backbones.families import open_pipeline
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.errors import UserError


@pytest.fixture
def folder(tiny_pipeline_folder, tmp_path) -> Path:
    """A copy of the tiny pipeline to break."""
    return shutil.copytree(tiny_pipeline_folder, tmp_path / "model")


def use(folder: Path) -> None:
    """Do what training does with a model folder before its first iteration."""
    backbone, _ = open_pipeline(str(folder))
    _ = backbone.fingerprint, backbone.latent_shape, backbone.scheduler
    backbone.build_network()
    backbone.setup(torch.device("cpu"))


def refusal(folder: Path) -> str:
    """The one line with which the use of a broken folder ends."""
    with pytest.raises(UserError) as caught:
        use(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, *keys: str, to: object) -> None:
    """Set one value of a JSON file."""
    settings = json.loads(path.read_text())
    inner = settings
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "part",
    [
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "vae",
        "scheduler",
        "transformer",
    ],
)
def test_a_part_that_is_missing_is_named(folder, part):
    shutil.rmtree(folder / part)
    assert f"{folder}: the part {part} is missing, but model_index.json names it" in refusal(folder)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_a_tokenizer_without_words_is_refused(folder, part):
    vocabulary = folder / part / "tokenizer.json"
    assert vocabulary.is_file()
    vocabulary.rename(folder / "kept")
    assert f"{folder / part} has no vocabulary" in refusal(folder)
    vocabulary.write_bytes(b"")
    assert f"{vocabulary} cannot be read" in refusal(folder)
    (folder / "kept").rename(vocabulary)
    settings = json.loads(vocabulary.read_text())
    vocab = settings["model"]["vocab"]
    settings["model"]["vocab"] = vocab[:1] if isinstance(vocab, list) else {}
    vocabulary.write_text(json.dumps(settings))
    assert str(folder / part) in refusal(folder)


JSON_FILES = [
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"text"', "[" * 100_000, "\ufeff\ufffe"])
def test_settings_that_are_no_object_name_their_file(folder, file, text):
    (folder / file).write_text(text)
    assert str(folder / file) in refusal(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model_index.json", "vae", 7),
        ("model_index.json", "vae", ["diffusers"]),
        ("model_index.json", "tokenizer", ["transformers", 3]),
        ("model_index.json", "transformer", "SD3Transformer2DModel"),
        ("model_index.json", "vae", ["diffusers", "SD3Transformer2DModel"]),
        ("transformer/config.json", "patch_size", 0),
        ("transformer/config.json", "patch_size", "2"),
        ("transformer/config.json", "in_channels", None),
        ("transformer/config.json", "in_channels", -4),
        ("transformer/config.json", "num_layers", "two"),
        ("transformer/config.json", "num_attention_heads", 0),
        ("transformer/config.json", "attention_head_dim", [16]),
        ("transformer/config.json", "sample_size", "large"),
        ("transformer/config.json", "sample_size", -1),
        ("transformer/config.json", "pos_embed_max_size", 0),
        ("transformer/config.json", "joint_attention_dim", {}),
        ("vae/config.json", "block_out_channels", 8),
        ("vae/config.json", "block_out_channels", []),
        ("vae/config.json", "scaling_factor", "1.5"),
        ("vae/config.json", "shift_factor", [0.1]),
        ("vae/config.json", "latent_channels", "four"),
        ("scheduler/scheduler_config.json", "shift", "three"),
        ("scheduler/scheduler_config.json", "shift", 0),
        ("scheduler/scheduler_config.json", "shift", float("nan")),
        ("scheduler/scheduler_config.json", "shift", [3]),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "1000"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10.5),
        ("tokenizer/tokenizer_config.json", "model_max_length", "long"),
        ("text_encoder/config.json", "hidden_size", "wide"),
        ("text_encoder/config.json", "num_attention_heads", 0),
        ("text_encoder_3/config.json", "d_model", None),
        ("text_encoder_3/config.json", "vocab_size", 3),
    ],
)
def test_values_that_nothing_can_be_built_from_are_one_line(folder, file, key, value):
    edit(folder / file, key, to=value)
    assert str(folder / Path(file).parts[0]) in refusal(folder)


def test_tokens_beyond_the_embedding_are_refused(folder):
    """The weights and the settings agree, but the tokenizer belongs to a larger vocabulary."""
    file = folder / "tokenizer" / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocab = settings["model"]["vocab"]
    assert isinstance(vocab, dict)
    word = max(vocab, key=vocab.get)
    vocab[f"{word}x"] = 10_000_000
    file.write_text(json.dumps(settings))
    said = refusal(folder)
    assert f"{folder / 'tokenizer'}: the tokenizer has token ids up to 10000000, but its text encoder has only" in said


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
@pytest.mark.parametrize("fault", ["gone", "zero bytes", "cut", "pickle", "a folder"])
def test_weights_that_are_not_there_name_their_file(folder, part, fault):
    (file,) = (folder / part).glob("*.safetensors")
    content = file.read_bytes()
    file.unlink()
    if fault == "zero bytes":
        file.write_bytes(b"")
    if fault == "cut":
        file.write_bytes(content[:-8])
    if fault == "pickle":
        file.with_suffix(".bin").write_bytes(b"\x80\x04.")
    if fault == "a folder":
        file.mkdir()
    said = refusal(folder)
    assert str(folder / part) in said
    assert ("can contain programs" in said) == (fault == "pickle")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"a": "model-1.safetensors"}, "model-1.safetensors is missing"),
        ({"a": "../secret.safetensors"}, "must name a file for each tensor"),
        ({"a": 7}, "must name a file for each tensor"),
        ({}, "must name a file for each tensor"),
        ([], "must name a file for each tensor"),
    ],
)
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_shards_that_an_index_names_must_be_there(folder, part, shards, message):
    (file,) = (folder / part).glob("*.safetensors")
    (folder / part / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    said = refusal(folder)
    assert message in said
    assert str(folder / part) in said


@pytest.mark.parametrize(
    "text", ["[]", '{"height": "tall"}', '{"num_inference_steps": 0}', '{"guidance_scale": []}', "{"]
)
def test_the_call_of_an_exported_folder_is_checked(folder, text):
    (folder / "call.json").write_text(text)
    assert str(folder / "call.json") in refusal(folder)


def test_a_whole_folder_is_used_as_before(folder):
    backbone = SD3Backbone(str(folder))
    backbone.setup(torch.device("cpu"))
    assert backbone.encode_prompts(["a ring"])["prompt_embeds"].isfinite().all()
