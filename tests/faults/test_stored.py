"""What a run stores and how it goes on from it: each kind of fault, with several examples of it."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdm_lightning.checkpoint.best import BEST, VALIDATED, Best
from cdm_lightning.checkpoint.callback import IterationCheckpoint
from cdm_lightning.checkpoint.folder import MARKER, checkpoints_in
from cdm_lightning.checkpoint.stored import newest_checkpoint, read_checkpoint
from cdm_lightning.config import compose
from cdm_lightning.distributed import ranks
from cdm_lightning.errors import UserError
from cdm_lightning.export import export_checkpoint
from cdm_lightning.files import locked
from cdm_lightning.module import CDMModule
from cdm_lightning.run import inputs
from cdm_lightning.run.folder import Run
from cdm_lightning.run.inputs import content_hash, inputs_of, require_same_inputs
from cdm_lightning.run.same import ADDED, moved_ends, require_same_configuration
from cdm_lightning.train import train
from cdm_lightning.training.optim import LearningRate

STEPS = ("trainer.max_steps=3", "checkpoint.every=1", "checkpoint.keep=null")


@pytest.fixture(scope="module")
def template(toy_overrides, tmp_path_factory) -> Path:
    """A run of three iterations with a checkpoint of each; tests work on copies."""
    folder = tmp_path_factory.mktemp("template") / "run"
    train(compose([f"output_dir={folder}", *toy_overrides, *STEPS]))
    return folder


@pytest.fixture
def finished(template, tmp_path) -> Path:
    return shutil.copytree(template, tmp_path / "run")


def named(folder: Path) -> dict[str, int]:
    """The recorded iteration of each checkpoint by its name."""
    return {path.name: read_checkpoint(path).iteration for path in checkpoints_in(folder)}


def reseal(path: Path) -> None:
    import zlib

    files = [file for file in path.iterdir() if file.name != MARKER]
    sums = {file.name: {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())} for file in files}
    (path / MARKER).write_text(json.dumps({"files": sums}))


# ---- B8, B9: own checkpoints first, by their records


def rename(folder: Path, old: int, new: int) -> None:
    (folder / f"iteration_{old:07d}").rename(folder / f"iteration_{new:07d}")


def test_a_renamed_checkpoint_is_gone_on_from_and_gets_its_name_back(finished, toy_run, capfd):
    rename(finished / "checkpoints", 3, 9)
    assert toy_run("trainer.max_steps=4", "checkpoint.keep=null").iteration == 4
    assert named(finished / "checkpoints") == {f"iteration_{n:07d}": n for n in (1, 2, 3, 4)}
    said = capfd.readouterr().err
    assert "(iteration 3)" in said
    assert not list((finished / "checkpoints").glob("unused_*"))


@pytest.mark.parametrize(
    "names", [{1: 2, 2: 1}, {2: 3, 3: 2}, {1: 2, 2: 3, 3: 1}, {1: 3, 2: 1, 3: 2}, {1: 2, 2: 3, 3: 7}]
)
def test_checkpoints_with_exchanged_names_all_stay(finished, names):
    folder = finished / "checkpoints"
    for old in names:
        rename(folder, old, 100 + old)
    for old, new in names.items():
        rename(folder, 100 + old, new)
    start = IterationCheckpoint(folder).choose_start(read_checkpoint(checkpoints_in(folder)[0]).record["fingerprint"])
    assert (start.iteration, start.path.name) == (3, "iteration_0000003")
    assert named(folder) == {f"iteration_{number:07d}": number for number in (1, 2, 3)}
    assert all(read_checkpoint(path).find_fault() is None for path in checkpoints_in(folder))
    assert not list(folder.glob("unused_*"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({2: 9}, {1: 1, 2: 2, 3: 3}),  # an older one with the name of a newer one
        ({1: 7, 2: 8, 3: 5}, {1: 1, 2: 2, 3: 3}),
        ({3: 12345678}, {1: 1, 2: 2, 3: 3}),
    ],
)
def test_names_do_not_decide_which_checkpoint_is_newest(finished, names, expected):
    folder = finished / "checkpoints"
    for old, new in names.items():
        rename(folder, old, new)
    assert newest_checkpoint(folder).iteration == 3
    start = IterationCheckpoint(folder).choose_start(read_checkpoint(checkpoints_in(folder)[0]).record["fingerprint"])
    assert (start.iteration, start.path.name) == (3, "iteration_0000003")
    assert named(folder) == {f"iteration_{number:07d}": of for number, of in expected.items()}


def test_a_copy_under_another_name_is_set_aside_and_a_damaged_one_gives_way(finished):
    folder = finished / "checkpoints"
    shutil.copytree(folder / "iteration_0000003", folder / "iteration_0000008")
    shard = next((folder / "iteration_0000003").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    start = IterationCheckpoint(folder).choose_start(
        read_checkpoint(folder / "iteration_0000001").record["fingerprint"]
    )
    assert start.find_fault() is None  # the copy
    assert named(folder) == {f"iteration_{n:07d}": n for n in (1, 2, 3)}
    assert [path.name for path in folder.glob("unused_*")] == ["unused_iteration_0000003"]


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_resume_with_a_path_that_is_gone_goes_on_from_own_checkpoints(finished, toy_run, tmp_path, gone):
    source = tmp_path / ("all.safetensors" if gone == "file" else "copy")
    if gone == "file":
        export_checkpoint(finished / "checkpoints/iteration_0000002", source, form="checkpoint")
    else:
        shutil.copytree(finished / "checkpoints/iteration_0000002", source)
    assert toy_run(f"resume={source}", "trainer.max_steps=3", folder="fork").iteration == 3
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    assert toy_run(f"resume={source}", "trainer.max_steps=4", folder="fork").iteration == 4
    with pytest.raises(UserError, match="no such checkpoint"):
        toy_run(f"resume={source}", folder="another")


# ---- B12: the lock and the place of checkpoints


def test_resume_with_the_folder_of_a_run_says_which_folder_to_pass(finished, toy_run):
    with pytest.raises(
        UserError,
        match=r"run is the folder of a run, not a checkpoint; pass one of the checkpoints in .*run/checkpoints",
    ):
        toy_run(f"resume={finished}", folder="other")


def test_two_runs_with_one_checkpoint_folder_are_refused(toy_run, tmp_path):
    place = tmp_path / "shared"
    (tmp_path / "link").symlink_to(place)
    toy_run("trainer.max_steps=1", f"checkpoint.folder={place}", folder="first")
    child = os.fork()
    if not child:  # the other run: record locks are those of a process
        with contextlib.suppress(BaseException), locked(place / ".lock"):
            (tmp_path / "held").touch()
            import time

            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            pass
        for folder in (place, tmp_path / "link"):
            with pytest.raises(UserError, match="another training process uses this folder"):
                toy_run("trainer.max_steps=1", f"checkpoint.folder={folder}", folder="second")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_changed_checkpoint_folder_does_not_begin_anew(finished, toy_run, tmp_path):
    with pytest.raises(
        UserError, match=r"has checkpoints in .*run/checkpoints .*iteration_0000003.*checkpoint.folder="
    ):
        toy_run(f"checkpoint.folder={tmp_path / 'elsewhere'}")
    shutil.move(finished / "checkpoints", tmp_path / "elsewhere")  # moved with them: the same run
    assert toy_run(f"checkpoint.folder={tmp_path / 'elsewhere'}", "trainer.max_steps=4").iteration == 4
    with pytest.raises(UserError, match=r"has checkpoints in .*elsewhere"):
        toy_run("trainer.max_steps=5")


def test_nor_does_it_if_the_run_was_moved_as_well(finished, toy_run, tmp_path):
    shutil.move(finished, tmp_path / "moved")
    with pytest.raises(UserError, match=r"has checkpoints in .*moved/checkpoints .*iteration_0000003"):
        toy_run(f"checkpoint.folder={tmp_path / 'elsewhere'}", folder="moved")
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_that_was_moved_or_copied_keeps_its_checkpoints(finished, toy_run, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    assert toy_run("trainer.max_steps=4", folder="copy").iteration == 4
    shutil.rmtree(tmp_path / "copy/checkpoints")
    assert toy_run("trainer.max_steps=2", folder="copy").iteration == 2  # its own place is empty: it begins anew


def test_checkpoints_of_another_run_under_checkpoint_folder_are_refused(finished, toy_run):
    with pytest.raises(UserError, match=r"differs in .*seed"):
        toy_run(f"checkpoint.folder={finished / 'checkpoints'}", "seed=5", folder="other")
    assert named(finished / "checkpoints")["iteration_0000003"] == 3


# ---- B13: weights that are not finite


@pytest.mark.parametrize(
    ("network", "value"), [("student", float("nan")), ("student_ema", float("inf")), ("fake_score", -float("inf"))]
)
def test_weights_that_are_not_finite_end_the_run_at_the_save(toy_run, monkeypatch, network, value, tmp_path):
    original = CDMModule.training_step

    def broken(self, *batch):
        original(self, *batch)
        if self.iteration == 2:
            with torch.no_grad():
                next(iter(getattr(self.networks, network).parameters())).flatten()[-1] = value

    monkeypatch.setattr(CDMModule, "training_step", broken)
    with pytest.raises(
        UserError, match=rf"{network}\..* is not finite at iteration 2, .*resume from .*iteration_0000001"
    ):
        toy_run(*STEPS)
    assert list(named(tmp_path / "run/checkpoints")) == ["iteration_0000001"]


def test_all_processes_hear_of_a_weight_that_only_another_one_holds(monkeypatch):
    from cdm_lightning.checkpoint.health import not_finite

    network = torch.nn.Linear(2, 2)
    tensors = {f"networks.{name}": value for name, value in network.state_dict().items()}
    assert not_finite(tensors, network) is None
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, "student.layer"])
    assert not_finite(tensors, network) == "student.layer"


def test_a_checkpoint_of_an_older_version_with_such_weights_is_never_good(finished):
    path = finished / "checkpoints/iteration_0000003"
    shard = next(path.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.startswith("networks.student."))
    tensors[name].flatten()[0] = float("nan")
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        header = file.metadata()
    save_file(tensors, shard, header)
    record = json.loads((path / "state.json").read_text())
    del record["finite"]  # older versions did not look
    (path / "state.json").write_text(json.dumps(record))
    reseal(path)
    refused = []
    assert newest_checkpoint(path.parent, lambda *of: refused.append(of)).iteration == 2
    assert "its weights are not finite (student." in refused[0][1]
    with pytest.raises(UserError, match="weights are not finite"):
        export_checkpoint(path, finished / "out")


# ---- B3: a validation that was due


VALIDATED_RUN = (
    "trainer.limit_val_batches=1.0",
    "trainer.val_check_interval=2",
    "data.val_prompts=1",
    "validation.samplers=[]",
    "checkpoint.every=2",
    "checkpoint.keep=1",
    "checkpoint.best=val/score",
    "trainer.max_steps=6",
)
SCORES = {2: 3.0, 4: 1.0, 6: 2.0}


class Killed(BaseException):
    """Ends a run as SIGKILL does, as far as its files are concerned."""


@pytest.fixture
def validating(monkeypatch):
    """Validation logs `SCORES`; `validating(4)` makes a run die in the validation of iteration 4. Returns what was validated."""
    seen, dies = [], []

    def epoch_end(self):
        if self.iteration in dies:
            dies.remove(self.iteration)
            raise Killed
        seen.append(self.iteration)
        self.log("step", float(self.iteration))
        self.log("val/score", SCORES[self.iteration])

    monkeypatch.setattr(CDMModule, "on_validation_epoch_end", epoch_end)
    monkeypatch.setattr(Best, "check", lambda self, logged: None)  # no metric of the configuration logs these scores
    return lambda *iterations: (dies.extend(iterations), seen)[1]


@pytest.mark.parametrize(
    "kills", [pytest.param((4,), marks=pytest.mark.slow), pytest.param((6,), marks=pytest.mark.slow), (2, 4, 4)]
)
def test_a_validation_that_was_due_is_made_up_and_the_best_checkpoint_is_the_undisturbed_one(
    toy_run, validating, kills
):
    seen = validating(*kills)
    for _ in kills:
        with pytest.raises(Killed):
            toy_run(*VALIDATED_RUN)
    folder = toy_run(*VALIDATED_RUN).folder / "checkpoints"
    assert seen == [2, 4, 6]
    assert json.loads((folder / BEST).read_text()) == {"metric": "val/score", "value": 1.0, "iteration": 4}
    assert list(named(folder)) == ["iteration_0000004", "iteration_0000006"]
    toy_run(*VALIDATED_RUN)  # it is complete: nothing is made again
    assert seen == [2, 4, 6]


def test_no_validation_is_made_up_where_none_was_due(toy_run, validating):
    seen = validating()
    run = [option for option in VALIDATED_RUN if "max_steps" not in option]
    toy_run(*run, "trainer.max_steps=3")
    folder = toy_run(*run, "trainer.max_steps=4").folder
    assert seen == [2, 4]
    toy_run(*run, "trainer.max_steps=6", f"resume={folder}/checkpoints/iteration_0000004", folder="fork")
    assert seen == [2, 4, 6]  # the validation of iteration 4 is the other run's


# ---- B4: what a run stands on


@pytest.fixture
def stands_on(tmp_path) -> dict[str, Path]:
    """A prompt file, a model folder and a LoRA file."""
    (tmp_path / "model/transformer").mkdir(parents=True)
    (tmp_path / "model/text_encoder").mkdir()
    for name in ("transformer", "text_encoder"):
        save_file({"a": torch.randn(50), "b": torch.ones(9)}, tmp_path / f"model/{name}/model.safetensors")
    (tmp_path / "model/model_index.json").write_text("{}")
    save_file({"a": torch.ones(4)}, tmp_path / "own.safetensors")
    (tmp_path / "prompts.txt").write_text("a circle\na square\n")
    return {"prompts": tmp_path / "prompts.txt", "model": tmp_path / "model", "lora": tmp_path / "own.safetensors"}


def config_of(files: dict[str, Path]) -> dict:
    return {
        "output_dir": str(files["prompts"].parent),  # decides nothing
        "backbone": {
            "_target_": "cdm_lightning.backbones.sd3.SD3Backbone",
            "pretrained": str(files["model"]),
            "teacher_lora": str(files["lora"]),
            "teacher_dtype": "float32",
        },
        "data": {
            "train": {
                "_target_": "cdm_lightning.data.mixture.MixedPrompts",
                "sources": {
                    "one": {"_target_": "cdm_lightning.data.prompts.PromptFile", "path": str(files["prompts"])},
                },
            },
            "val": {"_target_": "cdm_lightning.data.prompts.PromptFile", "path": str(files["prompts"])},
        },
    }


def scale(file: Path, factor: float) -> None:
    save_file({name: value * factor for name, value in load_file(file).items()}, file)


CHANGES = {
    "a line appended": lambda f: f["prompts"].write_text(f["prompts"].read_text() + "a ring\n"),
    "a letter changed": lambda f: f["prompts"].write_text(f["prompts"].read_text().replace("circle", "cercle")),
    "prompts emptied": lambda f: f["prompts"].write_text(""),
    "teacher scaled": lambda f: scale(f["model"] / "transformer/model.safetensors", 1.05),
    "text encoder scaled": lambda f: scale(f["model"] / "text_encoder/model.safetensors", 1.05),
    "LoRA scaled": lambda f: scale(f["lora"], 2),
    "a configuration changed": lambda f: (f["model"] / "model_index.json").write_text("[]"),
    "a file is new": lambda f: (f["model"] / "transformer/extra.json").write_text("{}"),
    "a file is gone": lambda f: (f["model"] / "model_index.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_refused_in_one_line_that_names_file_and_option(stands_on, change, tmp_path):
    before = json.loads(json.dumps(inputs_of(config_of(stands_on))))
    assert before.keys() == {"backbone.pretrained", "backbone.teacher_lora", "data.train.sources.one.path"}
    times = {file: file.stat() for file in tmp_path.rglob("*") if file.is_file()}
    CHANGES[change](stands_on)
    for file, old in times.items():  # the time of modification does not hide a change
        with contextlib.suppress(FileNotFoundError):
            os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    now = inputs_of(config_of(stands_on))
    with pytest.raises(UserError, match=r"(has changed|is new|is gone).*accept_changed_inputs=true") as refused:
        require_same_inputs(before, now, tmp_path, accept=False)
    assert "\n" not in str(refused.value)
    assert "continuing with input files that have changed" in str(
        require_same_inputs(before, now, tmp_path, accept=True)
    )


def test_a_copy_with_other_times_is_the_same(stands_on, tmp_path):
    before = inputs_of(config_of(stands_on))
    for file in tmp_path.rglob("*"):
        os.utime(file, (1, 1))
    shutil.copytree(stands_on["model"], tmp_path / "copy")
    shutil.rmtree(stands_on["model"])
    (tmp_path / "copy").rename(stands_on["model"])
    assert require_same_inputs(before, inputs_of(config_of(stands_on)), tmp_path, accept=False) is None
    assert require_same_inputs(None, before, tmp_path, accept=False) is None  # a checkpoint of an older version


def test_a_large_file_is_read_in_part_and_every_tensor_of_it_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE", 1000)
    monkeypatch.setattr(inputs, "PIECES", 3)
    monkeypatch.setattr(inputs, "PIECE", 64)
    file = tmp_path / "large.safetensors"
    tensors = {f"layer{number}": torch.randn(500) for number in range(20)}
    save_file(tensors, file)
    seen = {content_hash(file)}
    for name in tensors:
        save_file({**tensors, name: tensors[name] * 1.05}, file)
        seen.add(content_hash(file))
    assert len(seen) == 21
    read = []
    original = inputs.open_regular

    class Counted:
        def __init__(self, path):
            self.file = original(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            read.append(size)
            return self.file.read(size)

        def seek(self, place):
            self.file.seek(place)

    monkeypatch.setattr(inputs, "open_regular", Counted)
    content_hash(file)
    assert sum(read) < file.stat().st_size / 5


def test_a_run_is_refused_with_changed_prompts_and_goes_on_once_they_are_accepted(toy_run, tmp_path, capfd):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("north\nsouth\n")
    run = (f"data.train.path={prompts}", "trainer.max_steps=1")
    result = toy_run(*run)
    assert read_checkpoint(result.checkpoint).about["inputs"]["data.train.path"]["files"]["prompts.txt"][0] == 12
    line = json.loads((result.folder / "starts.jsonl").read_text().splitlines()[-1])
    assert line["inputs"]["data.train.path"]["path"] == str(prompts)
    prompts.write_text("north\nsouth\nnorth east\n")
    longer = (*run[:1], "trainer.max_steps=2")
    with pytest.raises(UserError, match=r"prompts.txt has changed \(12 bytes, now 23\).*accept_changed_inputs=true"):
        toy_run(*longer)
    assert toy_run(*longer, "accept_changed_inputs=true").iteration == 2
    assert (
        "continuing with input files that have changed since the last checkpoint: data.train.path="
        in capfd.readouterr().err
    )
    assert toy_run(*run[:1], "trainer.max_steps=3").iteration == 3  # the new checkpoint stands on the new file


# ---- D10 and the end of the decay


def rates(total: object, steps: int, decay_from: float = 0.5) -> dict:
    rate = {
        "peak": 1.0,
        "total": total,
        "decay_from": decay_from,
        "_target_": LearningRate.__module__ + ".LearningRate",
    }
    return {
        **{key.partition(".")[0]: {"_target_": "a.Class"} for key in ADDED},
        "trainer": {"max_steps": steps, "devices": 1, "num_nodes": 1},
        "data": {"batch_size": 2},
        "optim": {"student": {"learning_rate": rate}},
    }


@pytest.mark.parametrize(
    ("before", "now", "is_free"),
    [
        (rates(10, 10), rates(20, 20), True),  # it follows max_steps
        (rates(8, 10), rates(8, 20), True),  # set by hand, and kept
        (rates(10, 10), rates(10, 20), True),  # the earlier end is kept by hand
        (rates(8, 10), rates(12, 10), False),
        (rates(10, 10), rates(15, 10), False),
        (rates(8, 10), rates(20, 20), False),
        (rates(8, 10, 1.0), rates(12, 10, 1.0), True),  # there is no decay
        (rates(None, 10, 1.0), rates(10, 10, 1.0), True),
    ],
)
def test_the_end_of_a_decay_is_free_only_where_it_follows_max_steps(before, now, is_free, tmp_path):
    with contextlib.nullcontext() if is_free else pytest.raises(UserError, match=r"student\.learning_rate\.total"):
        require_same_configuration(before, now, tmp_path)


def test_a_decay_that_gets_another_end_says_so():
    assert moved_ends(rates(10, 10), rates(10, 10)) is None
    assert moved_ends(rates(10, 10, 1.0), rates(20, 20, 1.0)) is None
    text = moved_ends(rates(10, 10), rates(20, 20))
    assert "optim.student.learning_rate.total" in text
    assert "now decays to 0 at iteration 20 instead of 10" in text
    assert "\n" not in text


def test_a_longer_run_prints_that_line_once(toy_overrides, tmp_path, capfd):
    follows = [option for option in toy_overrides if "learning_rate.total" not in option]
    for steps in (1, 2, 2):
        train(compose([f"output_dir={tmp_path / 'run'}", *follows, f"trainer.max_steps={steps}"]))
    assert capfd.readouterr().err.count("the learning rate now decays to 0 at iteration 2 instead of 1") == 1


# ---- a checkpoint that is kept elsewhere, and D7: broken files of a run


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_checkpoint_that_is_kept_elsewhere_than_its_run_can_be_exported(finished, tmp_path, form):
    kept = tmp_path / "far/away" / ("all.safetensors" if form == "file" else "kept")
    kept.parent.mkdir(parents=True)
    if form == "file":
        export_checkpoint(finished, kept, form="checkpoint")
    else:
        shutil.copytree(finished / "checkpoints/iteration_0000003", kept)
    (tmp_path / "config.yaml").write_text("backbone: {_target_: of.another.Run}\n")  # not the folder of its run
    expected = export_checkpoint(finished, tmp_path / "a.safetensors", form="weights")
    shutil.rmtree(finished)
    found = export_checkpoint(kept, tmp_path / "b.safetensors", form="weights")
    assert all(torch.equal(value, load_file(found)[name]) for name, value in load_file(expected).items())
    folder = export_checkpoint(kept, tmp_path / "student")
    assert "| iterations of training | 3 |" in (folder / "README.md").read_text() or any(folder.iterdir())
    assert Run.find(kept)[0].config()["seed"] == 0


BROKEN = {
    "[]": b"[]",
    "a number": b"7",
    "a text": b'"x"',
    "null": b"null",
    "no JSON": b"{",
    "bytes": b"\xff\xfe\x00",
    "empty": b"",
    "deep": b"[" * 100_000,
    "other entries": b'{"metric": 3, "value": "x", "iteration": -1, "fingerprint": [], "ema_updates": null}',
}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", [BEST, VALIDATED])
def test_a_broken_small_file_beside_the_checkpoints_is_named(tmp_path, name, content):
    from cdm_lightning.checkpoint.best import last_validation

    (tmp_path / name).write_bytes(BROKEN[content])
    with pytest.raises(UserError, match=rf"{name}.*; remove it") as refused:
        Best(tmp_path, "val/score").read() if name == BEST else last_validation(tmp_path)
    assert "\n" not in str(refused.value)


def read_all(path: Path) -> None:
    stored = read_checkpoint(path)
    _ = stored.trainer_state(), stored.about


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["state.json", "run.json", "trainer.pt", MARKER])
def test_a_broken_file_of_a_checkpoint_is_named(finished, name, content):
    path = finished / "checkpoints/iteration_0000003"
    (path / name).write_bytes(BROKEN[content])
    if name != MARKER:
        reseal(path)
    with pytest.raises(UserError, match=r"iteration_0000003") as refused:
        read_all(path)
    assert "\n" not in str(refused.value)


STATES = {
    "no object": [],
    "a number": 3,
    "nothing in it": {},
    "no loops": {"fit_loop": 3, "callbacks": {}},
    "empty loops": {"fit_loop": {}, "callbacks": {}},
    "callbacks a list": {"fit_loop": None, "callbacks": [1]},
}


@pytest.mark.parametrize("state", STATES)
def test_a_trainer_state_with_other_content_ends_in_one_line(finished, toy_run, state):
    path = finished / "checkpoints/iteration_0000003"
    torch.save(STATES[state], path / "trainer.pt")
    reseal(path)
    with pytest.raises(UserError, match=r"iteration_0000003.*trainer.pt") as refused:
        toy_run("trainer.max_steps=4")
    assert "\n" not in str(refused.value)


RECORDS = {
    "optimizers a list": {"optimizers": []},
    "no optimizers": {"optimizers": None},
    "other roles": {"optimizers": {"student": {}}},
    "states a number": {
        "optimizers": {"student": {"states": 1, "options": 1}, "fake_score": {"states": 1, "options": 1}}
    },
    "no counts": {"skipped_steps": None},
    "counts of text": {"skipped_in_a_row": "x"},
    "another iteration": {"iteration": 2},
}


@pytest.mark.parametrize("change", RECORDS)
def test_a_record_with_other_content_ends_in_one_line(finished, toy_run, change):
    path = finished / "checkpoints/iteration_0000003"
    for number in (1, 2):
        shutil.rmtree(path.with_name(f"iteration_{number:07d}"))
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | RECORDS[change]))
    reseal(path)
    with pytest.raises(UserError, match=r"iteration_000000\d") as refused:
        toy_run("trainer.max_steps=4")
    assert "\n" not in str(refused.value)


def test_a_process_that_ends_while_a_checkpoint_is_restored_is_not_blamed_on_the_file(finished, toy_run, monkeypatch):
    def lost(*arguments):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:2089")

    monkeypatch.setattr("cdm_lightning.checkpoint.callback.restore", lost)
    with pytest.raises(UserError, match="another process of this run has ended") as refused:
        toy_run("trainer.max_steps=4")
    assert "iteration_0000003" not in str(refused.value)


def test_broken_figures_of_a_run_are_named(finished):
    for content in BROKEN.values():
        (finished / "metrics.json").write_bytes(content)
        with contextlib.suppress(UserError):
            assert isinstance(Run(finished).metrics(), dict)
