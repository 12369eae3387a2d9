"""Prompt files are read right or refused in one line; the order of prompts is a function of (seed, position)."""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cdm_lightning.data.batches import Draw, EndlessBatches, PromptBatch, evaluation_batches
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.prompts import PromptFile, PromptList
from cdm_lightning.data.selection import Counts, first_occurrences
from cdm_lightning.errors import UserError


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- prompt files


def test_text_file_gives_its_lines_without_blank_ones(tmp_path):
    file = PromptFile(write(tmp_path, "a.txt", "first\n\n  größe 好 \r\n   \nlast without newline"))
    assert [file[i] for i in range(len(file))] == ["first", "größe 好", "last without newline"]
    assert file.counts.blank == 2
    assert file[1] == "größe 好"  # in any order


def test_jsonl_gives_the_field(tmp_path):
    lines = [{"prompt": "a", "caption": "x"}, {"prompt": " b\n c ", "caption": "y"}, {"prompt": "", "caption": "z"}]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps(line) for line in lines))
    default, named = PromptFile(path), PromptFile(path, field="caption")
    assert [default[i] for i in range(len(default))] == ["a", "b\n c"]
    assert default.counts.blank == 1
    assert [named[i] for i in range(len(named))] == ["x", "y", "z"]


def test_a_prompt_file_travels_to_workers(tmp_path):
    file = pickle.loads(pickle.dumps(PromptFile(write(tmp_path, "a.txt", "one\ntwo"))))
    assert file[1] == "two"


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("missing.txt", None, None, "missing.txt: cannot read the prompt file"),
        ("empty.txt", "", None, "empty.txt: the prompt file has no prompts"),
        ("blank.txt", " \n\n", None, "blank.txt: the prompt file has no prompts"),
        ("latin.txt", "fine\ngr\xfcn\n".encode("latin-1"), None, "latin.txt, line 2: the prompt file is not UTF-8"),
        ("utf16.txt", "two".encode("utf-16"), None, "utf16.txt, line 1: the prompt file is not UTF-8"),
        ("a.txt", "text", "caption", "a.txt: a text file has no field 'caption'"),
        (
            "a.jsonl",
            '{"prompt": ""}\n{"text": "y"}',
            None,
            'a.jsonl, line 2: not a JSON object with a string under "prompt"',
        ),
        ("b.jsonl", '{"prompt": "x"', None, 'b.jsonl, line 1: not a JSON object with a string under "prompt"'),
        ("c.jsonl", '["x"]', "caption", 'c.jsonl, line 1: not a JSON object with a string under "caption"'),
        ("d.jsonl", '{"caption": 3}', "caption", 'd.jsonl, line 1: not a JSON object with a string under "caption"'),
    ],
)
def test_bad_prompt_files_are_refused_in_one_line(tmp_path, name, content, field, message):
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        PromptFile(path, field)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- what is left out


def test_overlong_prompts_are_skipped_and_counted_or_refused(tmp_path):
    path = write(tmp_path, "a.txt", "short\n" + "x" * 100_000 + "\n" + "y" * 10_000 + "\nend\n")
    file = PromptFile(path)
    assert [len(file[i]) for i in range(len(file))] == [5, 10_000, 3]
    assert file.counts == Counts(kept=3, blank=0, overlong=1, repeated=0, max_characters=10_000)
    assert len(PromptFile(path, max_characters=100_000)) == 4
    with pytest.raises(UserError) as error:
        PromptFile(path, overlong="refuse")
    assert str(error.value) == (
        f"{path}, line 2: the prompt has 100,000 characters, more than max_characters=10000; shorten it or set overlong=skip"
    )


def test_repeated_prompts_are_dropped_if_asked_for(tmp_path):
    path = write(tmp_path, "a.txt", "a  cat\ndog\na cat\n\n a\tcat \nA cat\ndog\n")
    assert len(PromptFile(path)) == 6
    file = PromptFile(path, deduplicate=True)
    assert [file[i] for i in range(len(file))] == ["a  cat", "dog", "A cat"]
    assert (file.counts.kept, file.counts.repeated, file.counts.blank) == (3, 3, 1)
    assert file.summary == f"{path}: 3 prompts, left out: 1 blank, 3 repeated"


def test_first_occurrences_equal_a_plain_count():
    numbers = torch.randint(0, 300, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    keys = b"".join((number % 7).to_bytes(8, "little") + number.to_bytes(8, "big") for number in numbers)
    firsts = {number: place for place, number in reversed(list(enumerate(numbers)))}
    assert first_occurrences(keys).tolist() == sorted(firsts.values())


def test_rules_out_of_range(tmp_path):
    path = write(tmp_path, "a.txt", "a")
    with pytest.raises(UserError, match="overlong=cut must be skip or refuse"):
        PromptFile(path, overlong="cut")
    with pytest.raises(UserError, match="max_characters=0 must be at least 1"):
        PromptFile(path, max_characters=0)
    with pytest.raises(UserError, match=r"has no prompts \(left out: 1 over 3 characters\)"):
        PromptFile(write(tmp_path, "b.txt", "long"), max_characters=3)


def test_only_positions_are_held(tmp_path):
    path = write(tmp_path, "a.txt", "".join(f"prompt number {n} of many\n" for n in range(5000)))
    assert len(pickle.dumps(PromptFile(path))) < 5000 * 8 + 3000


def test_what_was_left_out_is_said_once(tmp_path, capsys):
    prompts = PromptFile(write(tmp_path, "a.txt", "a\n\nb\n"))
    whole = PromptFile(write(tmp_path, "b.txt", "a\nb\n"))
    PromptDataModule(prompts, PromptList(["x"]), batch_size=1).prepare_data()
    PromptDataModule(whole, whole, batch_size=1).prepare_data()
    assert capsys.readouterr().err == f"training prompts: {tmp_path / 'a.txt'}: 2 prompts, left out: 1 blank\n"


# ---- folders and tables


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path, "b.txt", "three\n")
    write(tmp_path, "a.txt", "one\n\ntwo")
    write(tmp_path, "notes.md", "no prompt")
    (tmp_path / "c").mkdir()
    write(tmp_path / "c", "d.txt", "four\n" + "x" * 20_000)
    file = pickle.loads(pickle.dumps(PromptFile(tmp_path)))
    assert [file[i] for i in range(len(file))] == ["one", "two", "three", "four"]
    with pytest.raises(UserError, match=r"c/d.txt, line 2: the prompt has 20,000 characters"):
        PromptFile(tmp_path, overlong="refuse")


def test_folders_that_are_no_prompts(tmp_path):
    with pytest.raises(UserError, match=r"has no prompt file \(.txt, .jsonl, .ndjson, .parquet, .csv, .tsv, .json\)"):
        PromptFile(tmp_path)
    write(tmp_path, "a.txt", "a")
    write(tmp_path, "b.jsonl", "{}")
    with pytest.raises(UserError, match=r"the folder has .jsonl and .txt files, but must have files of one format"):
        PromptFile(tmp_path)
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(UserError, match="a saved Hugging Face data set; use data=dataset"):
        PromptFile(tmp_path)


def table(path: Path, **columns: list) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_parquet_gives_the_column(tmp_path):
    texts = [f"prompt {n} größe" for n in range(40)]
    path = table(tmp_path / "a.parquet", caption=[*texts, None, " ", "x" * 20_000, texts[3]], size=list(range(44)))
    file = PromptFile(path, "caption", deduplicate=True, cache_folder=tmp_path / "cache")
    assert [file[i] for i in (39, 0, 17)] == [texts[39], texts[0], texts[17]]
    assert [file[i] for i in range(len(file))] == texts
    assert file.counts == Counts(kept=40, blank=2, overlong=1, repeated=1, max_characters=10_000)
    assert pickle.loads(pickle.dumps(file))[5] == texts[5]
    with pytest.raises(UserError, match=r"a.parquet, row 43: the prompt has 20,000 characters"):
        PromptFile(path, "caption", overlong="refuse", cache_folder=tmp_path / "cache")


def test_parquet_is_copied_once_and_anew_when_it_has_changed(tmp_path):
    cache = tmp_path / "cache"
    path = table(tmp_path / "set/a.parquet", prompt=["one", "two"])
    table(tmp_path / "set/b.parquet", prompt=["three"])
    folder = PromptFile(tmp_path / "set", cache_folder=cache)
    assert [folder[i] for i in range(3)] == ["one", "two", "three"]
    (copy,) = cache.iterdir()
    before = copy.stat().st_mtime_ns
    PromptFile(tmp_path / "set", cache_folder=cache)
    assert copy.stat().st_mtime_ns == before
    table(path, prompt=["four", "five", "six"])
    assert PromptFile(tmp_path / "set", cache_folder=cache)[0] == "four"
    assert len(list(cache.iterdir())) == 2


def test_bad_tables_are_refused_in_one_line(tmp_path):
    path = table(tmp_path / "a.parquet", caption=["a"], width=[3])
    cache = tmp_path / "cache"
    cases = [(path, None, f"{path}: no column 'prompt'; set field to one of its columns: caption, width")]
    cases += [(path, "width", f"{path}: the column 'width' contains int64, not strings")]
    cases += [(tmp_path / "no.parquet", None, "no.parquet: this prompt file does not exist")]
    half = write(tmp_path, "half.parquet", path.read_bytes()[:-20])
    cases += [(half, "caption", "half.parquet: cannot be read as parquet")]
    for file, field, message in cases:
        with pytest.raises(UserError) as error:
            PromptFile(file, field, cache_folder=cache)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert not cache.exists()


def test_a_broken_copy_of_a_column_is_named(tmp_path):
    path = table(tmp_path / "a.parquet", prompt=["one", "two"])
    PromptFile(path, cache_folder=tmp_path / "cache")
    (copy,) = (tmp_path / "cache").iterdir()
    copy.write_bytes(copy.read_bytes()[:-30])
    with pytest.raises(UserError, match=f"{copy}: cannot be read"):
        PromptFile(path, cache_folder=tmp_path / "cache")


def test_tables_without_the_library(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", prompt=["one"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"pyarrow is needed to read this file; install it: pip install 'cdm-lightning\[data\]'"
    ):
        PromptFile(path)


# ---- order


def draws(batches: EndlessBatches, first: int, last: int) -> list[list[Draw]]:
    return [batches.batch(number) for number in range(first, last)]


def test_each_epoch_deals_every_prompt_once_in_another_order():
    prompts = [draw.prompt for batch in draws(EndlessBatches(size=7, batch_size=3, seed=1), 0, 14) for draw in batch]
    epochs = [prompts[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_batches_are_a_function_of_seed_and_number():
    batches = EndlessBatches(size=7, batch_size=3, seed=1)
    resumed = iter(EndlessBatches(size=7, batch_size=3, seed=1, start=5))
    assert [next(resumed) for _ in range(6)] == draws(batches, 5, 11)
    assert draws(EndlessBatches(size=7, batch_size=3, seed=2), 0, 5) != draws(batches, 0, 5)


def test_ranks_split_the_same_global_batch():
    whole = draws(EndlessBatches(size=11, batch_size=6, seed=3), 0, 8)
    ranks = [draws(EndlessBatches(size=11, batch_size=2, seed=3, rank=rank, world_size=3), 0, 8) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks)] == whole
    assert [draw.key for draw in whole[0]] == list(range(6))


def test_evaluation_batches_keep_the_order_of_the_file():
    assert evaluation_batches(5, 2) == [[Draw(0, 0), Draw(1, 1)], [Draw(2, 2), Draw(3, 3)], [Draw(4, 4)]]


# ---- loaders


def take(module: PromptDataModule, iteration: int, count: int) -> list[PromptBatch]:
    module.trainer = SimpleNamespace(global_step=iteration, global_rank=0, world_size=1)
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(count)]


def test_loaders_start_after_the_finished_iterations_with_and_without_workers(prompt_file):
    prompts = PromptFile(prompt_file)
    plain = PromptDataModule(prompts, prompts, batch_size=4, seed=5)
    workers = PromptDataModule(prompts, prompts, batch_size=4, seed=5, num_workers=2)
    straight = take(plain, 0, 9)
    assert [batch.prompts for batch in take(plain, 3, 6)] == [batch.prompts for batch in straight[3:]]
    assert [batch.prompts for batch in take(workers, 3, 6)] == [batch.prompts for batch in straight[3:]]
    assert torch.equal(straight[0].indices, torch.arange(4))
    order = EndlessBatches(len(prompts), 4, 5).batch(0)
    assert straight[0].prompts == [prompts[draw.prompt] for draw in order]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_batch_that_is_read_brings_those_rolled_out_with_it(prompt_file, num_workers):
    prompts = PromptFile(prompt_file)
    data = PromptDataModule(prompts, prompts, batch_size=4, seed=5, num_workers=num_workers)
    alone = take(data, 0, 9)
    assert all(batch.group == () for batch in alone)
    data.groups = lambda n: range(n - n % 3, n - n % 3 + 3)
    for start in (0, 4, 5):
        found = take(data, start, 9 - start)
        assert [batch.prompts for batch in found] == [batch.prompts for batch in alone[start:]]
        for number, batch in enumerate(found, start):
            told = number % 3 == 0 or number == start
            expected = alone[number - number % 3 :][:3] if told else []
            assert [other.prompts for other in batch.group] == [other.prompts for other in expected]
            assert all(torch.equal(one.indices, torch.arange(4)) for one in (batch, *batch.group))


def test_validation_uses_the_first_prompts(prompt_file):
    prompts = PromptFile(prompt_file)
    data = PromptDataModule(prompts, prompts, batch_size=4, val_batch_size=3, val_prompts=5)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    batches = list(data.val_dataloader())
    assert [batch.prompts for batch in batches] == [[prompts[i] for i in part] for part in ([0, 1, 2], [3, 4])]
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [3, 4]]


def test_sizes_must_be_positive(prompt_file):
    prompts = PromptFile(prompt_file)
    with pytest.raises(UserError, match="batch_size"):
        PromptDataModule(prompts, prompts, batch_size=0)
