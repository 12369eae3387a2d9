"""Bad arguments of the commands other than training, and outputs that are no regular files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from faults import breaking
from faults.bases import ASKED, SD3, TOY
from faults.cases import Case, Expected, Prepare

SAMPLE = ("--model", "STOCK/exported", *ASKED)
EXPORT = ("STOCK/run", "--output", "out")
PLAN = ("experiment=tiny_sd3_cdm",)
EXTRACT = ("--base", "STOCK/model", "--tuned", "STOCK/exported", "--rank", "1", "--output", "l.safetensors")
CACHE = (*SD3, "text_cache.folder=cache")
REFUSED: dict[
    str, tuple[Sequence[str], Sequence[Sequence[str]]]
] = {  # command: good arguments, and what makes them bad
    "sample": (
        SAMPLE,
        (
            ["--guidance-scale", "nan"],
            ["--guidance-scale", "inf"],
            ["--guidance-scale", "-inf"],
            ["--guidance-scale", "x"],
            ["--steps", "0"],
            ["--steps", "-1"],
            ["--steps", "1000000"],
            ["--steps", "1e6"],
            ["--steps", "1.5"],
            ["--batch-size", "0"],
            ["--batch-size", "-3"],
            ["--height", "0"],
            ["--height", "-64"],
            ["--height", "7"],
            ["--height", "10000000"],
            ["--width", "0"],
            ["--width", "33"],
            ["--width", "99999999"],
            ["--seed", "1e3"],
            ["--device", "quantum"],
            ["--device", "cuda:99"],
            ["--device", ""],
            ["--device", "meta"],
            ["--output", ""],
            ["--output", "."],
            ["--output", "/"],
            ["--output", "x" * 300 + ".png"],
            ["--output", "STOCK/model/model_index.json/x.png"],
            ["--model", ""],
            ["--model", "none/such"],
            ["--model", "STOCK/model/model_index.json"],
            ["--model", "STOCK/model/transformer"],
            ["--model", "STOCK"],
            ["--model", "STOCK/lora"],
            ["--model", "/dev/null"],
            ["--lora", "none_such"],
            ["--lora", "STOCK/model"],
            ["--lora", ""],
            ["--prompts-file", "none_such.txt"],
            ["--prompts-file", ""],
            ["--nonsense"],
            ["surplus"],
        ),
    ),
    "export": (
        EXPORT,
        (
            ["--nfe", "0"],
            ["--nfe", "-1"],
            ["--nfe", "1000000"],
            ["--nfe", "1.5"],
            ["--dtype", "int8"],
            ["--form", "gguf"],
            ["--form", "lora"],
            ["--weights", "teacher"],
            ["--height", "0"],
            ["--height", "7"],
            ["--width", "-1"],
            ["--width", "100000000"],
            ["--output", ""],
            ["--output", "."],
            ["--output", ".."],
            ["--output", "/"],
            ["--output", "../home"],
            ["--output", "x" * 300],
            ["--output", "STOCK/model/model_index.json/x"],
            ["--output", "x", "--form", "weights"],
            ["--pretrained", "none/such"],
            ["--pretrained", ""],
            ["--pretrained", "STOCK/lora"],
        ),
    ),
    "plan": (
        PLAN,
        (
            [],
            ["gpus="],
            ["gpus=x"],
            ["gpus=0x80"],
            ["gpus=-1x80"],
            ["gpus=8x0"],
            ["gpus=8x-1"],
            ["gpus=8xnan"],
            ["gpus=8xinf"],
            ["gpus=1.5x80"],
            ["gpus=8x80,"],
            ["gpus=8x80x3"],
            ["gpus=8x80", "peak_tflops=0"],
            ["gpus=8x80", "peak_tflops=nan"],
            ["gpus=8x80", "utilisation=-1"],
            ["gpus=8x80", "utilisation=2"],
            ["gpus=8x80", "reserve=1"],
            ["gpus=8x80", "reserve=nan"],
            ["gpus=8x80", "strategy=none_such"],
            ["gpus=8x80", "strategy.on_cpu=[none_such]"],
            ["gpus=8x80", "data.batch_size=0"],
            ["gpus=8x80", "data.batch_size=x"],
            ["gpus=8x80", "trainer.max_steps=nan"],
            ["gpus=8x80", "compute.accumulate=1.5"],
            ["gpus=8x80", "json=none/such/x.json"],
            ["gpus=8x80", "json="],
            ["gpus=8x80", "json=."],
            ["gpus=8x80", "--json"],
            ["gpus=8x80", "none_such=3"],
        ),
    ),
    "extract_lora": (
        EXTRACT,
        (
            ["--rank", "0"],
            ["--rank", "-1"],
            ["--rank", "x"],
            ["--rank", "1.5"],
            ["--output", "l.bin"],
            ["--output", ""],
            ["--output", ".safetensors/"],
            ["--output", "x" * 300 + ".safetensors"],
            ["--base", "none/such"],
            ["--base", "STOCK/exported"],
            ["--base", "STOCK/lora"],
            ["--tuned", "STOCK/model/model_index.json"],
            ["--tuned", ""],
            ["--device", "quantum"],
        ),
    ),
    "cache_text": (
        CACHE,
        (
            ["text_cache.folder=null"],
            ["text_cache.folder=''"],
            ["text_cache.batch_size=0"],
            ["text_cache.batch_size=1.5"],
            ["text_cache.shard_megabytes=0"],
            ["text_cache.shard_megabytes=nan"],
            ["text_cache.dtype=int4"],
            ["text_cache.folder=STOCK/model/model_index.json"],
            ["data.train.path=none_such"],
            ["text_cache=null"],
        ),
    ),
}
RUNS: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
    "sample": (
        SAMPLE,
        (
            ["--output", "new/folder/a.png"],
            ["--output", "grün.png"],
            ["--guidance-scale", "2"],
            ["--output", "a\nb.png"],
        ),
    ),
    "export": (EXPORT, (["--output", "new/folder"], ["--output", "выход"], ["--output", "a b"])),
    "plan": (PLAN, (["gpus=8x80"], ["gpus=1x24,8x80", "json=a.json"])),
    "cache_text": (CACHE, (["text_cache.folder=new/folder"],)),
}


def argument_cases() -> list[Case]:
    """Arguments that must be refused, some that must not, and a locale without letters beyond ASCII."""
    cases = []
    for expects, table in (("refused", REFUSED), ("runs", RUNS)):
        for command, (good, ways) in table.items():
            for more in ways:
                name = f"{command} {' '.join(more)[:40] or 'without'}"
                cases.append(Case("arguments", name, command, [*good, *more], expects))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    for command, (good, ways) in RUNS.items():
        arguments = [*good, *(["gpus=8x80"] if command == "plan" else ways[1] if len(ways) > 1 else ways[0])]
        cases.append(
            Case("arguments", f"{command} in ASCII", command, arguments, "runs", environment=ascii_only, fresh=True)
        )
    for seed in ("-1", str(2**80)):
        cases.append(Case("arguments", f"sample --seed {seed}", "sample", [*SAMPLE, "--seed", seed]))
    return [*cases, *_foreign_caches()]


def _foreign_caches() -> list[Case]:
    """A folder of somebody else named as cache or output: its files stay."""

    def filled(work: Path, stock: Path) -> None:
        (work / "mine").mkdir()
        for name in ("chapter.tmp", ".part.tmp", "notes.txt", "manifest.json", ".lock"):
            (work / "mine" / name).write_text("mine")

    keeps = [f"mine/{name}" for name in ("chapter.tmp", ".part.tmp", "notes.txt", "manifest.json", ".lock")]
    cache = [*SD3, "text_cache.folder=mine"]
    home = [*SD3, "text_cache.folder=../home"]
    cases = [
        Case("outputs", "cache in a folder with files", "cache_text", cache, "either", filled, keeps=keeps),
        Case("outputs", "cache in the home folder", "cache_text", home, "either", into_home=True),
        Case(
            "outputs",
            "run in a folder with files",
            "train",
            [*SD3, "hydra.run.dir=mine"],
            "either",
            filled,
            keeps=keeps[:4],
        ),
    ]
    for command, (good, key) in {"export": (EXPORT, "--output"), "extract_lora": (EXTRACT, "--output")}.items():
        arguments = [*good, key, "mine"]
        cases.append(
            Case("outputs", f"{command} over a folder with files", command, arguments, "refused", filled, keeps=keeps)
        )
    return cases


def _device(path: Path) -> None:
    if not breaking.private_device(path):
        breaking.fifo(path)


def _link_to(make: breaking.Break) -> breaking.Break:
    def link(path: Path) -> None:
        make(path.with_name("target"))
        path.symlink_to("target")

    return link


SPECIAL: dict[str, breaking.Break] = {
    "FIFO": breaking.fifo,
    "socket": breaking.listening,
    "device": _device,
    "link to a FIFO": _link_to(breaking.fifo),
    "link to a device": _link_to(_device),
}
OUTPUTS: dict[str, tuple[str, Callable[[str], list[str]], str]] = {
    "sample": ("sample", lambda name: [*SAMPLE, "--output", name], "x.png"),
    "export": ("export", lambda name: [*EXPORT, "--output", name], "x"),
    "export weights": ("export", lambda name: [*EXPORT, "--form", "weights", "--output", name], "x.safetensors"),
    "export checkpoint": ("export", lambda name: [*EXPORT, "--form", "checkpoint", "--output", name], "x.safetensors"),
    "plan": ("plan", lambda name: [*PLAN, "gpus=8x80", f"json={name}"], "x.json"),
    "extract_lora": ("extract_lora", lambda name: [*EXTRACT, "--output", name], "x.safetensors"),
    "cache_text": ("cache_text", lambda name: [*SD3, f"text_cache.folder={name}"], "x"),
}


def output_cases() -> list[Case]:
    """Outputs that are devices, pipes or sockets must be refused and stay; a link to a file stays a link."""
    cases = []
    for name, (command, arguments, file) in OUTPUTS.items():
        for special, make in SPECIAL.items():
            keeps = [file, *(["target"] if special.startswith("link") else [])]
            prepare = _made(file, make)
            cases.append(
                Case("outputs", f"{name} to a {special}", command, arguments(file), "refused", prepare, keeps=keeps)
            )
        cases.append(
            Case(
                "outputs",
                f"{name} to a link to a file",
                command,
                arguments(file),
                "either",
                _made(file, _link_to(lambda path: path.write_text("earlier output"))),
                keeps=[file],  # the link stays a link; what is written goes into its target
            )
        )
    for inner, expects in {
        "checkpoints": "refused",
        "logs": "either",
        "config.yaml": "either",
        "starts.jsonl": "either",
    }.items():
        for special, make in SPECIAL.items():
            cases.append(_inside_a_run(inner, special, make, expects))
    return cases


def _inside_a_run(inner: str, special: str, make: breaking.Break, expects: Expected) -> Case:
    def prepare(work: Path, stock: Path) -> None:
        (work / "outputs/mine").mkdir(parents=True)
        make(work / "outputs/mine" / inner)

    keeps = [f"outputs/mine/{inner}"]
    return Case("outputs", f"train with {inner} a {special}", "train", TOY, expects, prepare, keeps=keeps)


def _made(file: str, make: breaking.Break) -> Prepare:
    return lambda work, stock: make(work / file)
