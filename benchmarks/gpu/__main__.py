"""`python -m benchmarks.gpu correctness|step|compiled|memory --out DIR --minutes M`: what minutes on one GPU can tell.

Every figure is written as soon as it is there, into DIR/gpu_COMMAND.json and .md, so that a killed process loses nothing that
it measured. Weights are random at real sizes and text is drawn at random, as from a cache, so nothing is downloaded.
`--device cpu --size toy` rehearses the same code on any machine. benchmarks/README.md says how a GPU machine is prepared.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.evidence import add_publish, folder_of

COMMANDS = ("correctness", "step", "compiled", "memory")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure on one GPU, and write after every figure."
    )
    made.add_argument("command", choices=COMMANDS, help="what is measured")
    made.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: outputs/benchmarks)")
    made.add_argument("--minutes", type=float, default=9.0, metavar="M", help="the limit of time (default: 9)")
    made.add_argument("--device", default="cuda", metavar="NAME", help="cuda or cpu (default: cuda)")
    made.add_argument("--size", choices=["full", "toy"], default="full", help="real sizes, or toys to rehearse")
    made.add_argument(
        "--backend", default="inductor", metavar="NAME", help="of torch.compile, for `compiled` (default: inductor)"
    )
    made.add_argument("--name", metavar="NAME", help="of the files (default: gpu_COMMAND)")
    add_publish(made)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from cdm_lightning.terminal.quiet import quiet_libraries

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser().error("there is no GPU here; rehearse with --device cpu --size toy")
    if options.publish and options.out:
        parser().error("--publish writes into benchmarks/results: leave --out away")
    quiet_libraries()
    from benchmarks.gpu.correctness import correctness
    from benchmarks.gpu.memory import memory
    from benchmarks.gpu.record import Record
    from benchmarks.gpu.steps import compiled, step
    from benchmarks.machine import command_of, facts

    where = facts(options.device, command_of("benchmarks.gpu"))
    folder = options.out or folder_of(options.publish)
    record = Record(options.name or f"gpu_{options.command}", where, folder, options.minutes)
    compiled_by = partial(compiled, backend=options.backend)
    commands = {"correctness": correctness, "step": step, "compiled": compiled_by, "memory": memory}
    commands[options.command](record, options.size, options.device)
    print(f"written to: {folder / record.name}.md", flush=True)


if __name__ == "__main__":
    main()
