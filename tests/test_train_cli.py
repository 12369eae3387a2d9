"""The command line: what a run leaves behind, sweeps, exit status."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from cdm_lightning import export
from cdm_lightning.checkpoint.stored import read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.exporting.pipeline import model_card
from cdm_lightning.run.folder import Run
from cdm_lightning.train import main, train

Cli = Callable[[Sequence[str]], Path]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_overrides: list[str]) -> Cli:
    """`cli(["-m", "seed=1,2"])` runs the command line in an empty folder, on a toy run of 2 iterations."""

    def run(arguments: Sequence[str]) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by `main`; so that it does not outlive the test
        flags = [argument for argument in arguments if argument.startswith("-")]  # Hydra wants them first
        rest = [argument for argument in arguments if argument not in flags]
        monkeypatch.setattr(sys, "argv", ["train", *flags, *toy_overrides, "trainer.max_steps=2", *rest])
        main()
        return tmp_path

    return run


def test_a_run_leaves_its_configuration_command_and_checkpoint(cli):
    folder = cli(["run_name=mine", "seed=5"]) / "outputs/mine"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seed"] == config["module"]["seed"] == config["data"]["seed"] == 5
    assert config["output_dir"] == str(folder)
    assert config["backbone"]["_target_"] == "cdm_lightning.backbones.toy2d.Toy2DBackbone"
    start = json.loads((folder / "starts.jsonl").read_text())
    assert start["command"][0] == "train"
    assert "seed=5" in start["command"]
    assert start["config"] == config
    assert start["packages"]["torch"] == version("torch")
    assert start["hardware"]["cores"] == os.cpu_count()
    assert start["commit"].removesuffix("-dirty") == head_of_this_checkout()
    assert read_checkpoint(folder / "checkpoints/iteration_0000002").iteration == 2
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "starts.jsonl", "checkpoints", "logs", ".lock"}


def head_of_this_checkout() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_no_environment_and_no_token_is_written(cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    folder = cli(["+logger.csv.prefix=p", "run_name=clean"]) / "outputs/clean"
    written = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".yaml", ".json", ".csv"))
    assert "hf_secret" not in written
    assert os.environ["USER" if "USER" in os.environ else "PATH"] not in written


def test_planted_secrets_are_in_no_output(cli, monkeypatch, tmp_path, capfd):
    secrets = {
        "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "MY_PASSWORD": "correct-horse",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    planted = [
        f"+hub_token={secrets['HF_TOKEN']}",  # under a key that says what it is
        "+note=${oc.env:MY_PASSWORD}",  # the value of such a variable under another key
        "+mirror=https://me:secret-in-an-address@example.org/models",
        "+text=ghp_abcdefghij0123456789",  # what looks like a token
        "+account.api_key=1234567890",
    ]
    folder = cli(["run_name=planted", *planted]) / "outputs/planted"
    cli(["run_name=planted", *planted, "trainer.max_steps=3"])
    weights = {"nfe": 4, "weights": "student", "iteration": 3, "dtype": "float32"}
    (tmp_path / "card.md").write_text(model_card("student", weights, Run(folder)))
    export.export_checkpoint(folder, tmp_path / "all.safetensors", form="checkpoint")
    said = capfd.readouterr()
    outputs = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outputs |= {"stdout": said.out.encode(), "stderr": said.err.encode()}
    assert len(outputs) > 10
    hidden = [*secrets.values(), "secret-in-an-address", "ghp_abcdefghij0123456789", "1234567890"]
    found = [(name, text) for name, content in outputs.items() for text in hidden if text.encode() in content]
    assert found == []
    assert b"hub_token: '***'" in outputs[str(folder / "config.yaml")]
    with pytest.raises(SystemExit):
        cli(["run_name=planted", f"data.batch_size={secrets['HF_TOKEN']}"])
    assert secrets["HF_TOKEN"] not in capfd.readouterr().err


def test_the_same_command_again_resumes(cli):
    folder = cli(["run_name=again"]) / "outputs/again"
    cli(["run_name=again", "trainer.max_steps=4"])
    assert read_checkpoint(folder / "checkpoints/iteration_0000004").iteration == 4
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert ["trainer.max_steps=4" in start["command"] for start in starts] == [False, True]
    assert len(list((folder / "logs").iterdir())) == 2


def test_a_sweep_gives_each_job_its_folder(cli):
    root = cli(["-m", "schedule/length=uniform,geometric,fixed", "run_name=swept"])
    jobs = sorted((root / "outputs/swept/multirun").glob("*/config.yaml"))
    assert len(jobs) == 3
    lengths = {yaml.safe_load(job.read_text())["schedule"]["length"]["_target_"].rpartition(".")[2] for job in jobs}
    assert lengths == {"UniformLength", "GeometricLength", "FixedLength"}
    assert all((job.parent / "checkpoints/iteration_0000002/COMPLETE.json").is_file() for job in jobs)


def test_fields_of_a_nested_group_are_swept(cli):
    root = cli(["-m", "schedule.length.high=4,8", "seed=1", "run_name=fields"])
    jobs = (root / "outputs/fields/multirun").glob("*/config.yaml")
    assert {yaml.safe_load(job.read_text())["schedule"]["length"]["high"] for job in jobs} == {4, 8}


def test_the_toy_experiment_logs_the_energy_distance(tmp_path):
    short = ["trainer.max_steps=10", "trainer.val_check_interval=10", "backbone.fit_steps=20", "data.batch_size=8"]
    result = train(compose(["experiment=toy2d_cdm", f"output_dir={tmp_path}", *short]))
    distances = {name: value for name, value in result.metrics.items() if name.startswith("val/energy_distance/")}
    assert {name.rpartition("/")[2] for name in distances} == {"student_1", "student_4", "teacher_1", "teacher_4"}
    assert distances["val/energy_distance/teacher_1"] > 1 > 0.05 > distances["val/energy_distance/teacher_4"]
    assert (result.folder / "samples/iteration_0000010.png").is_file()
    assert result.metrics["throughput/samples_per_second"] > 0


def test_the_module_runs_as_a_command_and_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "cdm_lightning.train", "experiment=toy2d_cdm", "backbone.hiden=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: Could not override 'backbone.hiden'. To append to your config use +backbone.hiden=3\n"
    assert list(tmp_path.iterdir()) == []
