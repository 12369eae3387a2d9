"""Several processes do what one does on the same global batch, whatever the strategy and whatever is trained."""

import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import train_together

import cdm_lightning.train
from cdm_lightning.checkpoint.folder import checkpoints_in
from cdm_lightning.checkpoint.stored import newest_checkpoint
from cdm_lightning.config import build, compose
from cdm_lightning.distributed.strategy import MeshStrategy
from cdm_lightning.errors import UserError
from cdm_lightning.train import TrainResult, train

SD3 = (  # the pipeline's own path, as small as it goes; an optimizer whose steps are as even as the gradients are
    "experiment=tiny_sd3_cdm",
    "callbacks=none",
    "trainer.limit_val_batches=0",
    "trainer.max_steps=4",
    "trainer.log_every_n_steps=1",
    "objective.student_every=2",
    "compute.gradient_checkpointing=true",
    "schedule.length.high=3",
    "backbone.max_sequence_length=8",
    "backbone.compact_text=null",
    "optim.student.learning_rate.warmup=0",
    "optim.fake_score.learning_rate.warmup=0",
    "optim.student.optimizer.eps=1e-3",
    "optim.fake_score.optimizer.eps=1e-3",
)
ROLES = {
    "full": (),
    "lora": ("lora=lora", "lora.student.rank=2", "lora.fake_score.rank=2"),
    "lora_student": ("lora=lora_student", "lora.student.rank=2", "objective.fake_score_merge=0"),
    "lora_fake_score": ("lora=lora_fake_score", "lora.fake_score.rank=2", "objective.fake_score_merge=0"),
}
ROUNDING = 2e-6  # of a few steps, in weights that move by 1e-4 and more


@pytest.fixture
def sd3(tiny_pipeline_folder, prompt_file) -> list[str]:
    """Overrides of a run of the tiny pipeline without its batch size."""
    paths = [f"backbone.pretrained={tiny_pipeline_folder}"]
    return [*SD3, *paths, f"data.train.path={prompt_file}", f"data.val.path={prompt_file}"]


def alone(overrides: list[str], folder: Path, *more: str) -> TrainResult:
    """One process with the whole batch of 4."""
    return train(compose([*overrides, "data.batch_size=4", f"output_dir={folder}", *more]))


def shared(overrides: list[str], folder: Path, strategy: str, *more: str, processes: int = 2) -> Path:
    """Several processes with equal parts of it; the run's folder."""
    place = [f"strategy={strategy}", f"trainer.devices={processes}", "trainer.accelerator=cpu", f"output_dir={folder}"]
    train_together(processes, [*overrides, f"data.batch_size={4 // processes}", *place, *more])
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return newest_checkpoint(folder / "checkpoints").tensors("networks.")


def furthest(a: Path, b: Path) -> float:
    """The largest difference between any two weights of the same name in the newest checkpoints of two runs."""
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    return max((value - b[name]).abs().max().item() for name, value in a.items())


# ---- equality


def test_the_plane_on_two_and_four_processes(toy_overrides, tmp_path):
    toy = [*toy_overrides, "trainer.max_steps=6"]
    one = alone(toy, tmp_path / "one").folder
    for strategy in ("ddp", "fsdp2"):
        assert furthest(shared(toy, tmp_path / strategy, strategy), one) < ROUNDING
    two_by_two = shared(toy, tmp_path / "hsdp", "hsdp", "strategy.replicas=2", processes=4)
    assert furthest(two_by_two, one) < ROUNDING
    assert furthest(alone(toy, tmp_path / "other", "seed=1").folder, one) > 100 * ROUNDING  # the comparison can fail


@pytest.mark.parametrize(
    ("roles", "strategy"),
    [
        ("full", "fsdp2"),
        # of adapters, `test_other_objectives.py` has the quick one: `level_aware` is CDM with a further input
        pytest.param("lora", "fsdp2", marks=pytest.mark.slow),
        pytest.param("lora", "ddp", marks=pytest.mark.slow),
        pytest.param("lora_student", "fsdp2", marks=pytest.mark.slow),
        pytest.param("lora_fake_score", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_the_sd3_classes_on_two_processes(sd3, roles, strategy, tmp_path):
    overrides = [*sd3, *ROLES[roles]]
    one = alone(overrides, tmp_path / "one")
    assert furthest(shared(overrides, tmp_path / "two", strategy), one.folder) < ROUNDING
    assert furthest(alone(overrides, tmp_path / "other", "seed=1").folder, one.folder) > 50 * ROUNDING


def test_a_batch_in_parts_is_the_whole_batch(toy_overrides, tmp_path):
    toy = [*toy_overrides, "compute.gradient_checkpointing=true"]
    one = alone(toy, tmp_path / "one")
    for parts in (2, 3):  # of 4 samples: equal and unequal
        accumulated = alone(toy, tmp_path / f"in_{parts}", f"compute.accumulate={parts}")
        assert furthest(accumulated.folder, one.folder) < ROUNDING
        for name in ("student/loss", "fake_score/loss", "student/grad_norm"):
            assert accumulated.metrics[name] == pytest.approx(one.metrics[name], rel=1e-4)


def test_networks_that_rest_in_host_memory_compute_the_same(toy_overrides, tmp_path):
    toy = [*toy_overrides, "trainer.max_steps=6"]
    one = alone(toy, tmp_path / "one").folder
    resting = shared(toy, tmp_path / "two", "fsdp2", "strategy.on_cpu=[student_ema,student,teacher]")
    assert furthest(resting, one) < ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(  # shards large enough for blocks of 256
            ("optim=adamw8bit", "backbone.hidden=128"), marks=pytest.mark.slow
        ),
        ("optim.student.optimizer.fused=true", "optim.fake_score.optimizer.fused=true"),
        ("compute.compile_backend=aot_eager",),
    ],
    ids=["8bit", "fused", "compiled"],
)
def test_options_of_speed_and_memory_train_alike_on_shards(toy_overrides, options, tmp_path):
    rates = [f"optim.{network}.learning_rate.peak=1e-3" for network in ("student", "fake_score")]
    even = [f"optim.{network}.learning_rate.warmup=0" for network in ("student", "fake_score")]
    even += [f"optim.{network}.optimizer.eps=1e-3" for network in ("student", "fake_score")]
    toy = [*toy_overrides, *rates, *even, "trainer.max_steps=4"]
    size = [option for option in options if option.startswith("backbone")]
    plain = alone([*toy, *size], tmp_path / "plain").folder
    one = alone([*toy, *options], tmp_path / "one").folder
    two = shared([*toy, *options], tmp_path / "two", "fsdp2")
    untrained = alone([*toy, *size, *(rate.replace("1e-3", "0") for rate in rates)], tmp_path / "untrained").folder
    moved = furthest(untrained, plain)
    assert furthest(two, one) < 0.02 * moved
    assert furthest(one, plain) < (0.2 if size else 0.001) * moved  # 8 bits round the moments


def test_bfloat16_compute_is_the_same_on_shards(toy_overrides, tmp_path):
    even = [f"optim.{network}.optimizer.eps=1e-3" for network in ("student", "fake_score")]
    toy = [*toy_overrides, *even, "module.compute_dtype=bfloat16", "trainer.max_steps=6"]
    one = alone(toy, tmp_path / "one").folder
    assert furthest(shared(toy, tmp_path / "two", "fsdp2"), one) < 1e-5
    rounded = furthest(alone([*toy, "module.compute_dtype=float32"], tmp_path / "float32").folder, one)
    assert rounded > 0


# ---- validation and the end of a run


def test_validation_on_two_processes_measures_what_one_measures(toy_overrides, tmp_path):
    """Five prompts, three at a time on two processes: the second has one prompt more than the first."""
    measuring = [
        "callbacks=default",
        "metric=[energy_distance]",
        "trainer.limit_val_batches=1.0",
        "trainer.val_check_interval=4",
        "data.val_prompts=5",
    ]
    more = ["trainer.max_steps=4", "data.val_batch_size=2", "+metric.frechet={_target_: test_strategies.pixels_fid}"]
    more.append("+feature.corner={_target_: test_strategies.Corner}")
    run = [*toy_overrides, *measuring, *more]
    one, two = alone(run, tmp_path / "one"), shared(run, tmp_path / "two", "fsdp2")
    theirs = last_metrics(two)
    compared = {name: value for name, value in one.metrics.items() if name.startswith("val/")}
    assert len(compared) >= 8
    for name, value in compared.items():
        assert theirs[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert (two / "samples/iteration_0000004.png").is_file()


def pixels_fid():
    """A Fréchet distance in a few pixels, of which no two processes hold the same images."""
    from cdm_lightning.metrics.frechet import Frechet

    reference = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Frechet([reference], "corner")


class Corner(torch.nn.Module):
    """Four pixels of an image as features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 14:18:2, 14:18:2].flatten(1)


def last_metrics(folder: Path) -> dict[str, float]:
    """The last value in every column of the run's CSV log."""
    head, *rows = (next((folder / "logs").rglob("metrics.csv"))).read_text().splitlines()
    found: dict[str, float] = {}
    for row in rows:
        found |= {name: float(value) for name, value in zip(head.split(","), row.split(",")) if value}
    return found


def test_too_few_validation_prompts_are_refused(toy_overrides, tmp_path):
    few = ["trainer.limit_val_batches=1.0", "trainer.val_check_interval=4", "data.val_prompts=1"]
    with pytest.raises(Exception, match="1 validation prompts are too few for 2 processes"):
        shared([*toy_overrides, *few], tmp_path, "fsdp2")


def test_the_ladder_and_the_export_at_the_end_of_a_sharded_run(sd3, tmp_path):
    from cdm_lightning.backbones.sd3 import SD3Backbone

    short = ["callbacks=demo", "~callbacks.sample_grid", "trainer.max_steps=2", "callbacks.ladder.evaluation.count=8"]
    short += ["metric=[shapes_frechet,shapes_clip_score]", "metric.frechet_real.reference.count=16"]
    sizes = ["batch_size=8", "real_images=null"]
    samplers = (
        "samplers=[{_target_: cdm_lightning.evaluation.samplers.SamplerSpec, name: teacher, network: teacher, nfe: 2},"
    )
    samplers += "{_target_: cdm_lightning.evaluation.samplers.SamplerSpec, name: student, nfe: 2}]"
    evaluation = [f"callbacks.ladder.evaluation.{size}" for size in [*sizes, samplers]]
    run = [override for override in sd3 if override != "callbacks=none"] + [*short, *evaluation]
    one, two = alone(run, tmp_path / "one").folder, shared(run, tmp_path / "two", "fsdp2")
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["rows"] for folder in (one, two))
    for row, other in zip(ours, theirs, strict=True):
        assert other["clip_score"] == pytest.approx(row["clip_score"], rel=1e-3)
        assert other["frechet_real"] == pytest.approx(row["frechet_real"], rel=1e-2)
    exported, sharded = (SD3Backbone(str(folder / "student")).build_network() for folder in (one, two))
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(sharded.get_parameter(name), parameter, rtol=0, atol=ROUNDING)


# ---- dead-locks


def test_rollouts_of_different_lengths_do_not_wait_for_each_other(toy_overrides, tmp_path):
    """One sample a process: nearly every iteration has another anchor on each. Without agreement this hangs."""
    ragged = ["schedule/length=fixed", "schedule.length.length=8", "trainer.max_steps=12"]
    two = shared([*toy_overrides, *ragged], tmp_path / "two", "fsdp2", "data.batch_size=1")
    assert furthest(two, alone([*toy_overrides, *ragged], tmp_path / "one", "data.batch_size=2").folder) < 1e-5


@pytest.mark.slow
def test_the_dead_lock_is_real(toy_overrides, tmp_path):
    with pytest.raises(Exception, match=r"took more than|exit codes"):
        train_together(2, hanging(toy_overrides, tmp_path), time_limit=20, prepare=disagree)


def hanging(toy_overrides: list[str], folder: Path) -> list[str]:
    ragged = ["schedule/length=fixed", "schedule.length.length=8", "trainer.max_steps=12", "data.batch_size=1"]
    return [
        *toy_overrides,
        *ragged,
        "strategy=fsdp2",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        f"output_dir={folder}",
    ]


def disagree() -> None:
    """Let every rollout make the calls that its own anchors need."""
    from cdm_lightning import module

    module.largest = lambda calls: calls


# ---- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=single", "trainer.devices=2"], "strategy=single runs one process, but 2 were requested"),
        (
            ["strategy=hsdp", "trainer.devices=3", "strategy.replicas=2"],
            "strategy.replicas=2 does not divide the number of processes, 3",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused(overrides, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        build(compose([f"output_dir={tmp_path}", "experiment=toy2d_cdm", *overrides]), "strategy")


def test_a_run_ends_without_a_copy_of_its_networks_and_optimizer_states(toy_overrides, tmp_path, monkeypatch):
    """Lightning would copy both to host memory, 57 GB for SD3-Medium."""
    kept = []

    class Ends(L.Callback):
        def on_train_end(self, trainer, module):
            assert all(optimizer.state for optimizer in trainer.optimizers)

        def on_fit_end(self, trainer, module):
            kept.append(([len(optimizer.state) for optimizer in trainer.optimizers], module.networks))

    def refuse(module):
        raise AssertionError("the networks are copied to the host")

    def make_trainer(config, **parts):
        return make(config, **parts | {"callbacks": [Ends(), *parts["callbacks"]]})

    make = cdm_lightning.train.make_trainer
    monkeypatch.setattr(cdm_lightning.train, "make_trainer", make_trainer)
    monkeypatch.setattr(L.LightningModule, "cpu", refuse)
    result = alone([*toy_overrides, "trainer.max_steps=2"], tmp_path)
    [(states, networks)] = kept
    assert states == [0, 0]
    assert all(parameter.grad is None for parameter in networks.parameters())
    assert result.checkpoint is not None


def test_a_sharded_run_frees_its_optimizer_states_at_its_end(monkeypatch):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state
    strategy = MeshStrategy(1, 1)
    strategy.optimizers = [optimizer]
    monkeypatch.setattr(ModelParallelStrategy, "teardown", lambda self: None)  # it ends what was never begun here
    strategy.teardown()
    assert not optimizer.state
    assert network.weight.grad is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_process_with_a_gpu_destroys_its_group_when_it_exits(monkeypatch, tmp_path, device):
    registered = []
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: None)
    monkeypatch.setattr(MeshStrategy, "root_device", property(lambda self: torch.device(device)))
    monkeypatch.setattr("atexit.register", registered.append)
    MeshStrategy(replicas=1, shards=1).setup_environment()
    assert len(registered) == (device == "cuda")
    if registered and not torch.distributed.is_initialized():
        registered[0]()  # without a group there is nothing to do
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
        )
        registered[0]()
        assert not torch.distributed.is_initialized()


def test_a_network_that_there_is_not_cannot_rest_in_host_memory(toy_overrides, tmp_path):
    place = ["strategy=ddp", "trainer.devices=1", "strategy.on_cpu=[pupil]", f"output_dir={tmp_path}"]
    message = "strategy.on_cpu names pupil, which is not a network of this run; it may list student, fake_score, student_ema, teacher"
    with pytest.raises(UserError, match=message):
        train(compose([*toy_overrides, *place]))
    assert not checkpoints_in(tmp_path / "checkpoints")


def test_a_launcher_that_started_another_number_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="give 2 processes, but the launcher started 4"):
        build(compose([f"output_dir={tmp_path}", "strategy=fsdp2", "trainer.devices=2"]), "strategy")
