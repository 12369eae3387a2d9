"""Prompt files, LoRA files and secrets that are bad in as many ways as people have found."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from faults import breaking
from faults.bases import ASKED, PROMPTED, SD3, TOY
from faults.cases import Case, Expected

GOOD_LINES = b"a cat\na dog\nthe sea\n"
INVISIBLE = "\u200b\u2060\ufeff\u00ad\u200e"
PROMPT_FILES: dict[str, tuple[str, bytes, Expected]] = {  # name: file name, content, what it must lead to
    "lone high surrogate": ("a.jsonl", b'{"prompt": "a face \\ud83d"}\n', "refused"),
    "lone low surrogate in the second line": ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\\udc00 b"}\n', "refused"),
    "swapped surrogates": ("a.jsonl", b'{"prompt": "\\ude00\\ud83d"}\n', "refused"),
    "surrogate bytes": ("a.txt", b"a \xed\xa0\xbd face\n", "refused"),
    "good pair": ("a.jsonl", b'{"prompt": "a face \\ud83d\\ude00"}\n', "runs"),
    "NUL in a line": ("a.txt", b"a\0cat\n", "refused"),
    "NUL in JSON": ("a.jsonl", b'{"prompt": "a\\u0000cat"}\n', "refused"),
    "NULs alone": ("a.txt", b"\0\0\0\n", "refused"),
    "old Mac line ends": ("a.txt", b"a cat\ra dog\rthe sea\r", "runs"),
    "Windows line ends": ("a.txt", b"a cat\r\na dog\r\n", "runs"),
    "UTF-8 with mark": ("a.txt", b"\xef\xbb\xbfa cat\n", "runs"),
    "UTF-16 with mark": ("a.txt", "a cat\na dog\n".encode("utf-16"), "either"),
    "UTF-16 LE": ("a.txt", "a cat\na dog\n".encode("utf-16-le"), "refused"),
    "UTF-16 BE": ("a.txt", "a cat\na dog\n".encode("utf-16-be"), "refused"),
    "UTF-32": ("a.txt", "a cat\n".encode("utf-32"), "refused"),
    "Latin-1": ("a.txt", "grün\n".encode("latin-1"), "refused"),
    "EBCDIC": ("a.txt", "a cat\n".encode("cp500"), "refused"),
    "CSV": ("a.csv", b"id,prompt\n1,a cat\n2,a dog\n", "either"),
    "TSV": ("a.tsv", b"id\tprompt\n1\ta cat\n", "either"),
    "JSON list": ("a.json", b'["a cat", "a dog"]', "either"),
    "JSON object over lines": ("a.json", b'{\n "prompt": "a cat"\n}\n', "either"),
    "PNG": ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "refused"),
    "zip": ("a.zip", b"PK\x03\x04\x14\0\0\0", "refused"),
    "gzip": ("a.txt.gz", b"\x1f\x8b\x08\0abc", "refused"),
    "pickle": ("a.pkl", b"\x80\x04\x95\x0e\0\0\0\0\0\0\0]\x94\x8c\x05a cat\x94a.", "refused"),
    "empty": ("a.txt", b"", "refused"),
    "blank lines": ("a.txt", b"\n \n\t\n\r\n", "refused"),
    "nothing visible": ("a.txt", f"{INVISIBLE}\n".encode(), "refused"),
    "nothing visible in JSON": ("a.jsonl", json.dumps({"prompt": INVISIBLE}).encode() + b"\n", "refused"),
    "empty prompt in JSON": ("a.jsonl", b'{"prompt": ""}\n', "refused"),
    "number as prompt": ("a.jsonl", b'{"prompt": 3}\n', "refused"),
    "null as prompt": ("a.jsonl", b'{"prompt": null}\n', "refused"),
    "list as prompt": ("a.jsonl", b'{"prompt": ["a"]}\n', "refused"),
    "list as line": ("a.jsonl", b'["a cat"]\n', "refused"),
    "text as line": ("a.jsonl", b'"a cat"\n', "refused"),
    "number as line": ("a.jsonl", b"3\n", "refused"),
    "no such field": ("a.jsonl", b'{"text": "a cat"}\n', "refused"),
    "cut JSON": ("a.jsonl", b'{"prompt": "a cat"}\n{"prompt": "a d', "refused"),
    "deep JSON": ("a.jsonl", b"[" * 200_000 + b"\n", "refused"),
    "deep JSON in a field": ("a.jsonl", b'{"prompt": "a", "x": ' + b"[" * 200_000 + b"\n", "refused"),
    "long number in JSON": ("a.jsonl", b'{"prompt": "a", "n": ' + b"9" * 10_000 + b"}\n", "either"),
    "NaN in JSON": ("a.jsonl", b'{"prompt": "a", "n": NaN}\n', "either"),
    "field twice": ("a.jsonl", b'{"prompt": "a", "prompt": 3}\n', "refused"),
    "one line of 8 MB": ("a.txt", b"word " * 1_600_000, "refused"),
    "no line end in 8 MB": ("a.txt", b"x" * 8_000_000, "refused"),
    "8,000 lines that are too long": ("a.txt", (b"long " * 2_100 + b"\n") * 8_000 + b"a cat\n", "runs"),
    "300,000 lines": ("a.txt", b"a cat\n" * 300_000, "runs"),
    "parquet of text": ("a.parquet", b"a cat\n", "refused"),
    "empty parquet": ("a.parquet", b"", "refused"),
    "marks alone as parquet": ("a.parquet", b"PAR1\0\0\0\0PAR1", "refused"),
    "capital ending": ("a.JSONL", b'{"text": "a cat"}\n', "either"),
    "no ending": ("prompts", GOOD_LINES, "runs"),
}
PLACES: dict[str, breaking.Break] = {
    "FIFO": breaking.fifo,
    "endless device": breaking.endless,
    "socket": breaking.listening,
    "empty folder": breaking.folder,
    "dangling link": breaking.dangling,
    "link to itself": breaking.loop,
    "missing": breaking.remove,
}
FILE_NAMES = (
    "grün #1.txt",
    "a b.txt",
    "a=b.txt",
    "{a}.txt",
    "a,b.txt",
    "[a].txt",
    "'a'.txt",
    "$a.txt",
    "a\nb.txt",
    "x" * 200,
)


def prompt_cases() -> list[Case]:
    """Training, and sampling, on bad prompt files."""
    cases = []
    for name, (file, content, expects) in PROMPT_FILES.items():
        written = _written(file, content)
        cases.append(
            Case("prompts", f"train {name}", "train", [*PROMPTED, f"data.train.path={file}"], expects, written)
        )
        asked = ["--model", "STOCK/exported", "--steps", "1", "--prompts-file", file]
        if len(content) < 100_000:  # a grid of 300,000 images is another thing
            cases.append(Case("prompts", f"sample {name}", "sample", asked, expects, written))
    for name, change in PLACES.items():
        made = _changed("a.txt", change)
        for command, arguments in {
            "train": [*PROMPTED, "data.train.path=a.txt"],
            "sample": ["--model", "STOCK/exported", "--steps", "1", "--prompts-file", "a.txt"],
            "cache_text": [*SD3, "data.train.path=a.txt", "text_cache.folder=cache"],
        }.items():
            cases.append(Case("prompts", f"{command} {name}", command, arguments, "refused", made))
    for name in FILE_NAMES:
        quoted = "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"
        arguments = [*PROMPTED, f"data.train.path={quoted}"]
        cases.append(Case("prompts", f"named {name[:20]!r}", "train", arguments, "runs", _written(name, GOOD_LINES)))
        bare = [*PROMPTED, f"data.train.path={name}"]
        cases.append(Case("prompts", f"unquoted {name[:20]!r}", "train", bare, "either", _written(name, GOOD_LINES)))
    return cases


def _written(file: str, content: bytes) -> Callable[[Path, Path], None]:
    return lambda work, stock: (work / file).write_bytes(content) and None


def _changed(file: str, change: breaking.Break) -> Callable[[Path, Path], None]:
    def prepare(work: Path, stock: Path) -> None:
        (work / file).write_bytes(GOOD_LINES)
        change(work / file)

    return prepare


def _tensors(change: Callable[[dict], None]) -> breaking.Break:
    def rewrite(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(path)
        change(held)
        save_file({name: value.contiguous().clone() for name, value in held.items()}, path)

    return rewrite


def _first(held: dict, ending: str) -> str:
    return next(name for name in sorted(held) if ending in name)


def _without_b(held: dict) -> None:
    del held[_first(held, "lora_B")]


def _without_a(held: dict) -> None:
    del held[_first(held, "lora_A")]


def _all(change: Callable) -> Callable[[dict], None]:
    def apply(held: dict) -> None:
        for name in list(held):
            held[name] = change(held[name])

    return apply


def _alpha(shape: tuple[int, ...]) -> Callable[[dict], None]:
    def add(held: dict) -> None:
        import torch

        name = _first(held, "lora_A").partition(".lora_A")[0]
        held[f"{name}.alpha"] = torch.ones(shape)

    return add


LORA_TENSORS: dict[str, tuple[Callable[[dict], None], Expected]] = {
    "A without B": (_without_b, "refused"),
    "B without A": (_without_a, "refused"),
    "nothing in it": (lambda held: held.clear(), "refused"),
    "rank 0": (lambda held: held.update({n: v[:0] if "lora_A" in n else v[:, :0] for n, v in held.items()}), "refused"),
    "one rank of 0": (lambda held: held.update({(n := _first(held, "lora_A")): held[n][:0]}), "refused"),
    "transposed": (_all(lambda value: value.T), "refused"),
    "ranks that do not fit": (lambda held: held.update({(n := _first(held, "lora_A")): held[n][:1]}), "refused"),
    "vectors": (_all(lambda value: value.flatten()), "refused"),
    "scalars": (_all(lambda value: value.sum()), "refused"),
    "whole numbers": (_all(lambda value: value.long()), "refused"),
    "truth values": (_all(lambda value: value > 0), "refused"),
    "not finite": (_all(lambda value: value / 0), "refused"),
    "half precision": (_all(lambda value: value.half()), "runs"),
    "names of nothing": (lambda held: held.update({f"none.such.{n}": held.pop(n) for n in list(held)}), "refused"),
    "names of another network": (lambda held: held.update({f"unet.{n}": held.pop(n) for n in list(held)}), "refused"),
    "one name more": (
        lambda held: held.update({"transformer.none.lora_A.weight": held[_first(held, "lora_A")]}),
        "refused",
    ),
    "alpha of three numbers": (_alpha((3,)), "refused"),
    "empty names": (lambda held: held.update({"": held.pop(_first(held, "lora_A"))}), "refused"),
}


def lora_cases() -> list[Case]:
    """Sampling with bad LoRA files."""

    def case(name: str, change: breaking.Break, expects: Expected) -> Case:
        def prepare(work: Path, stock: Path) -> None:
            source = next((stock / "lora").glob("*.safetensors"))
            (work / "lora.safetensors").write_bytes(source.read_bytes())
            change(work / "lora.safetensors")

        arguments = ["--model", "STOCK/model", *ASKED, "--lora", "lora.safetensors"]
        return Case("LoRA files", name, "sample", arguments, expects, prepare)

    cases = [case(name, _tensors(change), expects) for name, (change, expects) in LORA_TENSORS.items()]
    cases += [
        case(change.__name__, change, "refused") for change in (*breaking.TENSOR_FILE, breaking.as_json({"a": 1}))
    ]
    return [*cases, case("good", lambda path: None, "runs")]


TOKENS = {
    "Hugging Face": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "GitHub": "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
    "OpenAI": "sk-" + "proj-abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGH",
    "AWS": "AKIA" + "IOSFODNN7EXAMPLQ",
    "wandb": "0123456789abcdef0123456789abcdef01234567",
}
FAILING = (*TOY, "trainer.accelerator=quantum")
ERRING = (*TOY, "data.train.prompts=3")


def secret_cases() -> list[Case]:
    """Commands that fail, or run, with a secret in their arguments or environment."""
    cases = []
    for name, token in TOKENS.items():
        for ending, base in {"that fails": FAILING, "with a wrong kind": ERRING, "that runs": TOY}.items():
            for key in ("+hub_token", "+api_key", "+password", "+login.auth.value", "+hub.credentials.user"):
                if key == "+hub_token" or name == "Hugging Face":
                    text = f"{key}={token}"
                    cases.append(Case("secrets", f"{name} {key} {ending}", "train", [*base, text], secrets=[token]))
        address = f"https://{token}@huggingface.co/a/b"
        query = f"https://example.org/a?token={token}"
        for where in (address, query):
            arguments = [*PROMPTED, f"data.train.path='{where}'"]
            cases.append(Case("secrets", f"{name} in {where[:22]}", "train", arguments, secrets=[token]))
            arguments = ["--model", where, *ASKED]
            cases.append(Case("secrets", f"sample {name} in {where[:22]}", "sample", arguments, secrets=[token]))
        for variable in ("HF_TOKEN", "MY_PASSWD", "SERVICE_AUTH", "WANDB_API_KEY", "SIGNING_KEY", "DB_PASSWORD"):
            arguments = [*TOY, "run_name=${oc.env:" + variable + "}", "trainer.accelerator=quantum"]
            environment = {variable: token}
            cases.append(
                Case("secrets", f"{name} as {variable}", "train", arguments, "either", None, environment, [token])
            )
    return cases


def shuffled(cases: list[Case], count: int, rng: random.Random) -> list[Case]:
    """So many of the cases, in another order."""
    return rng.sample(cases, min(count, len(cases)))
