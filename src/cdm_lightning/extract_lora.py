"""`python -m cdm_lightning.extract_lora --base PIPELINE --tuned PIPELINE --rank R --output FILE`: extract a LoRA.

The LoRA of rank R approximates the difference between two pipelines' transformers, for example between the pretrained one and a
student whose weights were all trained. The error is reported layer by layer.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_lightning.ends import signals

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()

from cdm_lightning.config import command
from cdm_lightning.errors import UserError
from cdm_lightning.files import replacing, require_replaceable
from cdm_lightning.kinds import FileOrFolder, Model, Name, Width
from cdm_lightning.kinds.command_line import Parser, argument
from cdm_lightning.terminal.quiet import quiet_libraries

if TYPE_CHECKING:  # these take seconds to import: --help and error messages should not wait for them
    from torch import Tensor

    from cdm_lightning.backbones.transformer_files import TransformerFiles
    from cdm_lightning.lora.extract import Extraction


def extract_lora(base: str, tuned: str, rank: int, output: str | Path, device: str = "auto") -> "Extraction":
    """Extract the difference `tuned` - `base` of two pipelines' transformers as a LoRA of rank `rank`, and return it with its errors.

    `base` and `tuned` are folders or hub ids. The LoRA is written to the .safetensors file `output`, for diffusers'
    `load_lora_weights`. The decompositions run on `device`; "auto" means CUDA if available. Raises `UserError` if the
    transformers have different shapes or equal weights, and if `output` cannot be written.
    """
    output = Path(output)
    if rank < 1:
        raise UserError(f"--rank {rank} must be at least 1")
    if output.is_dir() or output.suffix != ".safetensors":
        raise UserError(f"--output {output} must be the name of a file that ends in .safetensors")
    try:
        require_replaceable(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); pass another --output") from error
    from cdm_lightning.backbones.transformer_files import TransformerFiles, require_same_shapes
    from cdm_lightning.distributed.devices import choose_device
    from cdm_lightning.lora.extract import extract

    before, after = TransformerFiles(base), TransformerFiles(tuned)
    require_same_shapes(before, after)
    found = extract(_pairs(before, after), rank, choose_device(device))
    if not found.tensors:
        raise UserError(
            f"{tuned} and {base} are equal in all linear layers, so there is nothing to extract; pass other pipelines"
        )
    _write(before.family, found, output)
    return found


def _pairs(before: "TransformerFiles", after: "TransformerFiles") -> "Iterator[tuple[str, Tensor, Tensor, bool]]":
    from tqdm import tqdm

    for name in tqdm(before.names, desc="layers", leave=False, disable=None):
        yield name, before.tensor(name), after.tensor(name), name in before.linear_weights


def _write(family: type, found: "Extraction", output: Path) -> None:
    """Write the LoRA file, completely or not at all."""
    from cdm_lightning.backbones.lora_file import write_lora_file

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            write_lora_file(family, found.tensors, temporary.parent, temporary.name)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); pass another --output") from error


def report(found: "Extraction") -> str:
    """Return a text with the relative error of each tensor, the largest first, followed by the error over all tensors.

    A relative error compares Frobenius norms: it is the norm of the part of the difference `tuned` - `base` that the
    LoRA misses, divided by the norm of the whole difference.
    """
    errors = sorted(found.errors(), key=lambda pair: -pair[1])
    outside = set(found.outside)
    lines = [
        f"{error:9.2e}  {name}{'  (not a linear layer: left out)' if name in outside else ''}" for name, error in errors
    ]
    lines.append(f"{found.error:9.2e}  of the whole difference is lost (relative, Frobenius)")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = Parser(prog="python -m cdm_lightning.extract_lora", description="Extract a LoRA from tuned weights.")
    made.add_argument(
        "--base",
        required=True,
        type=argument(Model),
        metavar="PIPELINE",
        help="the pretrained pipeline: a folder or hub id",
    )
    made.add_argument(
        "--tuned",
        required=True,
        type=argument(Model),
        metavar="PIPELINE",
        help="the same pipeline after training: a folder or hub id",
    )
    made.add_argument(
        "--rank", required=True, type=argument(Width), metavar="R", help="the rank of each layer's update"
    )
    made.add_argument(
        "--output",
        required=True,
        type=argument(FileOrFolder),
        metavar="FILE",
        help="the LoRA file to write (.safetensors)",
    )
    made.add_argument(
        "--device",
        type=argument(Name),
        default="auto",
        help="the device for the decompositions (default: CUDA if available)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. If the user made a mistake, print one line about it on stderr and exit with status 2."""
    quiet_libraries()
    with command("before the LoRA was written"):
        options = parser().parse_args(arguments)
        found = extract_lora(**vars(options))
        print(report(found))
        print(f"LoRA: {options.output} (use it with the scheduler of {options.tuned})")


if __name__ == "__main__":
    main()
