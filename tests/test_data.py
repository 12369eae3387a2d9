"""Prompt files are read right or refused in one line; the order of prompts is a function of (seed, position)."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cdm_lightning.data.batches import Draw, EndlessBatches, PromptBatch, evaluation_batches
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.prompts import PromptFile
from cdm_lightning.errors import UserError


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- prompt files


def test_text_file_gives_its_lines_without_blank_ones(tmp_path):
    file = PromptFile(write(tmp_path, "a.txt", "first\n\n  größe 好 \r\n   \nlast without newline"))
    assert [file[i] for i in range(len(file))] == ["first", "größe 好", "last without newline"]
    assert file.blank_lines == 2
    assert file[1] == "größe 好"  # in any order


def test_jsonl_gives_the_field(tmp_path):
    lines = [{"prompt": "a", "caption": "x"}, {"prompt": " b\n c ", "caption": "y"}, {"prompt": "", "caption": "z"}]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps(line) for line in lines))
    default, named = PromptFile(path), PromptFile(path, field="caption")
    assert [default[i] for i in range(len(default))] == ["a", "b\n c"]
    assert default.blank_lines == 1
    assert [named[i] for i in range(len(named))] == ["x", "y", "z"]


def test_a_prompt_file_travels_to_workers(tmp_path):
    file = pickle.loads(pickle.dumps(PromptFile(write(tmp_path, "a.txt", "one\ntwo"))))
    assert file[1] == "two"


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("missing.txt", None, None, "missing.txt: cannot read the prompt file"),
        ("empty.txt", "", None, "empty.txt: the prompt file holds no prompt"),
        ("blank.txt", " \n\n", None, "blank.txt: the prompt file holds no prompt"),
        ("latin.txt", "fine\ngr\xfcn\n".encode("latin-1"), None, "latin.txt, line 2: the prompt file is not UTF-8"),
        ("utf16.txt", "two".encode("utf-16"), None, "utf16.txt, line 1: the prompt file is not UTF-8"),
        ("a.txt", "text", "caption", "a.txt: `field: caption` needs a .jsonl file"),
        (
            "a.jsonl",
            '{"prompt": ""}\n{"text": "y"}',
            None,
            'a.jsonl, line 2: not a JSON object with a text in "prompt"',
        ),
        ("b.jsonl", '{"prompt": "x"', None, 'b.jsonl, line 1: not a JSON object with a text in "prompt"'),
        ("c.jsonl", '["x"]', "caption", 'c.jsonl, line 1: not a JSON object with a text in "caption"'),
        ("d.jsonl", '{"caption": 3}', "caption", 'd.jsonl, line 1: not a JSON object with a text in "caption"'),
    ],
)
def test_bad_prompt_files_are_refused_in_one_line(tmp_path, name, content, field, message):
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        PromptFile(path, field)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


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


def test_validation_uses_the_first_prompts(prompt_file):
    prompts = PromptFile(prompt_file)
    batches = list(PromptDataModule(prompts, prompts, batch_size=4, val_batch_size=3, val_prompts=5).val_dataloader())
    assert [batch.prompts for batch in batches] == [[prompts[i] for i in part] for part in ([0, 1, 2], [3, 4])]
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [3, 4]]


def test_sizes_must_be_positive(prompt_file):
    prompts = PromptFile(prompt_file)
    with pytest.raises(UserError, match="batch_size"):
        PromptDataModule(prompts, prompts, batch_size=0)
