"""Faults of model folders: parts that are missing, settings of another kind, weights that are not there."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdm_lightning.backbones.families import open_pipeline
from cdm_lightning.backbones.pipeline_folder import copy_parts
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.backbones.transformer_files import TransformerFiles
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


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_that_does_not_say_how_long_texts_are_is_refused(folder, part):
    """transformers takes 10**30 tokens then, and the text encoder fails in words about something else."""
    for change in (lambda file: file.write_text("{}"), lambda file: file.unlink()):
        change(folder / part / "tokenizer_config.json")
        assert f"{folder / part}: model_max_length is missing in tokenizer_config.json" in refusal(folder)


def test_an_empty_scheduler_is_refused(folder):
    """diffusers would take a shift of 1, and all images would be others."""
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    assert "scheduler_config.json: the entry _class_name is missing" in refusal(folder)


def test_a_table_of_weights_is_not_printed(folder, capfd):
    (folder / "text_encoder/config.json").write_text("{}")
    refusal(folder)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_a_class_that_is_no_name_is_refused(folder):
    for value in (["StableDiffusion3Pipeline"], {"a": 1}, 3, None):
        index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": value}
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="_class_name must be a string"):
            open_pipeline(str(folder))


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
    "text",
    [
        "[]",
        '{"height": "tall"}',
        '{"height": 10000000}',
        '{"num_inference_steps": 0}',
        '{"num_inference_steps": 1000000000}',
        '{"num_inference_steps": true}',
        '{"max_sequence_length": 1e9}',
        '{"guidance_scale": []}',
        '{"guidance_scale": NaN}',
        "{",
    ],
)
def test_the_call_of_an_exported_folder_is_checked(folder, text):
    (folder / "call.json").write_text(text)
    assert str(folder / "call.json") in refusal(folder)


PARTS = ["transformer", "vae", "text_encoder", "text_encoder_3"]


def rewrite(folder: Path, part: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of a part's file."""
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def largest(tensors: dict[str, Tensor]) -> str:
    return max(tensors, key=lambda name: tensors[name].numel())


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_that_is_missing_is_not_filled_in(folder, part):
    gone = []
    rewrite(folder, part, lambda tensors: gone.append(tensors.pop(largest(tensors)) is None))
    assert gone
    said = refusal(folder)
    assert f"{folder / part}: the weight " in said
    assert " is missing; " in said


@pytest.mark.parametrize(
    ("part", "key"),
    [("transformer", "num_layers"), ("text_encoder", "num_hidden_layers"), ("text_encoder_2", "num_hidden_layers")],
)
def test_layers_are_not_dropped(folder, part, key):
    settings = json.loads((folder / part / "config.json").read_text())
    assert settings[key] > 1
    edit(folder / part / "config.json", key, to=1)
    said = refusal(folder)
    assert str(folder / part) in said
    if part != "transformer":  # its last block has another shape, so the loader itself refuses it
        assert "has no place in the model that config.json describes" in said


@pytest.mark.parametrize(
    ("part", "key"), [("transformer", "num_layers"), ("vae", "layers_per_block"), ("text_encoder_3", "num_layers")]
)
def test_a_model_without_end_is_not_begun(folder, part, key):
    edit(folder / part / "config.json", key, to=10**9)
    assert f"{folder / part / 'config.json'}: {key}=1000000000 must be at most 1000" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_not_finite_are_refused(folder, part, value):
    named = []

    def spoil(tensors: dict[str, Tensor]) -> None:
        named.append(largest(tensors))
        tensors[named[0]].view(-1)[-1] = value

    rewrite(folder, part, spoil)
    said = refusal(folder)
    assert f"{folder / part}: the weight {named[0]} has values that are not finite" in said


def test_rows_that_are_not_finite_are_refused(folder):
    """A sharded run reads rows alone."""
    file = rewrite(folder, "transformer", lambda tensors: tensors["proj_out.weight"][-1].fill_(float("nan")))
    files = TransformerFiles(str(folder))
    files.rows("proj_out.weight", 0, 1)
    with pytest.raises(UserError, match="not finite"):
        files.rows("proj_out.weight", 1, files.shape("proj_out.weight")[0])
    with pytest.raises(UserError, match=re.escape(str(file))):
        files.tensor("proj_out.weight")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
@pytest.mark.parametrize("part", PARTS)
def test_weights_of_whole_numbers_are_refused(folder, part, dtype):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[largest(tensors)] = tensors[largest(tensors)].to(dtype)

    file = rewrite(folder, part, spoil)
    assert f"{file}: the weight " in (said := refusal(folder))
    assert "weights must be floating-point numbers" in said


def test_a_backup_next_to_the_weights_does_not_count(folder):
    (file,) = (folder / "transformer").glob("*.safetensors")
    backup = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(backup, file.with_name("zz_backup.safetensors"))
    found = TransformerFiles(str(folder))
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in load_file(file).items())


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder of the user with a private file."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret.txt").write_text("a secret")
    return tmp_path / "home"


@pytest.mark.parametrize(
    "place", ["text_encoder/notes.json.txt", "vae/more", "notes", "vae/deep/more", ".part/secret.txt"]
)
@pytest.mark.parametrize("what", ["secret.txt", "."])
def test_links_that_leave_a_model_folder_are_refused_and_not_copied(folder, home, tmp_path, place, what):
    link = folder / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(home / what)
    if place.startswith(".part"):  # a hidden folder counts if the index makes it a part
        edit(folder / "model_index.json", ".part", to=["transformers", "CLIPTokenizer"])
    else:
        assert f"{place} is a link that leaves the folder" in refusal(folder)
    (tmp_path / "out").mkdir()
    if place != "notes":  # an export copies parts alone
        with pytest.raises(UserError, match="is a link that leaves the folder"):
            copy_parts(folder, tmp_path / "out", without=())
    assert not any("secret" in file.read_text() for file in (tmp_path / "out").rglob("*.txt"))


@pytest.mark.parametrize("to", ["..", ".", "../vae"])
def test_links_to_folders_further_up_have_no_end(folder, to):
    (folder / "vae" / "more").symlink_to(to)
    assert "vae/more is a link that leaves the folder" in refusal(folder)


def test_the_links_of_the_hub_s_cache_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for number, file in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        file.rename(blobs / f"{number}")
        file.symlink_to(Path(*[".."] * (len(file.relative_to(snapshot).parts) + 1), "blobs", f"{number}"))
    use(snapshot)
    (tmp_path / "out").mkdir()
    copy_parts(snapshot, tmp_path / "out", without=("transformer",))
    assert (tmp_path / "out" / "vae" / "config.json").read_text() == (folder / "vae" / "config.json").read_text()


def test_a_part_may_be_a_link_to_another_one(folder):
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "tokenizer_2").symlink_to("tokenizer")
    use(folder)


def test_a_whole_folder_is_used_as_before(folder):
    backbone = SD3Backbone(str(folder))
    backbone.setup(torch.device("cpu"))
    assert backbone.encode_prompts(["a ring"])["prompt_embeds"].isfinite().all()
