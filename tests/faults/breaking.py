"""Ways to break a file or a folder, for the generators of bad models, runs, adapters and prompt files."""

import json
import os
import pickle
import random
import shutil
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES = (None, [], {}, "", "x", -1, 0, 1, 2.5, True, 10**30, [1], ["a"], {"a": 1}, float("nan"))
Break = Callable[[Path], None]


class Foreign:
    """A pickle of it runs a command when it is loaded: it makes the file that stands for foreign code."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What the pickle calls."""
        return os.system, ("touch pwned",)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def half(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    """A file of no bytes."""
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    """Bytes that are no text."""
    path.write_bytes(random.Random(0).randbytes(1000))


def flipped(path: Path) -> None:
    """One bit in the middle is another one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign_pickle(path: Path) -> None:
    """A pickle that runs a command."""
    path.write_bytes(pickle.dumps(Foreign()))


def foreign_torch(path: Path) -> None:
    """The same as torch would have saved it."""
    import torch

    with path.open("wb") as file:
        torch.save({"state_dict": Foreign()}, file)


def fifo(path: Path) -> None:
    """A pipe that nobody writes to: opening it waits for ever."""
    remove(path)
    os.mkfifo(path)


def listening(path: Path) -> None:
    """A socket."""
    remove(path)
    opened = os.open(path.parent, os.O_RDONLY)  # the path itself can be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{opened}/{path.name}")
    finally:
        os.close(opened)


def folder(path: Path) -> None:
    """A folder in its place."""
    remove(path)
    path.mkdir()


def dangling(path: Path) -> None:
    """A link to nothing."""
    remove(path)
    path.symlink_to("no/such/file")


def loop(path: Path) -> None:
    """A link to itself."""
    remove(path)
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    """A link to a device that never ends; it is only read."""
    remove(path)
    path.symlink_to("/dev/zero")


def bomb(path: Path) -> None:
    """YAML that is 9^9 words long once its references are followed."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path.write_text("\n".join([*lines, "backbone: *a8"]) + "\n")


def deep(path: Path) -> None:
    """JSON or YAML that is nested too deeply for a parser that calls itself."""
    path.write_text("[" * 100_000)


def long_header(path: Path) -> None:
    """A .safetensors file whose header claims to be longer than the file."""
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def as_json(value: Any) -> Break:
    """Another JSON value in the place of a file."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(value))

    write.__name__ = f"is_{json.dumps(value)[:20]}"
    return write


ANY_FILE: tuple[Break, ...] = (remove, half, emptied, garbage, fifo, folder, dangling, loop, endless)
JSON_FILE: tuple[Break, ...] = (
    *ANY_FILE,
    deep,
    *(as_json(value) for value in ([], {}, None, 3, "text", [[1]], {"a": None})),
)
TENSOR_FILE: tuple[Break, ...] = (*ANY_FILE, long_header, foreign_pickle, foreign_torch)


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path for name, child in children for path in ((*at, name), *places(child, (*at, name)))]


def changed(path: Path, at: tuple[Any, ...], value: Any) -> None:
    """Put another value into a JSON file (`...`: delete it)."""
    document = json.loads(path.read_text())
    put(document, at, value)
    path.write_text(json.dumps(document))


def put(document: Any, at: tuple[Any, ...], value: Any) -> None:
    """Put another value into nested dicts and lists, at the place that these keys lead to (`...`: delete it)."""
    node = document
    for step in at[:-1]:
        node = node[step]
    if value is ...:
        del node[at[-1]]
    else:
        node[at[-1]] = value


def private_device(path: Path) -> bool:
    """Make a device of one's own that swallows what is written, as /dev/null does; whether that is allowed here."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with path.open("wb") as opened:
            opened.write(b"x")
    except OSError:
        path.unlink(missing_ok=True)
        return False
    return True
