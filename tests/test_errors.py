"""Bad input through the command line: one line that says what is wrong, exit status 2, before any long work."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from safetensors.torch import save_file

from cdm_lightning.callbacks.foreign import check_monitors, open_loggers
from cdm_lightning.callbacks.loggers import GuardedLogger
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config.arguments import check_arguments
from cdm_lightning.distributed.strategy import device_count, single_process
from cdm_lightning.errors import UserError
from cdm_lightning.training.optim import LearningRate, OptimizerRecipe
from cdm_lightning.training.trial import require_working


def test_unknown_keys(refused):
    assert "Could not override 'objective.cdm_wieght'" in refused("objective.cdm_wieght=0")
    assert "module.student_every is now objective.student_every" in refused("module.student_every=3")
    assert "objective has no option 'wieght'" in refused("+objective.wieght=0")
    said = refused("+trainer.gradient_clip=1")
    assert "trainer has no option 'gradient_clip', because Trainer has no such parameter; its options are: " in said
    assert "gradient_clip_val" not in said  # this project does not use it
    assert (
        "optim.student.optimizer has no option 'beta', because AdamW has no such parameter; did you mean betas?"
        in refused("+optim.student.optimizer.beta=0")
    )


def test_a_group_that_is_null(refused):
    assert "resolution=null: the value must be the name of a file" in refused("resolution=null")


def test_texts_in_the_place_of_numbers(refused):
    assert "data.batch_size=abc must be a whole number of at least 1" in refused("data.batch_size=abc")
    assert (
        "data.val_prompts=many must be a whole number of at least 1 and at most 1e9 or null (set on the command line)"
        in refused("data.val_prompts=many")
    )
    assert "optim.student.learning_rate.peak=high must be a number of at least 0" in refused(
        "optim.student.learning_rate.peak=high"
    )
    assert (
        "validation.samplers.0.height=wide must be a whole number of at least 1 and at most 32768 or null"
        in refused("+validation.samplers.0.height=wide")
    )
    for seed in ("-1", "null", "abc"):
        assert f"seed={seed} must be a whole number of at least 0" in refused(f"seed={seed}")
    assert (
        "compute.gradient_checkpointing=maybe must be a number of at least 0 and at most 1 or true or false"
        in refused("compute.gradient_checkpointing=maybe")
    )


def test_values_of_another_kind_than_the_constructors_take(refused):
    assert "objective.student_every=1.5 must be a whole number" in refused("objective.student_every=1.5")
    assert "objective.student_every=True must be a whole number" in refused("objective.student_every=true")
    assert (
        "objective.dm_weight=null must be a number of at least 0 and at most 1e6 or LinearRamp (a mapping with a _target_)"
        in refused("objective.dm_weight=null")
    )
    assert (
        "objective.dm_weight=True must be a number of at least 0 and at most 1e6 or LinearRamp (a mapping with a _target_)"
        in refused("objective.dm_weight=true")
    )
    assert (
        "objective.dm_weight=[1, 2] must be a number of at least 0 and at most 1e6 or LinearRamp (a mapping with a _target_)"
        in refused("objective.dm_weight=[1,2]")
    )
    assert "objective.dm_levels=null must be SigmaLevels" in refused("objective.dm_levels=null")
    assert "optim.student.learning_rate.warmup=1.5 must be a whole number" in refused(
        "optim.student.learning_rate.warmup=1.5"
    )
    assert "validation.samplers.0.nfe=null must be a whole number" in refused("validation.samplers.0.nfe=null")
    assert "validation.samplers.0={'name': 'x'} must be SamplerSpec" in refused("validation.samplers=[{name: x}]")
    assert "data.train=null must be Prompts" in refused("data.train=null")
    assert "trainer.max_steps=2.5 must be a whole number" in refused("trainer.max_steps=2.5")


def test_arguments_that_a_data_set_does_not_take(refused):
    assert "data.train has no option 'image_size', because PromptFile has no such parameter" in refused(
        "+data.train.image_size=32"
    )
    images = ["experiment=toy2d_cdm", "data=captioned_images", "data.train.folder=images"]
    assert "data.train.image_size=32 must be a list with 2 entries of a whole number" in refused(
        "data.train.image_size=32", base=images
    )
    assert "data.train.image_size.1=big must be a whole number" in refused(
        "data.train.image_size=[32,big]", base=images
    )
    assert "data.train.image_size=[32] must be a list with 2 entries" in refused(
        "data.train.image_size=[32]", base=images
    )


def test_callbacks_that_are_none(refused):
    message = "callbacks.foo has no _target_; set callbacks.foo._target_=CLASS, or callbacks.foo=null to leave it out"
    assert message in refused("+callbacks.foo.bar=1")
    assert message in refused("+callbacks.foo=3")
    assert "checkpoint=3 must be a mapping with a _target_" in refused("checkpoint=3")


def test_prompt_files(refused, tmp_path):
    empty, latin, lines = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "lines.jsonl"
    empty.touch()
    latin.write_bytes("grün".encode("latin-1"))
    lines.write_text('{"text": "x"}')
    assert "no.txt: cannot read the prompt file (No such file or directory)" in refused("data.train.path=no.txt")
    assert "empty.txt: the prompt file has no prompts" in refused(f"data.train.path={empty}")
    assert "latin.txt, line 1: the prompt file is not UTF-8" in refused(f"data.val.path={latin}")
    assert 'lines.jsonl, line 1: not a JSON object with a string under "prompt"' in refused(f"data.train.path={lines}")


def test_several_processes_on_the_single_strategy(refused, monkeypatch):
    assert "strategy=single runs one process, but 4 were requested; set trainer.devices=1" in refused(
        "trainer.devices=4"
    )
    assert "6 were requested" in refused("trainer.devices=[0,1,2]", "trainer.num_nodes=2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "8 were requested" in refused()


@pytest.mark.parametrize(("devices", "count"), [(1, 1), (3, 3), ("2", 2), ([1], 1), ("0,1", 2), ("3,", 1)])
def test_device_counts(devices, count):
    assert device_count(devices) == count
    assert device_count("auto") == device_count(-1) == max(1, torch.cuda.device_count())
    if count == 1:
        assert single_process(devices) == "auto"


def test_an_output_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/mine").touch()
    assert "outputs/mine" in refused()
    assert "run_name='mine/below' must be a name" in refused("run_name=mine/below")


def test_a_pipeline_folder_that_does_not_exist(refused):
    line = refused("backbone.pretrained=/no/such/folder", base=["experiment=sd3_cdm"])
    assert "/no/such/folder does not exist" in line


def test_a_checkpoint_of_another_backbone(refused, toy_run):
    checkpoint = toy_run("trainer.max_steps=2", "backbone.hidden=8", folder="other").checkpoint
    line = refused(f"resume={checkpoint}")
    assert "was trained with the backbone toy2d-" in line
    assert "but the configuration has toy2d-" in line


def test_a_run_folder_of_another_backbone(refused, toy_run, tmp_path):
    toy_run("trainer.max_steps=2", "backbone.hidden=8", folder="outputs/mine")
    assert "was trained with the backbone toy2d-" in refused()


def test_a_truncated_checkpoint(refused, toy_run):
    checkpoint = toy_run("trainer.max_steps=2", folder="other").checkpoint
    shard = next(checkpoint.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-500])
    assert f"iteration_0000002: {shard.name} is truncated" in refused(f"resume={checkpoint}")
    assert "no_such: no such checkpoint" in refused("resume=no_such")


def test_checkpoints_of_older_versions(refused, toy_run, tmp_path):
    checkpoint = toy_run("trainer.max_steps=2", folder="outputs/mine").checkpoint
    (checkpoint.parent / "iteration_0000001.ckpt").write_bytes(b"old")
    assert "iteration_0000001.ckpt is from an older version and cannot be read" in refused()
    assert "of an older version, or of another program" in refused(
        f"resume={checkpoint.parent / 'iteration_0000001.ckpt'}", "run_name=new"
    )


def test_foreign_checkpoints(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "empty").mkdir()
    foreign = {"foreign.pt": "not a cdm_lightning checkpoint", "text.safetensors": "not a cdm_lightning checkpoint"}
    foreign |= {"weights.safetensors": "not a cdm_lightning checkpoint", "empty": "an unfinished checkpoint"}
    for name, message in foreign.items():
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)


def test_metrics_without_their_weights(refused):
    assert "feature.clip.pretrained is required, but has no value" in refused(
        "callbacks=metrics", "metric=[clip_score]"
    )
    missing = refused("callbacks=metrics", "metric=[clip_score]", "feature.clip.pretrained=/no/weights.pt")
    assert "/no/weights.pt" in missing
    other = refused("callbacks=metrics", "metric=[energy_distance]", "metric.energy_distance.feature=dots")
    assert "metric.energy_distance needs the feature extractor feature.dots, which is missing" in other


def test_a_text_is_not_a_list(refused):
    assert "validation.samplers=student_4 must be a list of SamplerSpec" in refused("validation.samplers=student_4")
    doubled = "[{_target_: cdm_lightning.evaluation.samplers.SamplerSpec, name: a},"
    doubled += "{_target_: cdm_lightning.evaluation.samplers.SamplerSpec, name: a}]"
    assert "validation.samplers: two samplers have the name 'a'" in refused(f"validation.samplers={doubled}")


def test_arguments_out_of_range(refused):
    assert "objective.student_every=0 must be a whole number of at least 1" in refused("objective.student_every=0")
    assert "schedule.length.low=0 must be a whole number of at least 1" in refused("schedule.length.low=0")
    assert "checkpoint.every=0 must be a whole number of at least 1" in refused("checkpoint.every=0")
    assert "batch_size" in refused("data.batch_size=0")
    assert "data.num_workers=-1 must be a whole number of at least 0" in refused("data.num_workers=-1")


def test_what_lightning_refuses(refused):
    assert "trainer.accelerator=foo must be one of auto, cpu, gpu" in refused("trainer.accelerator=foo")
    assert "trainer.max_steps=-5 must be a whole number of at least 1" in refused("trainer.max_steps=-5")
    assert "trainer.limit_val_batches=-1 must be" in refused("trainer.limit_val_batches=-1")
    assert "trainer.log_every_n_steps=0 must be a whole number of at least 1" in refused("trainer.log_every_n_steps=0")
    assert "trainer.val_check_interval=0 must be a whole number of at least 1" in refused(
        "trainer.val_check_interval=0"
    )


# ---- optimizers, callbacks and loggers of other libraries


def recipe(optimizer, **options) -> dict[str, OptimizerRecipe]:
    return {"student": OptimizerRecipe(partial(optimizer, **options), LearningRate(1e-4))}


class Upwards(torch.optim.SGD):
    """An optimizer of the user's that makes its steps in the wrong direction."""

    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight.data += weight.grad


@pytest.mark.parametrize(
    ("recipes", "line"),
    [
        (recipe(torch.optim.Adam, betas=[2, 3]), ".betas=[2, 3]: Adam cannot make a step (ValueError: Invalid beta"),
        (recipe(torch.optim.RAdam, eps=-1), ".eps=-1: RAdam cannot make a step (ValueError: Invalid epsilon"),
        (recipe(torch.optim.NAdam, weight_decay="a"), ".weight_decay=a: NAdam cannot make a step (TypeError"),
        (recipe(torch.optim.SGD, momentum=float("nan")), ".momentum=nan: SGD makes weights that are not finite"),
        (recipe(torch.optim.SGD, momentum=0.9, dampening=9.0), ".dampening=9.0: SGD trains away from the target"),
        (recipe(torch.optim.AdamW, fused=True, foreach=True), ".foreach=True: AdamW cannot make a step (RuntimeError"),
        (recipe(torch.optim.AdamW, differentiable=True), ".differentiable=True: AdamW cannot make a step"),
        (recipe(torch.optim.Adagrad, maximize=True), ".maximize=True"),
        (recipe(torch.optim.LBFGS), ": LBFGS cannot make a step"),
        (recipe(torch.optim.SparseAdam), ": SparseAdam cannot make a step"),
        (recipe(torch.optim.Muon), ": Muon cannot make a step"),
        (recipe(torch.nn.Linear, in_features=2, out_features=2), ": Linear cannot make a step (TypeError"),
        (recipe(lambda parameters, lr: {}), ": <lambda> gives a dict, but it must be an optimizer"),
        (recipe(Upwards), ": Upwards trains away from the target"),
    ],
)
def test_optimizers_are_tried_on_small_weights(recipes, line):
    with pytest.raises(UserError) as error:
        require_working(recipes)
    assert f"optim.student.optimizer{line}" in str(error.value)
    assert "\n" not in str(error.value)


def test_optimizers_that_work_are_accepted_and_draw_no_random_numbers():
    before = torch.get_rng_state()
    for name in (
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adamax",
        "AdamW",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    ):
        require_working(recipe(getattr(torch.optim, name)))
    require_working(recipe(torch.optim.AdamW, fused=True, weight_decay=0.1, betas=[0.0, 0.9]))
    require_working(recipe(torch.optim.Muon), adapted=["student"])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match=r"optim.head.optimizer refuses the weights of head \(Muon only supports 2D"):
        recipe(torch.optim.Muon)["student"].build_for("head", [torch.nn.Parameter(torch.zeros(3))])


def refusal(key: str, **node) -> str:
    """What the check of a node of the configuration, with its options, says."""
    with pytest.raises(UserError) as error:
        check_arguments(OmegaConf.create(node), key)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_options_of_optimizers(refused):
    key, adam = "optim.student.optimizer", "torch.optim.adam.Adam"
    line = refusal(key, _target_=adam, betas=[2, 3])
    assert f"{key}.betas.0=2 must be a number of at least 0 and below 1" in line
    assert "optimizer.maximize=True must be one of False" in refusal(key, _target_=adam, maximize=True)
    assert "optimizer.lr must not be set; set learning_rate.peak" in refusal(key, _target_=adam, lr=1)
    assert ".foreach=True: AdamW cannot make a step" in refused("+optim.student.optimizer.foreach=true")


def test_callbacks_of_lightning(refused):
    of = "lightning.pytorch.callbacks"
    average = refusal("callbacks.t", _target_=f"{of}.stochastic_weight_avg.StochasticWeightAveraging", swa_lrs=0.1)
    assert "cannot be used here; set ema.decay" in average
    parts = refusal("callbacks.t", _target_=f"{of}.GradientAccumulationScheduler", scheduling={0: 4})
    assert "cannot be used here; set compute.accumulate" in parts
    line = refused(f"+callbacks.t._target_={of}.Timer", "+callbacks.t.duration=abc")
    assert "callbacks.t: `Timer(duration='abc')` is not a valid duration" in line


def test_figures_that_callbacks_watch():
    logged = ["val/energy_distance/student_4"]
    for monitor in ("nope", "val/nope/student_4", "teacher/loss"):
        for callback in (EarlyStopping(monitor), ModelCheckpoint(monitor=monitor)):
            with pytest.raises(
                UserError, match=rf"callbacks.t.monitor={monitor} is never logged; .* \({logged[0]}\) or of training"
            ):
                check_monitors({"callbacks.t": callback}, logged, ["student"])
    for monitor in ("student/loss", *logged):
        check_monitors({"callbacks.t": EarlyStopping(monitor), "callbacks.m": ModelCheckpoint()}, logged, ["student"])


def test_what_callbacks_of_lightning_refuse_in_training(toy_run):
    of = "+callbacks.t._target_=lightning.pytorch.callbacks"
    with pytest.raises(
        UserError, match=r"callbacks.t: DeviceStatsMonitor cannot be used here \(Cannot use `DeviceStats"
    ):
        toy_run(f"{of}.DeviceStatsMonitor", "logger=none", "trainer.max_steps=1")
    assert toy_run(f"{of}.EarlyStopping", "+callbacks.t.monitor=student/loss", "trainer.max_steps=1").iteration == 1


def test_loggers_of_lightning(tmp_path):
    pytest.importorskip("tensorboard")
    for name in ("lightning.pytorch.loggers", "lightning.pytorch.loggers.tensorboard"):
        target = f"{name}.TensorBoardLogger"
        for option in ({"sub_dir": "../../esc"}, {"filename_suffix": "/../../x"}, {"sub_dir": "/esc"}):
            line = refusal("logger.tensorboard", _target_=target, **option)
            assert f"logger.tensorboard.{next(iter(option))}={next(iter(option.values()))} must be" in line
    logger = TensorBoardLogger(tmp_path / "a", sub_dir="../../../esc")
    with pytest.raises(UserError, match=r"logger.t: TensorBoardLogger would write into .*, outside its save_dir"):
        open_loggers({"logger.t": GuardedLogger(logger)})
    with pytest.raises(UserError, match=r"logger.t: TensorBoardLogger cannot be set up \(TypeError: "):
        open_loggers({"logger.t": GuardedLogger(TensorBoardLogger(tmp_path / "b", max_queue="abc"))})
    assert not (tmp_path / "esc").exists()


def test_what_lightning_and_hydra_refuse_without_a_kind(refused):
    assert "error: trainer: `devices` selected with `CPUAccelerator`" in refused(
        "trainer.accelerator=cpu", "trainer.devices=[5]"
    )
    assert "error: hydra.verbose=[1]: A logger name must be a string" in refused("hydra.verbose=[1]")
