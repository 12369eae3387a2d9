"""The text cache: cached runs equal uncached ones, load no text encoder, and refuse what does not fit."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from waits import HERE, host_waits

from cdm_lightning import cache_text as cache_text_module
from cdm_lightning.backbones.pipeline_folder import hash_part
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.cache_text import cache_text, fill_cache, main
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.data.prompts import PromptList
from cdm_lightning.data.text_cache import StoredText, TextCacheSettings
from cdm_lightning.data.text_shards import MANIFEST, SHARDS, prompt_key, read_manifest
from cdm_lightning.errors import UserError
from cdm_lightning.files.leftovers import temporary_path
from cdm_lightning.train import train

PROMPTS = [f"a {size} {colour} ring" for size in ("small", "large") for colour in ("red", "green", "blue", "white")]
SHORT = (  # a run of the pipeline's own classes, as small as it goes, with a picture at its end
    "experiment=tiny_sd3_cdm",
    "callbacks=none",
    "backbone.compact_text=null",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "objective.student_every=2",
    "data.batch_size=4",
    "data.val_prompts=4",
    "schedule.length.high=3",
    "text_cache.batch_size=4",
)


@pytest.fixture
def backbone(tiny_pipeline_folder) -> SD3Backbone:
    return SD3Backbone(str(tiny_pipeline_folder), max_sequence_length=20)


@pytest.fixture
def fill(backbone, tmp_path) -> Callable[..., cache_text_module.Filled]:
    """`fill(prompts, dtype="float32")` puts them into the cache `tmp_path/cache`, four or five a shard."""

    def filled(prompts: list[str], of: SD3Backbone = backbone, **settings) -> cache_text_module.Filled:
        settings = {"dtype": "float32", "batch_size": 4, "shard_megabytes": 0.018, **settings}
        return fill_cache(of, {"training": PromptList(prompts)}, TextCacheSettings(tmp_path / "cache", **settings))

    return filled


def opened(backbone: SD3Backbone, tmp_path: Path) -> StoredText:
    return StoredText(tmp_path / "cache", backbone.text_fingerprint)


def shards(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / SHARDS).iterdir())


# ---- what is stored is what the encoders give


def test_stored_conditioning_is_the_encoders_bit_for_bit(backbone, fill, tmp_path):
    filled = fill([*PROMPTS, PROMPTS[0]])
    assert (filled.encoded, filled.total) == (9, 9)  # eight prompts and the empty one
    cache = opened(backbone, tmp_path)
    assert len(cache) == 9
    assert len(shards(tmp_path)) == 2
    for batch in (PROMPTS[:4], PROMPTS[4:], [""] * 3):
        expected = backbone.encode_prompts(batch)
        stored = cache.encode(batch)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], expected[name]) for name in expected)
    mixed = cache.encode([PROMPTS[6], "", PROMPTS[1], PROMPTS[6]])
    assert torch.equal(mixed["pooled"][0], mixed["pooled"][3])
    assert torch.equal(mixed["prompt_embeds"][2], backbone.encode_prompts(PROMPTS[:4])["prompt_embeds"][1])


def test_stored_conditioning_goes_to_the_device_without_a_wait(backbone, fill, tmp_path, monkeypatch):
    fill(PROMPTS)
    cache = opened(backbone, tmp_path)
    expected = cache.encode(["", PROMPTS[1], ""])
    with host_waits(monkeypatch) as waits:
        cache.to(HERE)
        found = cache.encode(["", PROMPTS[1], ""])
        assert all(waits.holds(value) for value in found.values())
    assert dict(waits.found) == {}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_half_precision_is_rounded_once_and_given_back_in_float32(backbone, fill, tmp_path):
    wide, narrow = backbone.encode_prompts(PROMPTS[:4]), fill(PROMPTS, dtype="bfloat16")
    stored = opened(backbone, tmp_path).encode(PROMPTS[:4])
    for name, value in wide.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], value.bfloat16().float())
    assert narrow.bytes_per_prompt == 2 * (32 * 64 + 64) + 24


def test_the_size_in_the_files_is_the_size_announced(fill, tmp_path, capsys):
    filled = fill(PROMPTS, shard_megabytes=10)
    (shard,) = shards(tmp_path)
    assert 0 <= shard.stat().st_size - 9 * filled.bytes_per_prompt < 1000  # the header
    assert f"to encode: 9 prompts of {filled.bytes_per_prompt:,} bytes" in capsys.readouterr().err
    keys = load_file(shard)["keys"].numpy()
    assert {bytes(key) for key in keys} == {prompt_key(prompt) for prompt in ["", *PROMPTS]}
    assert shard.stem == hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()


# ---- restarts


def test_a_killed_run_leaves_whole_shards_and_goes_on(backbone, fill, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    encoded: list[str] = []
    encode = SD3Backbone.encode_prompts

    def dying(self, prompts):
        if len(encoded) >= 5:
            raise Killed
        encoded.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(SD3Backbone, "encode_prompts", dying)
    with pytest.raises(Killed):
        fill(PROMPTS)
    first = shards(tmp_path)
    assert first
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = temporary_path(tmp_path / "cache" / SHARDS / "x.safetensors")
    left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")).write_bytes(b"half of a shard")
    monkeypatch.setattr(SD3Backbone, "encode_prompts", encode)
    before = {path: path.stat().st_mtime_ns for path in first}
    done = len(opened(backbone, tmp_path))
    filled = fill(PROMPTS)
    assert filled.encoded == 9 - done > 0
    assert {path: path.stat().st_mtime_ns for path in first} == before
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    cache = opened(backbone, tmp_path)
    assert all(prompt in cache for prompt in ["", *PROMPTS])
    assert torch.equal(cache.encode(PROMPTS)["pooled"], backbone.encode_prompts(PROMPTS)["pooled"])


def test_new_prompts_are_added_and_old_ones_kept(fill):
    assert fill(PROMPTS[:3]).encoded == 4
    assert fill(PROMPTS).encoded == 5
    assert fill(PROMPTS).encoded == 0


HOLD = "import sys; from cdm_lightning.files import locked\nwith locked(sys.argv[1]): print('held', flush=True), sys.stdin.read()"


def test_two_writers_are_kept_apart(fill, tmp_path):
    fill(PROMPTS[:2])
    command = [sys.executable, "-c", HOLD, str(tmp_path / "cache" / cache_text_module.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another process is writing this text cache \(process {other.pid} on "):
            fill(PROMPTS)
        other.communicate()
    fill(PROMPTS)


# ---- what does not fit is refused


def test_a_cache_of_other_encoders(backbone, fill, tmp_path, tiny_pipeline_folder):
    fill(PROMPTS)
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline_folder, other)
    weights = next((other / "text_encoder_2").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = SD3Backbone(str(other), max_sequence_length=24)
    now, was = changed.text_fingerprint, backbone.text_fingerprint
    with pytest.raises(UserError) as error:
        StoredText(tmp_path / "cache", now)
    part = "text_encoder_2"
    assert (
        f"(max_sequence_length is 24 now, but 20 in the cache; {part} is {now[part]} now, but {was[part]} in the cache)"
        in str(error.value)
    )
    with pytest.raises(UserError, match="other text encoders made this text cache"):
        fill(PROMPTS, of=changed)
    with pytest.raises(UserError, match=r"stores float32 tensors, but text_cache.dtype=bfloat16"):
        fill(PROMPTS, dtype="bfloat16")


def test_the_fingerprint_knows_files_and_settings_but_no_place(backbone, tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, tmp_path / "moved")
    moved = SD3Backbone(str(tmp_path / "moved"), max_sequence_length=20)
    assert moved.text_fingerprint == backbone.text_fingerprint
    (tmp_path / "moved/text_encoder/model.fp16.safetensors").write_bytes(b"a twin that is not loaded")
    assert moved.text_fingerprint == backbone.text_fingerprint
    (tmp_path / "moved/tokenizer/tokenizer_config.json").write_text("{}")
    assert moved.text_fingerprint["tokenizer"] != backbone.text_fingerprint["tokenizer"]
    options = {"text_dtype": "bfloat16", "compact_text": 11, "max_sequence_length": 21}
    for name, value in options.items():
        other = SD3Backbone(str(tiny_pipeline_folder), **{"max_sequence_length": 20, name: value}).text_fingerprint
        assert [key for key in other if other[key] != backbone.text_fingerprint[key]] == [name]
    with pytest.raises(UserError, match="has no files"):
        hash_part(tmp_path / "nothing")
    with pytest.raises(UserError, match="Toy2DBackbone has no text encoder"):
        Toy2DBackbone().text_fingerprint  # noqa: B018


def test_half_written_and_damaged_shards_are_named(backbone, fill, tmp_path):
    fill(PROMPTS)
    path = shards(tmp_path)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    message = f"{path}: the file is incomplete or damaged; delete this file and run"
    for use in (lambda: opened(backbone, tmp_path), lambda: fill(PROMPTS)):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value).startswith(message)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 64
    path.write_bytes(flipped)
    with pytest.raises(UserError) as error:
        opened(backbone, tmp_path).encode(["", *PROMPTS])
    assert str(error.value).startswith(message)
    path.unlink()
    assert 0 < fill(PROMPTS).encoded < 9
    assert len(opened(backbone, tmp_path).encode(PROMPTS)["pooled"]) == 8


def test_a_shard_of_another_cache(backbone, fill, tmp_path):
    fill(PROMPTS[:2])
    moved = tmp_path / "elsewhere.safetensors"
    shutil.move(shards(tmp_path)[0], moved)
    shutil.rmtree(tmp_path / "cache")
    fill(PROMPTS[:2], dtype="bfloat16")
    shutil.move(moved, tmp_path / "cache" / SHARDS)
    with pytest.raises(UserError, match=r"elsewhere.safetensors: this file belongs to another text cache"):
        opened(backbone, tmp_path)


def test_folders_and_values_that_cannot_be(backbone, fill, tmp_path):
    with pytest.raises(UserError, match=r"has no text cache; run `python -m cdm_lightning.cache_text`"):
        StoredText(tmp_path / "none", backbone.text_fingerprint)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MANIFEST).write_text('{"format": 1')
    with pytest.raises(UserError, match="this version of cdm_lightning cannot read this text cache"):
        opened(backbone, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="cannot be the text cache's folder"):
        fill(PROMPTS)
    with pytest.raises(UserError, match=r"must be one of float32, bfloat16, float16"):
        TextCacheSettings(dtype="int8")
    with pytest.raises(UserError, match=r"text_cache\.batch_size=0 must be at least 1"):
        TextCacheSettings(batch_size=0)


def test_a_full_disk_is_noticed_before_encoding(fill, monkeypatch):
    monkeypatch.setattr(cache_text_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    monkeypatch.setattr(SD3Backbone, "encode_prompts", first_only(SD3Backbone.encode_prompts))
    with pytest.raises(UserError, match=r"9 prompts of [\d,]+ bytes, .* GB to write, but the disk has 0 GB left"):
        fill(PROMPTS)


def first_only(encode: Callable) -> Callable:
    def checked(self, prompts):
        assert list(prompts) == [""], "long work was begun"
        return encode(self, prompts)

    return checked


def test_a_shard_that_cannot_be_written(backbone, fill, tmp_path, monkeypatch):
    fill(PROMPTS[:2])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"safetensors: cannot be written \(.*No space left on device\)"):
        fill(PROMPTS)
    monkeypatch.undo()
    assert len(opened(backbone, tmp_path)) == 3
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_prompts_of_another_shape(fill, tiny_pipeline_folder):
    """Folded padding keeps as many tokens as a long prompt needs; a cache has one shape."""
    compact = SD3Backbone(str(tiny_pipeline_folder), compact_text=5)
    with pytest.raises(UserError, match=r"prompt_embeds has the shape .*; if backbone.compact_text is set, raise it"):
        fill(["a ring", "a large red circle above a small blue square"], of=compact)
    assert fill(["a ring"], of=compact).total == 2


def test_prompts_that_are_not_there(backbone, fill, tmp_path):
    fill(PROMPTS[:6])
    cache = opened(backbone, tmp_path)
    with pytest.raises(UserError) as error:
        cache.require({"validation": PROMPTS[:2], "training": PROMPTS}, check_up_to=100)
    line = str(error.value)
    assert "2 of the 8 training prompts are not in the text cache, such as 'a large blue ring'; run `python -m" in line
    cache.require({"training": PROMPTS}, check_up_to=7)  # too many to look for: found out when used
    with pytest.raises(UserError, match="a prompt is not in the text cache, such as 'a large blue ring'"):
        cache.encode(PROMPTS)


# ---- training


@pytest.fixture
def arguments(tiny_pipeline_folder, tmp_path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    paths = [f"data.train.path={prompts}", f"data.val.path={prompts}"]
    return [*SHORT, f"backbone.pretrained={tiny_pipeline_folder}", *paths]


def test_a_cached_run_equals_an_uncached_one_and_loads_no_text_encoder(arguments, tmp_path, monkeypatch, capsys):
    def run(folder: str, *overrides: str) -> dict:
        result = train(compose([*arguments, f"output_dir={tmp_path / folder}", *overrides]))
        assert result.iteration == 4
        return read_checkpoint(result.checkpoint).tensors()

    cache = [f"text_cache.folder={tmp_path / 'cache'}", "text_cache.dtype=float32"]
    plain = run("plain", "text_cache.remember_megabytes=0")  # encoded in batches of 4, as for the cache
    filled = cache_text(compose([*arguments, f"output_dir={tmp_path / 'plain'}", *cache]))
    assert filled.total == 9
    assert "9 prompts, 9 of them encoded now" in capsys.readouterr().out
    monkeypatch.setattr(SD3Backbone, "_text_parts", property(lambda self: pytest.fail("text encoders were loaded")))
    cached = run("cached", *cache)
    assert plain.keys() == cached.keys()
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    manifest["tensors"]["pooled"]["shape"] = [3]
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="this file belongs to another text cache"):
        run("other", *cache)
    assert read_manifest(tmp_path / "cache").tensors["pooled"]["shape"] == [3]


def test_a_prompt_that_is_not_cached_is_refused_before_training(arguments, tmp_path, monkeypatch):
    cache = [f"text_cache.folder={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]
    cache_text(compose([*arguments, *cache]))
    more = tmp_path / "more.txt"
    more.write_text("a cross\n")
    monkeypatch.setattr(SD3Backbone, "build_network", lambda self: pytest.fail("long work was begun"))
    with pytest.raises(UserError, match="1 of the 1 validation prompts are not in the text cache, such as 'a cross'"):
        train(compose([*arguments, *cache, f"data.val.path={more}"]))


def test_callbacks_prompts_are_cached_too(arguments, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("a cross\n" * 600)
    config = compose([*arguments, "callbacks=demo", f"output_dir={tmp_path}"])
    config.callbacks.ladder.evaluation.prompts.path = str(more)
    sets = list(cache_text_module.callback_prompts(config.callbacks))
    assert sets  # the evaluation's, and those of its reference, which are the same
    assert all(prompts[0] == "a cross" and len(prompts) == 600 for prompts in sets)


def test_the_command_refuses_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for words, message in (
        ([], "text_cache.folder is not set; set text_cache.folder=DIR"),
        (["text_cache.dtyp=float32"], "Could not override 'text_cache.dtyp'"),
        ([f"text_cache.folder={tmp_path / 'prompts.txt'}"], "prompts.txt: cannot be the text cache's folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["cache_text", *arguments, *words])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert message in printed[-1]
        assert sum(line.startswith("error: ") for line in printed) == 1
