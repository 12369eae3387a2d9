"""`python -m cdm_lightning.sample --model FOLDER --prompt TEXT`: generate images and draw them as a labelled grid.

The model can be a student (an exported folder, a run's folder or a checkpoint) or any pipeline of a known family, such
as the teacher. The noise of image i depends only on the seed and on i, so different models start from the same noise.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_lightning.ends import signals

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()

from cdm_lightning.config import command
from cdm_lightning.errors import UserError
from cdm_lightning.files import replacing, require_replaceable
from cdm_lightning.kinds import BatchSize, FileOrFolder, Guidance, Model, Name, Pixels, Prompt, Seed, Steps
from cdm_lightning.kinds.command_line import Parser, argument
from cdm_lightning.run.models import OpenedModel, open_sized
from cdm_lightning.terminal.quiet import quiet_libraries

if TYPE_CHECKING:  # these take seconds to import: --help and error messages should not wait for them
    from PIL.Image import Image
    from torch import Tensor

KINDS = {
    "model": Model,
    "file": FileOrFolder,
    "output": FileOrFolder,
    "prompt": Prompt,
    "steps": Steps,
    "guidance": Guidance,  # 1 or less is none
    "pixels": Pixels,
    "seed": Seed,
    "batch": BatchSize,
    "name": Name,
}
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".svg", ".pdf")


@dataclass(frozen=True)
class Samples:
    """Images (N, 3, H, W) in [0, 1] on the CPU, and the number of steps that generated them."""

    images: "Tensor"
    steps: int


def sample_images(
    model: str,
    prompts: Sequence[str],
    steps: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "auto",
    lora: str | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: str = "float32",
    attention: str | None = None,
) -> "Samples":
    """Generate an image for each of the N `prompts`.

    - `model`: the path of a run, a checkpoint, an export or a pipeline folder, or the hub id of a pipeline.
    - `steps`: by default the number that an export was made for, 4 for a run, and otherwise the pipeline's own default.
    - `lora`: a LoRA file or an exported LoRA to fuse into the model; an exported LoRA has its own default of `steps`.
    - `height`, `width`: pixels; by default those of the model. `guidance_scale`: 1 or less means no guidance.
    - `device`: "auto" (CUDA if available) or a torch device. `dtype`: "float32" or "bfloat16", for the network.
    - `attention`: the kernel that computes attention (see `training.attention`); None is torch's choice.

    To save memory, the text encoders are freed before the network is loaded. Raises UserError for a model that is no
    run and no pipeline of a known family, for a size that the model cannot make, and for other values that cannot be
    used.
    """
    opened = open_sized(model, lora, height, width, steps)
    images = list(sampled(opened, prompts, guidance_scale, seed, batch_size, device, dtype, attention))
    import torch

    return Samples(torch.cat(images), opened.steps)


def sampled(
    opened: OpenedModel,
    prompts: Sequence[str],
    guidance_scale: float,
    seed: int,
    batch_size: int,
    device: str,
    dtype: str = "float32",
    attention: str | None = None,
) -> "Iterator[Tensor]":
    """Yield the images (B, 3, H, W) of each batch of prompts, with values in [0, 1], on the CPU.

    `opened` is the result of `open_sized`. The other arguments are those of `sample_images`.
    """
    from cdm_lightning.distributed.devices import choose_device
    from cdm_lightning.evaluation.samplers import SamplerSpec, encode_ahead, generate
    from cdm_lightning.module import COMPUTE_DTYPES
    from cdm_lightning.training.attention import attention_by, check_attention

    check_prompts(prompts)
    check_attention(attention, "--attention")
    if dtype not in COMPUTE_DTYPES:
        raise UserError(f"--dtype {dtype} must be one of {', '.join(COMPUTE_DTYPES)}")
    backbone, steps = opened.backbone, opened.steps
    spec = SamplerSpec("sample", nfe=steps, guidance_scale=max(1.0, guidance_scale))
    place = choose_device(device)
    backbone.setup(place)
    encode_ahead(backbone, prompts, batch_size)
    network = opened.build_network().to(place, COMPUTE_DTYPES[dtype])
    for start in range(0, len(prompts), batch_size):
        numbers = range(start, min(start + batch_size, len(prompts)))
        part = [prompts[number] for number in numbers]
        with attention_by(attention):
            images = generate(backbone, network, spec, part, numbers, seed, batch_size, COMPUTE_DTYPES[dtype])
        if not images.isfinite().all():
            raise UserError(
                "the images have NaN or infinite values, so --model or --lora is damaged; copy it again or pass another"
            )
        yield images


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Return the given prompts, followed by those of the prompt file `file`. Raises UserError if there are none."""
    found = list(prompts)
    if file is not None:
        from cdm_lightning.data.prompts import PromptFile

        lines = PromptFile(file)
        found += [lines[i] for i in range(len(lines))]
    if not found:
        raise UserError("there is no prompt; pass --prompt TEXT or --prompts-file FILE")
    return found


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise UserError for a prompt that no tokenizer can read."""
    from cdm_lightning.data.selection import flaw_of_given

    for number, prompt in enumerate(prompts, start=1):
        if flaw := flaw_of_given(prompt):
            raise UserError(f"prompt {number}: {flaw}")


def check_output(output: Path) -> None:
    """Raise UserError if `output` exists and is no regular file: the picture may replace only a regular file."""
    try:
        require_replaceable(output)
    except OSError as error:
        raise UserError(f"{output}: the picture cannot be written ({error.strerror}); pass another --output") from error


def write_picture(picture: "Image", output: Path) -> None:
    """Save the picture as PNG, completely or not at all. Raises UserError if it cannot be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            picture.save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"{output}: the picture cannot be written ({error.strerror}); pass another --output") from error


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = Parser(prog="python -m cdm_lightning.sample", description="Draw a labelled grid of images.")
    kinds = {name: argument(kind) for name, kind in KINDS.items()}
    what = "an export, a run, a pipeline folder or a hub id"
    made.add_argument("--model", required=True, type=kinds["model"], metavar="FOLDER", help=what)
    made.add_argument(
        "--lora", type=kinds["file"], metavar="FOLDER", help="a LoRA file or an exported LoRA to add to a pipeline"
    )
    made.add_argument(
        "--prompt",
        action="append",
        default=[],
        type=kinds["prompt"],
        metavar="TEXT",
        help="a prompt; the option may be given several times",
    )
    made.add_argument(
        "--prompts-file", type=kinds["file"], metavar="FILE", help="a text file with one prompt per line, or .jsonl"
    )
    made.add_argument(
        "--steps", type=kinds["steps"], metavar="N", help="default: the number that the folder was exported for"
    )
    what = "1 or less is no guidance (default: 1)"
    made.add_argument("--guidance-scale", type=kinds["guidance"], default=1.0, metavar="S", help=what)
    for side in ("--height", "--width"):
        made.add_argument(
            side, type=kinds["pixels"], metavar="PIXELS", help="default: the size that the model was made for"
        )
    made.add_argument("--seed", type=kinds["seed"], default=0, metavar="N", help="the seed of the noise (default: 0)")
    made.add_argument("--batch-size", type=kinds["batch"], default=8, metavar="N", help="images at a time (default: 8)")
    made.add_argument("--device", type=kinds["name"], default="auto", help="default: CUDA if there is one")
    made.add_argument(
        "--output",
        type=kinds["output"],
        default="grid.png",
        metavar="FILE",
        help="the picture to write (default: grid.png); FOLDER/ writes a file for each image",
    )
    made.add_argument(
        "--dtype", default="float32", metavar="D", help="of the network: float32 or bfloat16 (half the memory)"
    )
    what = "the kernel of attention: math, flash, efficient, cudnn, flash3 or flash4 (default: torch's choice)"
    made.add_argument("--attention", type=kinds["name"], metavar="NAME", help=what)
    return made


def print_unknown_words(opened: OpenedModel, prompts: Sequence[str]) -> None:
    """Print a warning on stderr if the model knows a few dozen words only, and the prompts contain others."""
    from cdm_lightning.backbones.vocabulary import known_words, unknown_words

    folder = getattr(opened.backbone, "folder", None)
    known = known_words(folder) if isinstance(folder, Path) else set()
    if unknown := unknown_words(prompts, known):
        words, are = ", ".join(unknown), "is not a word" if len(unknown) == 1 else "are not words"
        print(f"WARNING: {words} {are} that this model knows; it knows {', '.join(sorted(known))}", file=sys.stderr)


def run(options: argparse.Namespace) -> Path:
    """Generate images as `options` say, write them, and return the path of the file or folder that was written.

    All images are drawn into one picture. If `options.output` ends with "/", each image is written to its own file in
    that folder instead. Raises UserError for wrong options before anything is generated.
    """
    prompts, output = read_prompts(options.prompt, options.prompts_file), Path(options.output)
    is_folder = options.output.endswith("/")
    if not output.name or (output.is_dir() and not is_folder):
        raise UserError(f"--output={output} is a folder; pass the name of a picture, or FOLDER/ for one file per image")
    if output.suffix.lower() in OTHER_FORMATS and not is_folder:
        raise UserError(f"--output={output}: the picture is a PNG file; pass a name that ends in .png")
    check_output(output / "00000.png" if is_folder else output)
    opened = open_sized(options.model, options.lora, options.height, options.width, options.steps)
    print_unknown_words(opened, prompts)
    numbers = options.seed, options.batch_size, options.device, options.dtype, options.attention
    images = sampled(opened, prompts, options.guidance_scale, *numbers)
    from cdm_lightning.evaluation.pictures import draw_grid, require_one_picture, to_picture

    if is_folder:
        numbers = count()
        for image in (image for batch in images for image in batch):
            write_picture(to_picture(image), output / f"{next(numbers):05d}.png")
        return output
    require_one_picture(len(prompts), opened.backbone.image_size)
    import torch

    guidance = f"guidance {options.guidance_scale:g}" if options.guidance_scale > 1 else "no guidance"
    steps = "1 step" if opened.steps == 1 else f"{opened.steps} steps"
    name = Path(options.model).name + (f" + {Path(options.lora).name}" if options.lora else "")
    title = f"{name}: {steps}, {guidance}, seed {options.seed}"
    write_picture(draw_grid(torch.cat(list(images)), prompts, title), output)
    return output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. If the user made a mistake, print one line about it on stderr and exit with status 2."""
    quiet_libraries()
    with command("before all pictures were written"):
        output = run(parser().parse_args(arguments))
        print(f"{'pictures' if output.is_dir() else 'picture'}: {output}")


if __name__ == "__main__":
    main()
