"""Model folders and run folders that are broken, incomplete or hostile."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from faults import breaking
from faults.bases import ASKED, SD3, TOY_RUN
from faults.cases import Case, Expected

MODEL = Path(__file__).parents[2] / "src" / "cdm_lightning" / "assets" / "tiny_sd3"
USES = {  # commands that read a model folder
    "train": ("train", (*SD3, "backbone.pretrained=model")),
    "sample": ("sample", ("--model", "model", *ASKED)),
    "export": ("export", ("STOCK/run", "--pretrained", "model", "--output", "out")),
    "cache_text": ("cache_text", (*SD3, "backbone.pretrained=model", "text_cache.folder=cache")),
    "plan": ("plan", ("experiment=tiny_sd3_cdm", "backbone.pretrained=model", "gpus=1x80")),
    "extract_lora": (
        "extract_lora",
        ("--base", "model", "--tuned", "STOCK/exported", "--rank", "1", "--output", "l.safetensors"),
    ),
}
HOSTILE_KEYS = (
    "../secret",
    "a/../../planted",
    "/tmp/planted",
    "..",
    ".",
    "",
    "a/b",
    "a\\..\\b",
    "x" * 300,
    "a\nb",
    "\u202e",
)
SENSELESS_CONFIG: dict[str, dict[str, Any]] = {  # file: values that cannot be right
    "transformer/config.json": {
        "patch_size": 0,
        "num_layers": -1,
        "in_channels": 0,
        "num_attention_heads": 0,
        "sample_size": -1,
    },
    "scheduler/scheduler_config.json": {"shift": "a lot", "num_train_timesteps": 0, "_class_name": "NoSuchScheduler"},
    "vae/config.json": {"latent_channels": 0, "scaling_factor": "x", "block_out_channels": []},
    "text_encoder/config.json": {"vocab_size": 1, "hidden_size": 0, "num_hidden_layers": -1},
    "text_encoder_3/config.json": {"vocab_size": 1, "d_model": 0, "num_heads": 0},
    "model_index.json": {"_class_name": "NoSuchPipeline"},
}


def model_cases(rng: random.Random, random_changes: int = 300) -> list[Case]:
    """Each part gone, each file broken in each way, wrong values, hostile names, and `random_changes` random ones."""
    cases = [_model(f"{use} good", use, lambda model: None, "runs") for use in USES]
    parts = sorted(path.name for path in MODEL.iterdir() if path.is_dir())
    text_is_read = ("train", "sample", "cache_text")
    for part in parts:
        for use in text_is_read:
            needed = use != "cache_text" or part.startswith(("text", "tok"))
            cases.append(
                _model(f"{use} without {part}", use, _at(part, breaking.remove), "refused" if needed else "either")
            )
    for file in sorted(path.relative_to(MODEL).as_posix() for path in MODEL.rglob("*.*") if path.is_file()):
        ways = breaking.JSON_FILE if file.endswith(".json") else breaking.TENSOR_FILE
        for change in ways:
            use = rng.choice(text_is_read if change is not breaking.remove else ("train", "sample"))
            cases.append(_model(f"{use} {file} {change.__name__}", use, _at(file, change), "either"))
    for file, values in SENSELESS_CONFIG.items():
        for key, value in values.items():
            cases.append(_model(f"train {file} {key}={value}", "train", _json(file, (key,), value), "refused"))
    for key in HOSTILE_KEYS:
        for use in ("export", "sample"):
            change = _json("model_index.json", (key,), ["diffusers", "AutoencoderKL"])
            cases.append(_model(f"{use} index key {key[:20]!r}", use, change, "refused"))
    for value in (
        None,
        3,
        "x",
        [],
        ["a"],
        [1, 2],
        ["os", "system"],
        ["builtins", "exec"],
        ["pwn", "Foreign"],
        {"a": 1},
    ):
        for key in ("vae", "text_encoder_2"):
            use = rng.choice(("train", "sample", "export"))
            cases.append(_model(f"{use} index {key} {value}", use, _json("model_index.json", (key,), value), "either"))
    for name, change in FOREIGN.items():
        cases += [_model(f"{use} {name}", use, change, "either") for use in ("train", "sample")]
    cases += list(_random_changes(rng, random_changes))
    return cases


def _random_changes(rng: random.Random, count: int) -> Iterator[Case]:
    files = sorted(path.relative_to(MODEL).as_posix() for path in MODEL.rglob("*.json"))
    files = [file for file in files if not file.endswith("tokenizer.json")] * 5 + files
    for _ in range(count):
        file = rng.choice(files)
        at = rng.choice(breaking.places(json.loads((MODEL / file).read_text())))
        value = rng.choice((*breaking.VALUES, ...))
        use = rng.choice(tuple(USES))
        name = f"{use} {file} {'.'.join(map(str, at))} {'deleted' if value is ... else json.dumps(value)}"
        yield _model(name, use, _json(file, at, value), "either")


def _model(name: str, use: str, change: breaking.Break, expects: Expected) -> Case:
    def prepare(work: Path, stock: Path) -> None:
        shutil.copytree(stock / "model", work / "model")
        change(work / "model")

    command, arguments = USES[use]
    return Case("model folders", name, command, arguments, expects, prepare)


def _at(file: str, change: breaking.Break) -> breaking.Break:
    return lambda folder: change(folder / file)


def _json(file: str, at: tuple[Any, ...], value: Any) -> breaking.Break:
    return lambda folder: breaking.changed(folder / file, at, value)


def _custom_code(model: Path) -> None:
    source = "import os\nos.system('touch pwned')\nclass Foreign:\n    pass\n"
    (model / "pipeline.py").write_text(source)
    (model / "transformer" / "foreign.py").write_text(source)
    breaking.changed(model / "model_index.json", ("_class_name",), ["pipeline", "Foreign"])
    breaking.changed(model / "model_index.json", ("transformer",), ["foreign", "Foreign"])


def _auto_map(model: Path) -> None:
    source = "import os\nos.system('touch pwned')\nclass Foreign:\n    pass\n"
    for part in ("tokenizer", "text_encoder"):
        (model / part / "foreign.py").write_text(source)
    breaking.changed(
        model / "tokenizer" / "tokenizer_config.json", ("auto_map",), {"AutoTokenizer": ["foreign.Foreign", None]}
    )
    breaking.changed(model / "tokenizer" / "tokenizer_config.json", ("tokenizer_class",), "Foreign")
    breaking.changed(model / "text_encoder" / "config.json", ("auto_map",), {"AutoModel": "foreign.Foreign"})


def _pickled_weights(model: Path) -> None:
    for part, name in (
        ("transformer", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        (model / part / f"{name}.safetensors").unlink()
        old = name if part != "text_encoder" else "pytorch_model"
        breaking.foreign_torch(model / part / f"{old}.bin")


def _chat_template(model: Path) -> None:
    text = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    breaking.changed(model / "tokenizer" / "tokenizer_config.json", ("chat_template",), text)


FOREIGN: dict[str, breaking.Break] = {
    "own pipeline code": _custom_code,
    "auto_map": _auto_map,
    "pickled weights": _pickled_weights,
    "chat template": _chat_template,
}
HOSTILE_NODES: dict[str, dict[str, Any]] = {  # what a configuration of somebody else can name
    "processes": {
        "_target_": "cdm_lightning.launch.run_processes",
        "folder": ".",
        "processes": 1,
        "program": ["-c", "open('pwned','w')"],
    },
    "processes of today": {
        "_target_": "cdm_lightning.distributed.launch.run_processes",
        "folder": ".",
        "processes": 1,
        "program": ["-c", "open('pwned','w')"],
    },
    "write_text": {
        "_target_": "pathlib.Path.write_text",
        "_args_": [{"_target_": "pathlib.Path", "_args_": ["pwned"]}, "x"],
    },
    "touch": {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": ["pwned"]}]},
    "os.system": {"_target_": "os.system", "_args_": ["touch pwned"]},
    "posix.system": {"_target_": "posix.system", "_args_": ["touch pwned"]},
    "Popen": {"_target_": "subprocess.Popen", "_args_": [["touch", "pwned"]]},
    "check_output": {"_target_": "subprocess.check_output", "_args_": [["touch", "pwned"]]},
    "open": {"_target_": "builtins.open", "_args_": ["pwned", "w"]},
    "io.open": {"_target_": "io.open", "_args_": ["pwned", "w"]},
    "eval": {"_target_": "builtins.eval", "_args_": ["open('pwned','w')"]},
    "timeit": {"_target_": "timeit.timeit", "_args_": ["open('pwned','w')"], "number": 1},
    "torch.load": {"_target_": "torch.load", "_args_": ["foreign.pt"], "weights_only": False},
    "numpy.load": {"_target_": "numpy.load", "_args_": ["foreign.pkl"], "allow_pickle": True},
    "pickle.load": {
        "_target_": "pickle.load",
        "_args_": [{"_target_": "builtins.open", "_args_": ["foreign.pkl", "rb"]}],
    },
    "addsitedir": {"_target_": "site.addsitedir", "_args_": ["site"]},
    "runpy": {"_target_": "runpy.run_path", "_args_": ["site/foreign.py"]},
    "write_text of ours": {"_target_": "cdm_lightning.files.write_text", "path": "pwned", "text": "x"},
    "hydra.call": {"_target_": "hydra.utils.call", "config": {"_target_": "os.system", "_args_": ["touch pwned"]}},
    "instantiate": {
        "_target_": "hydra.utils.instantiate",
        "_args_": [{"_target_": "os.system", "_args_": ["touch pwned"]}],
    },
    "partial": {"_target_": "functools.partial", "_args_": ["os.system"]},
    "shutil.copy": {"_target_": "shutil.copy", "_args_": ["foreign.pkl", "pwned"]},
    "import": {"_target_": "foreign.Foreign"},
}
HOSTILE_PLACES = (
    "backbone",
    "backbone.hidden",
    "backbone.pretrained.x",
    "lora",
    "lora.student",
    "lora.student.rank",
    "backbone.new.deep",
)
RUN_USES = {
    "export": ("export", ("run", "--output", "out")),
    "weights": ("export", ("run", "--output", "out.safetensors", "--form", "weights")),
    "checkpoint": ("export", ("run", "--output", "out.safetensors", "--form", "checkpoint")),
    "sample": ("sample", ("--model", "run", *ASKED)),
    "one checkpoint": ("sample", ("--model", "run/checkpoints/iteration_0000001", *ASKED)),
}
TOY_RESUMED = (*TOY_RUN, "trainer.max_steps=3")


def run_cases(rng: random.Random, random_changes: int = 150) -> list[Case]:
    """Runs of somebody else that name foreign code; broken files of runs that are exported, sampled or continued."""
    cases = []
    for name, node in HOSTILE_NODES.items():
        for place in HOSTILE_PLACES:
            use = rng.choice(("export", "sample", "one checkpoint"))
            cases.append(_run(f"{use} {place} is {name}", use, _hostile(place, node), "refused"))
    for file in (
        "config.yaml",
        "checkpoints/iteration_0000001/COMPLETE.json",
        "checkpoints",
        "checkpoints/iteration_0000001",
    ):
        for change in (*breaking.JSON_FILE, breaking.bomb, breaking.foreign_pickle):
            if not (change in (breaking.half, breaking.flipped) and "." not in file.rpartition("/")[2]):
                use = rng.choice(tuple(RUN_USES))
                in_place = breaking.remove if "." not in file.rpartition("/")[2] else (lambda path: None)
                cases.append(_run(f"{use} {file} {change.__name__}", use, _after(file, in_place, change), "either"))
    files = list(_files_of_runs())
    for file in files:
        for change in (
            *breaking.ANY_FILE,
            breaking.flipped,
            breaking.foreign_pickle,
            breaking.foreign_torch,
            breaking.deep,
        ):
            cases.append(_resumed(f"{file} {change.__name__}", _at(file, change)))
    for name, change in _run_changes().items():
        cases.append(_resumed(name, change))
    for _ in range(random_changes):
        file, value = (
            rng.choice(("COMPLETE.json", "best.json", "config.yaml", "state.json", "run.json")),
            rng.choice((*breaking.VALUES, ...)),
        )
        seed = rng.randrange(10**6)
        cases.append(_resumed(f"{file} random change {seed} {value!r}", _somewhere(file, seed, value)))
    return cases


def _run(name: str, use: str, change: breaking.Break, expects: Expected) -> Case:
    def prepare(work: Path, stock: Path) -> None:
        shutil.copytree(stock / "run", work / "run")
        (work / "site").mkdir()
        code = "open('pwned', 'w')\nclass Foreign:\n    pass\n"
        (work / "site" / "foreign.pth").write_text("import os; open('pwned', 'w')\n")
        (work / "site" / "foreign.py").write_text(code)
        (work / "foreign.py").write_text(code)
        breaking.foreign_pickle(work / "foreign.pkl")
        breaking.foreign_torch(work / "foreign.pt")
        change(work / "run")

    command, arguments = RUN_USES[use]
    return Case("run folders", name, command, arguments, expects, prepare)


def _resumed(name: str, change: breaking.Break, expects: Expected = "either") -> Case:
    def prepare(work: Path, stock: Path) -> None:
        shutil.copytree(stock / "toy", work / "toy")
        change(work / "toy")

    return Case("run folders", f"resumed {name}", "train", TOY_RESUMED, expects, prepare)


def _files_of_runs() -> list[str]:
    inside = ("COMPLETE.json", "trainer.pt", "shard-00001-model-00001-of-00001.safetensors", "state.json", "run.json")
    both = [f"checkpoints/iteration_000000{number}/{name}" for number in (1, 2) for name in inside]
    return [*both, "checkpoints/best.json", "config.yaml", "starts.jsonl", "logs/version_0/metrics.csv", ".lock"]


def _hostile(place: str, node: dict[str, Any]) -> breaking.Break:
    """Put the node into the run's configuration, and into the copies of it in the run's checkpoints."""

    def put(config: dict[str, Any]) -> dict[str, Any]:
        *way, last = place.split(".")
        inside = config
        for step in way:
            if not isinstance(inside.get(step), dict):
                inside[step] = {}
            inside = inside[step]
        inside[last] = node
        return config

    def rewrite(run: Path) -> None:
        path = run / "config.yaml"
        path.write_text(yaml.safe_dump(put(yaml.safe_load(path.read_text()))))
        copies = list(run.glob("checkpoints/*/run.json"))
        assert copies
        for copy in copies:
            about = json.loads(copy.read_text())
            copy.write_text(json.dumps(about | {"config": put(about["config"])}))

    return rewrite


def _after(file: str, *changes: breaking.Break) -> breaking.Break:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder / file)

    return apply


def _somewhere(file: str, seed: int, value: Any) -> breaking.Break:
    def rewrite(run: Path) -> None:
        rng = random.Random(seed)
        found = sorted(run.rglob(file))
        if not found:
            return
        path = rng.choice(found)
        document = yaml.safe_load(path.read_text())
        at = rng.choice(breaking.places(document) or [()])
        if not at:
            return
        breaking.put(document, at, value)
        path.write_text(json.dumps(document) if file.endswith(".json") else yaml.safe_dump(document))

    return rewrite


def _run_changes() -> dict[str, breaking.Break]:
    def renamed(old: str, new: str) -> breaking.Break:
        return lambda run: os.rename(run / "checkpoints" / old, run / "checkpoints" / new)

    def linked(name: str, target: str) -> breaking.Break:
        def link(run: Path) -> None:
            breaking.remove(run / name)
            (run / name).symlink_to(target)

        return link

    def hostile_sum(run: Path) -> None:
        marker = run / "checkpoints/iteration_0000002/COMPLETE.json"
        document = json.loads(marker.read_text())
        document["files"]["../../../../home/notes.txt"] = {"bytes": 4, "crc32": 0}
        marker.write_text(json.dumps(document))

    newest = "iteration_0000002"
    changes = {
        "newest renamed to a higher number": renamed(newest, "iteration_0000009"),
        "newest renamed to a lower number": renamed(newest, "iteration_0000000"),
        "newest renamed to a huge number": renamed(newest, "iteration_" + "9" * 60),
        "newest under a foreign name": renamed(newest, "iteration_2"),
        "an empty newer one": lambda run: (run / "checkpoints/iteration_0000009").mkdir(),
        "a file as newer one": lambda run: (run / "checkpoints/iteration_0000009").touch(),
        "a leftover of a save": lambda run: (run / "checkpoints/.saving_iteration_0000003").mkdir(),
        "a file named as a leftover": lambda run: (run / "checkpoints/.saving_iteration_0000003").touch(),
        "lock is a link to somebody's file": linked(".lock", "../../home/notes.txt"),
        "metrics.csv is a link to somebody's file": linked("logs/version_0/metrics.csv", "../../../../home/notes.txt"),
        "starts.jsonl is a link to somebody's file": linked("starts.jsonl", "../../home/notes.txt"),
        "checkpoints is a link to itself": linked("checkpoints", "checkpoints"),
        "COMPLETE.json names files outside": hostile_sum,
        "best.json names files outside": lambda run: (run / "checkpoints/best.json").write_text(
            json.dumps({"name": "../../../home", "path": "../../../home", "value": 0})
        ),
    }
    for value in (None, 3, [], "x", {"metric": 3}, {"value": "x"}):
        changes[f"best.json is {json.dumps(value)}"] = _at("checkpoints/best.json", breaking.as_json(value))
    return changes
