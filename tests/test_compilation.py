"""Compiled blocks stay compiled in all that a run does with them; what dynamo compiles, and what it gives up, is counted.

The backend "eager" runs what dynamo has captured: which calls are compiled is decided by dynamo, the same for every backend.
"""

import logging
from collections.abc import Callable
from threading import Thread

import pytest
import torch
from processes import together
from tiny_pipelines import FAMILIES
from torch import nn
from torch._dynamo.utils import counters

from cdm_lightning.config import compose
from cdm_lightning.train import train
from cdm_lightning.training.compilation import DYNAMO, VARIANTS, compile_blocks

ALL_CALLS = (  # rollouts of all sizes, uneven parts, both updates, validation of student and teacher
    "experiment=tiny_sd3_cdm",
    "callbacks=none",
    "logger=none",
    "schedule/length=uniform",
    "schedule.length.high=3",
    "objective.student_every=2",
    "backbone.max_sequence_length=8",
    "backbone.compact_text=null",
    "data.batch_size=5",
    "data.num_workers=0",
    "data.val_prompts=2",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "compute.accumulate=2",
    "compute.gradient_checkpointing=true",
)
LORA = ("lora=lora", "lora.student.rank=2", "lora.fake_score.rank=2")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def overrides(tiny_pipeline_folder, prompt_file) -> list[str]:
    paths = [f"backbone.pretrained={tiny_pipeline_folder}", f"data.train.path={prompt_file}"]
    return [*ALL_CALLS, *paths, f"data.val.path={prompt_file}"]


def gave_up() -> int:
    """How many calls dynamo met that it did not compile."""
    return counters["frames"]["total"] - counters["frames"]["ok"]


def train_counted(overrides: list[str]) -> int:
    """Train; every call must have been compiled, and in one piece. Returns the number of variants of the block."""
    train(compose(overrides))
    variants = counters["stats"]["unique_graphs"]
    assert gave_up() == 0
    assert 0 < variants < VARIANTS / 2
    return variants


def test_all_calls_of_a_run_are_compiled(overrides, tmp_path, caplog):
    train_counted([*overrides, "compute.compile_backend=eager", f"output_dir={tmp_path}"])
    assert not counters["graph_break"]
    assert not [record for record in caplog.records if record.name == DYNAMO]


@pytest.mark.slow
def test_all_calls_of_adapters_are_compiled(overrides, tmp_path):
    train_counted([*overrides, *LORA, "compute.compile_backend=aot_eager", f"output_dir={tmp_path}"])
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("roles", [(), LORA], ids=["full", "lora"])
def test_all_calls_of_shards_are_compiled(overrides, tmp_path, roles):
    shards = ["strategy=fsdp2", "trainer.devices=2", "data.batch_size=3", f"output_dir={tmp_path}"]
    together(2, train_counted, ([*overrides, *roles, *shards, "compute.compile_backend=aot_eager"],), 580)


@pytest.mark.parametrize(
    "name",
    [
        "flux_dev",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("longcat", "qwen_image", "sana", "z_image")),
    ],
)
def test_batches_of_all_sizes_share_code_in_all_families(name, tiny_folder):
    family = FAMILIES[name]
    backbone = family.backbone(str(tiny_folder(name)), **family.options)
    backbone.setup(torch.device("cpu"))
    network = backbone.build_teacher()

    def velocities(sizes: range) -> list[torch.Tensor]:
        found = []
        for batch in sizes:
            noise = torch.randn(batch, *backbone.latent_shape, generator=torch.Generator().manual_seed(batch))
            cond = backbone.encode_prompts(["a red circle"] * batch)
            with torch.no_grad():
                found.append(backbone.velocity(network, noise, torch.linspace(0.2, 0.8, batch), cond))
        return found

    plain = velocities(range(1, 6))
    compile_blocks(network, backbone.block_types, "eager")
    compiled = velocities(range(1, 4))
    few = counters["stats"]["unique_graphs"]
    compiled += velocities(range(4, 6))
    assert counters["stats"]["unique_graphs"] == few > 0  # a batch of another size needs no new code
    assert gave_up() == 0
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Ranked(nn.Module):
    """A block whose every number of dimensions needs its own code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2


def call_with_ranks(block: nn.Module, most: int) -> None:
    for rank in range(1, most + 1):
        block(torch.ones([2] * rank))


def in_another_thread(call: Callable[[], None]) -> None:
    """As the backward pass of a GPU runs; configuration of torch is of one thread only."""
    thread = Thread(target=call)
    thread.start()
    thread.join()


def test_more_variants_than_torch_allows_by_itself_also_in_the_thread_of_the_backward_pass():
    block = Ranked()
    compile_blocks(block, (Ranked,), "eager")
    in_another_thread(lambda: call_with_ranks(block, 12))
    assert (
        counters["stats"]["unique_graphs"] == counters["frames"]["ok"] == 12 > torch._dynamo.config.recompile_limit - 1
    )


def test_a_limit_that_is_reached_names_the_block(caplog):
    block = Ranked()
    compile_blocks(block, (Ranked,), "eager", limit=3)
    with caplog.at_level(logging.WARNING, logger=DYNAMO):
        call_with_ranks(block, 5)
    assert gave_up() == 1
    (record,) = [record for record in caplog.records if record.name == DYNAMO]
    message = record.getMessage()
    assert message.startswith("compute.compile_backend: Ranked has reached the limit of 3 compiled variants")
    assert "\n" not in message
    assert "rank mismatch" in message
