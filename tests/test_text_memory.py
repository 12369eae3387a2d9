"""Conditioning kept in memory: each prompt encoded once, the same bits in whatever order they are asked for."""

from collections.abc import Callable

import pytest
import torch

from cdm_lightning.backbones.base import Conditioning
from cdm_lightning.config import compose
from cdm_lightning.data.text_memory import BATCH, RememberedText
from cdm_lightning.train import train

PROMPTS = [f"prompt {number}" for number in range(2 * BATCH)]


class Encoder:
    """Counts what it is asked for; its result depends on the size of the batch, as float rounding does."""

    def __init__(self, tokens: Callable[[str], int] = lambda prompt: 3) -> None:
        self.asked: list[str] = []
        self.tokens = tokens

    def __call__(self, prompts: list[str]) -> Conditioning:
        self.asked += prompts
        rows = torch.tensor([float(sum(prompt.encode())) for prompt in prompts]) + len(prompts) * 1e-3
        return {"embeds": rows[:, None, None].expand(-1, max(map(self.tokens, prompts)), 2).clone()}


def test_each_prompt_is_encoded_once_and_later_calls_do_not_change_it():
    encoder = Encoder()
    memory = RememberedText(encoder, [*PROMPTS, *PROMPTS], most_bytes=10**6)
    first = memory.encode(["prompt 3", "", "prompt 100", "prompt 3"])
    assert encoder.asked == ["", *PROMPTS]
    assert first["embeds"][:, 0, 0].round().tolist() == [
        sum(p.encode()) for p in ("prompt 3", "", "prompt 100", "prompt 3")
    ]
    other = RememberedText(Encoder(), PROMPTS, most_bytes=10**6)
    other.encode(["prompt 100"])
    assert torch.equal(other.encode(["prompt 3"])["embeds"], first["embeds"][:1])
    assert len(encoder.asked) == len(PROMPTS) + 1


def test_unknown_prompts_are_encoded_as_they_come():
    encoder = Encoder()
    memory = RememberedText(encoder, PROMPTS, most_bytes=10**6)
    assert torch.equal(memory.encode(["new", "prompt 1"])["embeds"], Encoder()(["new", "prompt 1"])["embeds"])
    assert encoder.asked[-2:] == ["new", "prompt 1"]


@pytest.mark.parametrize(
    ("most_bytes", "tokens"),
    [(1000, lambda prompt: 3), (10**6, lambda prompt: 4 if prompt == "prompt 100" else 3)],
    ids=["too large", "of two shapes"],
)
def test_what_does_not_fit_is_not_remembered(most_bytes, tokens):
    encoder = Encoder(tokens)
    memory = RememberedText(encoder, PROMPTS, most_bytes)
    memory.encode(PROMPTS[:2])
    asked = len(encoder.asked)
    assert torch.equal(memory.encode(PROMPTS[:2])["embeds"], Encoder()(PROMPTS[:2])["embeds"])
    assert encoder.asked[asked:] == PROMPTS[:2]


def test_forgetting_encodes_anew():
    encoder = Encoder()
    memory = RememberedText(encoder, PROMPTS, most_bytes=10**6)
    memory.encode(PROMPTS[:1])
    memory.forget()
    memory.encode(PROMPTS[:1])
    assert len(encoder.asked) == 2 * (len(PROMPTS) + 1)


def test_what_is_kept_from_a_validation_serves_a_training_step():
    memory = RememberedText(Encoder(), PROMPTS, most_bytes=10**6)
    with torch.inference_mode():
        memory.encode(PROMPTS[:1])
    weight = torch.ones(2, requires_grad=True)
    (memory.encode(PROMPTS[:4])["embeds"] * weight).sum().backward()
    assert weight.grad is not None


def test_a_run_remembers_its_few_prompts_and_learns_the_same(tmp_path, tiny_pipeline_folder):
    def losses(name: str, *overrides: str) -> dict[str, float]:
        run = (f"run_name={name}", f"output_dir={tmp_path / name}", f"backbone.pretrained={tiny_pipeline_folder}")
        short = (
            "backbone.compact_text=null",
            "callbacks=none",
            "logger=none",
            "trainer.max_steps=4",
            "data.batch_size=3",
        )
        sizes = ("trainer.limit_val_batches=0", "trainer.log_every_n_steps=4", "schedule.length.high=3")
        return train(compose(["experiment=tiny_sd3_cdm", *run, *short, *sizes, *overrides])).metrics

    remembered, anew = losses("remembered"), losses("anew", "text_cache.remember_megabytes=0")
    assert remembered == pytest.approx(anew, rel=1e-4)
