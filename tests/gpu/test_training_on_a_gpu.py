"""Training on a CUDA device: what a CPU computes in float32, near it in bfloat16, and no more waits and variants than known."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_pipelines import FAMILIES
from torch._dynamo.utils import counters

from cdm_lightning.checkpoint.stored import newest_checkpoint
from cdm_lightning.evaluation import samplers
from cdm_lightning.module import CDMModule
from cdm_lightning.train import TrainResult

FLOAT32 = "module.compute_dtype=float32"
BFLOAT16 = "module.compute_dtype=bfloat16"
LORA = ("lora=lora", "lora.student.rank=2", "lora.fake_score.rank=2")
WAITS_AN_ITERATION = 1  # in steady state: whether the gradients were finite
CLOSE = 0.01  # relative, in float32; the student is moved along differences of predictions, which makes rounding larger
VARIANTS = 40  # of compiled blocks, far below the limit


def figures(result: TrainResult) -> dict[str, float]:
    """The losses and gradient norms of a run's last updates."""
    found = {name: value for name, value in result.metrics.items() if name.endswith(("/loss", "/grad_norm"))}
    assert {"student/loss", "fake_score/loss", "student/grad_norm", "fake_score/grad_norm"} <= found.keys()
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return newest_checkpoint(folder / "checkpoints").tensors("networks.")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_in_float32_what_a_cpu_does(name, short_run, device):
    ours = figures(short_run(name, device, FLOAT32, folder="device"))
    assert ours == pytest.approx(figures(short_run(name, "cpu", FLOAT32, folder="cpu")), rel=CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_in_bfloat16_nearly_that(name, short_run, device):
    ours = figures(short_run(name, device, BFLOAT16, folder="device"))
    others = figures(short_run(name, "cpu", BFLOAT16, folder="cpu"))
    losses = {key: value for key, value in ours.items() if key.endswith("loss")}
    assert losses == pytest.approx({key: others[key] for key in losses}, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        LORA,
        ("compute.gradient_checkpointing=true",),
        ("compute.gradient_checkpointing=true", "compute.recompute_attention=false"),
        ("compute.accumulate=2",),
        ("objective=cdm_level_aware",),
    ],
    ids=["lora", "checkpointed", "attention kept", "in parts", "level aware"],
)
def test_options_compute_what_a_cpu_does(options, short_run, device):
    ours = figures(short_run("sd3", device, FLOAT32, *options, folder="device"))
    assert ours == pytest.approx(figures(short_run("sd3", "cpu", FLOAT32, *options, folder="cpu")), rel=CLOSE)


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("name", ["sd3", "longcat", "flux_dev", "qwen_image", "z_image", "sana"])
def test_a_kernel_of_attention_computes_what_the_definition_says(name, kernel, short_run, device):
    """In float32 flash attention and cuDNN leave the calls to another kernel; in bfloat16 they make them."""
    for dtype, tolerance in ((FLOAT32, CLOSE), (BFLOAT16, 0.1)):
        ours = figures(short_run(name, device, dtype, f"compute.attention={kernel}", folder=f"{kernel}_{dtype[-2:]}"))
        exact = figures(short_run(name, device, dtype, "compute.attention=math", folder=f"math_{dtype[-2:]}"))
        losses = [key for key in ours if key.endswith("loss")]
        assert [ours[key] for key in losses] == pytest.approx([exact[key] for key in losses], rel=tolerance)


@pytest.fixture
def no_process_group() -> Iterator[None]:
    """Ends the process group that a run in shards leaves."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [(), LORA, ("strategy.on_cpu=[student_ema]",), ("compute.gradient_checkpointing=true", "compute.accumulate=2")],
    ids=["whole", "lora", "average on the host", "checkpointed in parts"],
)
def test_shards_on_one_device_compute_what_a_single_process_does(options, short_run, device, no_process_group):
    on_one = [option for option in options if not option.startswith("strategy")]
    single = figures(short_run("sd3", device, FLOAT32, *on_one, folder="single"))
    shards = short_run("sd3", device, FLOAT32, "strategy=fsdp2", "trainer.devices=1", *options, folder="shards")
    if device == "cuda":
        assert "nccl" in torch.distributed.get_backend_config()
    assert figures(shards) == pytest.approx(single, rel=CLOSE)


def test_images_of_an_average_on_the_host_are_made_on_the_device(short_run, device, no_process_group, monkeypatch):
    seen: list[torch.device] = []
    noise = samplers.evaluation_noise

    def noted(seed, indices, shape, where):
        seen.append(torch.device(where))
        return noise(seed, indices, shape, where)

    monkeypatch.setattr(samplers, "evaluation_noise", noted)
    place = ("strategy=fsdp2", "trainer.devices=1", "strategy.on_cpu=[student_ema]")
    validation = ("trainer.limit_val_batches=1", "trainer.val_check_interval=2", "data.val_prompts=2")
    more = ("checkpoint.in_background=true", "checkpoint.every=1", "text_cache.encode_ahead=2")
    result = short_run("sd3", device, BFLOAT16, *place, *validation, *more)
    assert result.iteration == 2
    assert {where.type for where in seen} == {device}


def test_a_run_goes_on_where_it_was_saved(short_run, device):
    whole = short_run("sd3", device, BFLOAT16, "trainer.max_steps=4", folder="whole")
    short_run("sd3", device, BFLOAT16, "trainer.max_steps=2", folder="parts")
    parts = short_run("sd3", device, BFLOAT16, "trainer.max_steps=4", folder="parts")
    assert parts.iteration == whole.iteration == 4
    expected, found = weights(whole.folder), weights(parts.folder)
    assert expected.keys() == found.keys()
    furthest = max((found[name] - value).abs().max().item() for name, value in expected.items())
    assert furthest <= 1e-6  # a GPU's sums may be in another order


def test_validation_makes_the_images_of_a_cpu(short_run, device, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    step = CDMModule.validation_step

    def kept(self, batch, index):
        made = step(self, batch, index)
        seen.append({name: images.float().cpu() for name, images in made["images"].items()})
        return made

    monkeypatch.setattr(CDMModule, "validation_step", kept)
    options = ("trainer.limit_val_batches=1", "trainer.val_check_interval=2", "data.val_prompts=2", FLOAT32)
    for folder, accelerator in (("device", device), ("other", "cpu")):
        short_run("sd3", accelerator, *options, folder=folder)
    ours, others = seen
    assert ours.keys() == others.keys() != set()
    for name, images in ours.items():
        assert 0 <= images.min() <= images.max() <= 1
        assert (images - others[name]).abs().mean() < 0.01, name


@pytest.mark.parametrize("options", [(), LORA, ("strategy=fsdp2", "trainer.devices=1")], ids=["whole", "lora", "fsdp2"])
def test_all_calls_run_compiled(options, short_run, device, no_process_group):
    torch._dynamo.reset()
    counters.clear()
    backend = "inductor" if device == "cuda" else "aot_eager"
    short_run(
        "sd3", device, BFLOAT16, f"compute.compile_backend={backend}", "compute.gradient_checkpointing=true", *options
    )
    frames, variants = counters["frames"], counters["stats"]["unique_graphs"]
    assert frames["total"] == frames["ok"] > 0
    assert 0 < variants < VARIANTS
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sd3", "longcat", "flux_dev", "qwen_image", "z_image", "sana"])
def test_the_host_waits_once_an_iteration(name, short_run, device, monkeypatch):
    if device != "cuda":
        pytest.skip("only CUDA tells where the host waits")
    places: list[list[str]] = []
    step = CDMModule.training_step

    def watched(self, batch, index):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step(self, batch, index)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places.append([f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)])

    monkeypatch.setattr(CDMModule, "training_step", watched)
    short_run(name, device, BFLOAT16, "trainer.max_steps=8", "trainer.log_every_n_steps=100")
    for of_iteration in places[4:]:  # by then all texts are in memory
        assert len(of_iteration) <= WAITS_AN_ITERATION, of_iteration


def test_no_more_memory_is_taken_in_later_cycles(short_run, device, monkeypatch):
    if device != "cuda":
        pytest.skip("only CUDA counts its memory")
    held: list[int] = []
    step = CDMModule.training_step

    def noted(self, batch, index):
        step(self, batch, index)
        held.append(torch.cuda.memory_allocated())

    monkeypatch.setattr(CDMModule, "training_step", noted)
    short_run("sd3", device, BFLOAT16, "trainer.max_steps=10")
    assert held[-1] <= 1.05 * held[3]
