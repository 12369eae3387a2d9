"""The configuration: every experiment and every option composes and builds its objects; mistakes are one line."""

import inspect
import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tiny_pipelines import FAMILIES

from cdm_lightning import config as config_module
from cdm_lightning.config import asset_path, build, compose, conf_dir, job_folder
from cdm_lightning.config.secrets import masked_command, plain
from cdm_lightning.core.lengths import FixedLength
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.errors import UserError
from cdm_lightning.module import CDMModule

ROOT = Path(__file__).parents[1]
OF_THE_SIZE = ("compute_dtype", "gradient_checkpointing")  # chosen for a network of two billion weights
DISTILLATIONS = sorted(
    path.stem for path in (ROOT / "conf/experiment").glob("*.yaml") if not path.stem.endswith("_teacher")
)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def targets(node: object) -> list[dict]:
    """Every node with a `_target_` in plain containers."""
    if isinstance(node, list):
        return [found for child in node for found in targets(child)]
    if not isinstance(node, dict):
        return []
    return [node] * ("_target_" in node) + [found for child in node.values() for found in targets(child)]


def composed(tmp_path: Path, *overrides: str) -> DictConfig:
    return compose([f"output_dir={tmp_path}", *overrides])


# ---- everything composes and builds


@pytest.fixture
def local_overrides(tiny_folder, prompt_file, tmp_path_factory) -> Callable[[str, str], list[str]]:
    """What replaces downloads and bundled files, by the class of the backbone."""
    folders = {family.backbone.__name__: name for name, family in FAMILIES.items()}
    data = [f"data.train.path={prompt_file}", f"data.val.path={prompt_file}"]
    captions = [f"data.train.folder={captioned(tmp_path_factory.mktemp('captions'))}", "data.train.image_size=[32,32]"]

    def of(kind: str, experiment: str) -> list[str]:
        if kind not in folders:
            return []
        local = [f"backbone.pretrained={tiny_folder(folders[kind])}"]
        return [*local, *(captions if experiment == "sd3_dmd2" else data)]

    return of


def captioned(folder: Path) -> Path:
    """A folder with one image and its caption."""
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "nothing"}\n')
    return folder


@pytest.mark.parametrize("experiment", DISTILLATIONS)
def test_every_experiment_composes_and_builds(tmp_path, local_overrides, experiment):
    family = composed(tmp_path, f"experiment={experiment}").backbone._target_.rpartition(".")[2]
    config = composed(tmp_path, f"experiment={experiment}", *local_overrides(family, experiment))
    module = build(config, "module")
    assert isinstance(module, CDMModule)
    assert type(module.backbone).__name__ == family
    assert module.backbone.fingerprint
    assert len(build(config, "data").train) > 0
    sharded = config.strategy._target_.endswith(".fully_sharded")
    assert build(config, "strategy") == "auto" or sharded
    assert sharded == (experiment == "sd3_cdm_80gb")
    trainer = build(config, "trainer")(logger=False, accelerator="cpu", enable_checkpointing=False)
    assert trainer.max_steps == config.trainer.max_steps
    assert module.updates.recipes["student"].learning_rate.total == config.trainer.max_steps
    assert config.run_name == experiment  # else two experiments would share a folder


@pytest.mark.parametrize(
    "override",
    [f"schedule/length={name}" for name in options("schedule/length")]
    + [f"schedule={name}" for name in options("schedule")]
    + [f"objective={name}" for name in options("objective")]
    + [f"objective/levels@objective.dm_levels={name}" for name in options("objective/levels")]
    + ["objective.cdm_input=renoised", "objective.teacher_base=final", "schedule.stratified=true"],
)
def test_every_choice_of_the_algorithm_builds(tmp_path, override):
    config = composed(tmp_path, "experiment=toy2d_cdm", override)
    assert build(config, "objective").rollout == ("full" if "final" in override else "to_anchor")
    assert build(config, "schedule")


@pytest.mark.parametrize("debug", options("debug"))
@pytest.mark.parametrize("logger", options("logger"))
def test_debug_and_logger_options_compose(tmp_path, debug, logger):
    config = plain(composed(tmp_path, "experiment=toy2d_cdm", f"debug={debug}", f"logger={logger}"))
    assert config["module"]["seed"] == 0
    assert len(config["logger"]) == (0 if logger == "none" else 1)


def test_every_leaf_is_an_argument_of_its_class(tmp_path):
    """The keys of every `_target_` in every experiment and callback option are parameters that exist."""
    groups = ("callbacks", "metric", "backbone", "data", "lora", "resolution", "ema", "compute", "validation")
    columns = [[f"{group}={f'[{name}]' if group == 'metric' else name}" for name in options(group)] for group in groups]
    rows = [[f"experiment={name}"] for name in DISTILLATIONS]
    rows += [
        [choice for choice in row if choice] for row in zip_longest(*columns)
    ]  # one option of each group at a time
    for override in rows:
        config = OmegaConf.to_container(composed(tmp_path, *override), resolve=False)
        found = targets({key: node for key, node in config.items() if key != "module"})
        assert found
        for node in found:
            signature = inspect.signature(get_object(node["_target_"]))
            takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
            unknown = {key for key in node if not key.startswith("_")} - signature.parameters.keys()
            assert takes_all or not unknown, (override, node["_target_"], unknown)


def test_yaml_repeats_the_published_defaults_of_the_constructors(tmp_path):
    """What conf/ lists for convenience equals what the signatures say, where sd3_cdm is the published recipe."""
    config = plain(composed(tmp_path, "experiment=sd3_cdm"))
    for node in (*targets(config["objective"]), *targets(config["schedule"]), config["module"], config["ema"]):
        for name, parameter in inspect.signature(get_class(node["_target_"])).parameters.items():
            if name in node and isinstance(parameter.default, (int, float, str)) and name not in OF_THE_SIZE:
                assert node[name] == parameter.default, (node["_target_"], name)
    optim = config["optim"]
    assert (optim["student"]["learning_rate"]["peak"], optim["fake_score"]["learning_rate"]["peak"]) == (1e-5, 5e-6)
    assert optim["student"]["optimizer"]["weight_decay"] == 1e-4
    assert (config["trainer"]["max_steps"], config["data"]["batch_size"]) == (4000, 16)
    assert config["module"]["compute_dtype"] == "bfloat16"
    assert config["compute"]["gradient_checkpointing"]


def test_longcats_sigmas_are_those_of_the_release_unless_asked_for_otherwise(tmp_path):
    """The authors' configuration names 0.02 to 0.98; their code does not read it and runs 0.25 to 0.95."""
    for override, low, high in (
        ("experiment=longcat_cdm", 0.25, 0.95),
        ("schedule=longcat_as_released", 0.25, 0.95),
        ("schedule=longcat_as_meant", 0.02, 0.98),
    ):
        schedule = build(composed(tmp_path, override), "schedule")
        rng = StepRandom(0, 1, range(400), "cpu")
        inner = replace(schedule, length=FixedLength(20)).sample(rng, lambda sigmas: sigmas)[:, 1:-1]
        assert low <= inner.min() < low + 0.001 < high - 0.001 < inner.max() <= high


def test_ablations_differ_in_what_they_name(tmp_path):
    dmd, full = (plain(composed(tmp_path, f"experiment={name}")) for name in ("sd3_dmd", "sd3_cdm"))
    assert dmd["objective"] == {**full["objective"], "cdm_weight": 0.0}
    assert dmd["schedule"]["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    ramp = plain(composed(tmp_path, "objective=cdm_ramp"))
    assert build(composed(tmp_path, "objective=cdm_ramp"), "objective").cdm_weight.at(199) == 1.0
    assert ramp["objective"]["ca_weight"] == 1.0


# ---- mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense=1", "Could not override 'nonsense'"),
        ("objective.cdm_wieght=0", "Could not override 'objective.cdm_wieght'"),
        ("experiment=sd4", "Could not find 'experiment/sd4'; Available options in 'experiment':"),
        ("objective=gan", "Could not find 'objective/gan'"),
        ("trainer.max_steps", "cannot read the argument 'trainer.max_steps': write KEY=VALUE"),
    ],
)
def test_unknown_overrides_are_one_line(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        composed(tmp_path, override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "provider=" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("+objective.weight=1", "objective", "objective has no option 'weight'"),
        ("+schedule.length.mean=3", "schedule", "schedule.length has no option 'mean'"),
        ("+optim.student.optimizer.beta=1", "optim", "did you mean betas?"),
        ("+module.student_evry=2", "module", "module has no option 'student_evry'"),
        ("+trainer.gradient_clip=1", "trainer", "trainer has no option 'gradient_clip'"),
        ("schedule.length.low=0", "schedule", "schedule.length.low=0 must be a whole number of at least 1"),
        (
            "objective.cdm_input=x",
            "objective",
            "objective.cdm_input=x must be one of extrapolated, trajectory, renoised",
        ),
        ("backbone._target_=cdm_lightning.nothing.Nothing", "backbone", "cdm_lightning.nothing"),
        (
            "optim.student.learning_rate.peak=???",
            "optim",
            "optim.student.learning_rate.peak is required, but has no value; set",
        ),
    ],
)
def test_keys_and_values_that_constructors_refuse_are_one_line(tmp_path, override, key, message):
    with pytest.raises(UserError) as error:
        build(composed(tmp_path, "experiment=toy2d_cdm", override), key)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bug_in_a_constructor_keeps_its_trace():
    """Of this package; whatever another library's constructor refuses is told in one line."""
    from hydra.errors import InstantiationException

    bug = OmegaConf.create({"node": {"_target_": "cdm_lightning.errors.UserError", "_args_": [3]}})
    with pytest.raises(InstantiationException):
        build(bug, "node")
    config = OmegaConf.create({"node": {"_target_": "pathlib.Path", "_args_": [3]}})
    with pytest.raises(UserError, match=r"^node: "):
        build(config, "node")


# ---- places and secrets


def test_configurations_are_found_in_the_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    assert conf_dir() == ROOT / "conf"
    monkeypatch.setattr(config_module, "PACKAGE", tmp_path / "cdm_lightning")
    (tmp_path / "cdm_lightning/conf").mkdir(parents=True)
    assert conf_dir() == tmp_path / "cdm_lightning/conf"
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["conf"] == "cdm_lightning/conf"


def test_assets_lie_in_the_package():
    assert Path(asset_path("prompts/general.txt")) == ROOT / "src/cdm_lightning/assets/prompts/general.txt"


def test_sweep_folders_are_flat_and_tell_jobs_apart():
    names = [job_folder(f"schedule/length={name},seed=1") for name in ("uniform", "fixed")]
    assert names == ["schedule.length=uniform,seed=1", "schedule.length=fixed,seed=1"]
    long = [job_folder(f"a.b={'x' * 300}{end}") for end in "yz"]
    assert long[0] != long[1]
    assert all(len(name) < 140 and "/" not in name for name in long)
    assert job_folder("") == "defaults"


def test_secrets_are_masked():
    config = OmegaConf.create({"logger": {"api_key": "abc", "name": "p"}, "backbone": {"token": "hf_x", "tokens": 77}})
    assert plain(config) == {"logger": {"api_key": "***", "name": "p"}, "backbone": {"token": "***", "tokens": 77}}
    assert masked_command(["+backbone.token=hf_x", "seed=1", "-m"]) == ["+backbone.token=***", "seed=1", "-m"]
