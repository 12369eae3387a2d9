"""Prompts of several iterations encoded at once: the same bits as one batch at a time, and encoders that rest in between."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.checkpoint.stored import newest_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.core import transfer
from cdm_lightning.core.transfer import Resting
from cdm_lightning.data import text_ahead
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.prompts import PromptList
from cdm_lightning.data.text_ahead import TextAhead
from cdm_lightning.data.text_cache import TextCacheSettings
from cdm_lightning.errors import UserError
from cdm_lightning.train import TrainResult, train

BATCHES = [["a", "b"], ["c", "d"], ["e", "a"]]


class Encoder(nn.Module):
    """Records what it is asked for, and on which device it is then; its result depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, ...]] = []
        self.register_buffer("table", torch.arange(4.0))
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def encode(self, prompts: list[str]) -> Conditioning:
        self.asked.append(tuple(prompts))
        rows = [[float(len(prompt)), sum(prompt.encode()) + len(prompts) / 3] for prompt in prompts]
        return {"embeds": torch.tensor(rows), "mask": torch.ones(len(prompts), 2, dtype=torch.bool)}


def ahead(encoder: Encoder, batches=BATCHES, most_bytes: int = 10**6) -> TextAhead:
    return TextAhead(encoder.encode, lambda: batches, lambda: [encoder], most_bytes)


def test_all_batches_that_come_are_encoded_at_once_and_each_on_its_own():
    encoder = Encoder()
    memory = ahead(encoder)
    found = [memory.encode(batch) for batch in (BATCHES[1], [""], *BATCHES)]
    assert encoder.asked == [("a", "b"), ("c", "d"), ("e", "a"), ("",)]
    for batch, cond in zip((BATCHES[1], [""], *BATCHES), found):
        expected = Encoder().encode(batch)
        assert cond.keys() == expected.keys()
        for name, value in expected.items():
            assert cond[name].dtype == value.dtype
            assert torch.equal(cond[name], value)


def test_the_next_batches_take_the_place_of_those_before():
    encoder, batches = Encoder(), list(BATCHES)
    memory = ahead(encoder, batches)
    memory.encode(batches[0])
    batches[:] = [["f", "g"], ["h", "i"]]
    memory.encode(["h", "i"])
    assert encoder.asked[-3:] == [("",), ("f", "g"), ("h", "i")]
    memory.encode(BATCHES[0])
    assert encoder.asked[-1] == ("a", "b")


@pytest.mark.parametrize(("most_bytes", "times"), [(1000, 1), (0, 2)], ids=["kept", "too large"])
def test_other_batches_are_kept_within_a_limit(most_bytes, times):
    encoder = Encoder()
    memory = ahead(encoder, most_bytes=most_bytes)
    for _ in range(2):
        memory.encode(["of", "validation"])
        memory.encode([""])
    assert encoder.asked.count(("of", "validation")) == times
    assert encoder.asked.count(("",)) == 1
    memory.forget()
    memory.encode([""])
    assert encoder.asked.count(("",)) == 2


def test_what_is_encoded_in_a_validation_serves_a_training_step():
    memory = ahead(Encoder())
    with torch.inference_mode():
        memory.encode(BATCHES[0])
    weight = torch.ones(2, requires_grad=True)
    (memory.encode(BATCHES[1])["embeds"] * weight).sum().backward()
    assert weight.grad is not None


def test_encoders_are_on_their_device_only_while_they_encode(monkeypatch):
    monkeypatch.setattr(transfer, "to_host", torch.clone)
    encoder = Encoder()
    resting = Resting([encoder])
    on_device = encoder.weight.data_ptr()
    with resting.on_device():
        assert encoder.weight.data_ptr() == on_device
    in_host_memory = encoder.weight.data_ptr(), encoder.table.data_ptr()
    assert in_host_memory[0] != on_device
    resting._device = torch.device("meta")
    with resting.on_device():
        assert encoder.weight.is_meta
        assert encoder.table.is_meta
    assert (encoder.weight.data_ptr(), encoder.table.data_ptr()) == in_host_memory  # nothing was copied back
    assert torch.equal(encoder.table, torch.arange(4.0))
    assert isinstance(encoder.weight, nn.Parameter)


def test_values_are_kept_in_half_precision_only_where_nothing_is_lost():
    narrow, wide = torch.tensor([1.0, 2.5]), torch.tensor([1.0, 1 / 3])
    assert text_ahead._narrowed(narrow).dtype == torch.bfloat16
    assert text_ahead._narrowed(wide) is wide
    assert text_ahead._narrowed(narrow.double()).dtype == torch.float64


@pytest.mark.parametrize(("rank", "parts"), [(0, 1), (1, 1), (1, 2)])
def test_the_prompts_that_come_are_those_of_the_loader(rank, parts):
    """Also across the groups of iterations that are rolled out together."""
    data = PromptDataModule(
        PromptList([f"prompt {number}" for number in range(7)]),
        PromptList(["a"]),
        batch_size=3,
        groups=lambda number: range(number - number % 2, number - number % 2 + 2),
    )
    data.trainer = SimpleNamespace(global_step=0, global_rank=rank, world_size=2)
    delivered = [batch for batch, _ in zip(data.train_dataloader(), range(8))]
    for first, count, iterations in ((0, 1, range(2)), (3, 2, range(2, 6)), (4, 3, range(4, 8))):
        expected = [part.prompts for number in iterations for part in delivered[number].split(parts)]
        assert data.coming(first, count, parts) == expected


def test_a_number_below_one_is_refused():
    with pytest.raises(UserError, match=r"text_cache\.encode_ahead=0 must be at least 1, or null"):
        TextCacheSettings(encode_ahead=0)


def test_a_run_that_encodes_ahead_is_the_same_bit_for_bit_also_when_it_is_resumed(
    tmp_path, tiny_pipeline_folder, monkeypatch
):
    def run(name: str, *overrides: str) -> TrainResult:
        place = (f"output_dir={tmp_path / name}", f"backbone.pretrained={tiny_pipeline_folder}")
        short = ("callbacks=none", "logger=none", "metric=[]", "data.batch_size=2", "data.num_workers=0")
        sizes = ("trainer.limit_val_batches=0", "schedule.length.high=2", "backbone.compact_text=null")
        steps = ("trainer.max_steps=3", "objective.student_every=2", "objective.fake_score_steps=1")
        more = ("compute.accumulate=2", "text_cache.remember_megabytes=0")
        return train(compose(["experiment=tiny_sd3_cdm", *place, *short, *sizes, *steps, *more, *overrides]))

    def weights(result: TrainResult) -> dict[str, torch.Tensor]:
        return newest_checkpoint(result.folder / "checkpoints").tensors("networks.")

    entered = []
    on_device = Resting.on_device
    monkeypatch.setattr(Resting, "on_device", lambda self: entered.append(1) or on_device(self))
    expected = weights(run("plain"))
    assert not entered
    run("ahead", "text_cache.encode_ahead=1", "trainer.max_steps=1")
    assert len(entered) == 1  # for iterations 0 and 1, which are rolled out together
    found = weights(run("ahead", "text_cache.encode_ahead=4"))
    assert len(entered) == 2
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
