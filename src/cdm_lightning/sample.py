"""`python -m cdm_lightning.sample --model FOLDER --prompt TEXT`: a labelled grid of pictures from a pipeline folder.

An exported folder gives the student's own pictures, and so does a run's folder or checkpoint; any other pipeline of a
known family, such as the teacher's, can be looked at with the same noise: that of picture i is a function of the seed and
of i only.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_lightning.errors import UserError
from cdm_lightning.run.folder import is_run
from cdm_lightning.terminal.quiet import quiet_libraries

if TYPE_CHECKING:  # torch and the rest take seconds to import: --help and mistakes should not wait for them
    from PIL.Image import Image
    from torch import Tensor, nn

    from cdm_lightning.backbones.base import Backbone

    Opened = tuple[Backbone, Callable[[], nn.Module], int]  # how its network is made, and its number of steps

RUN_STEPS = 4  # of a run's student: what CDM (arXiv:2605.06376) trains for


@dataclass(frozen=True)
class Samples:
    """Pictures (N, 3, H, W) in [0, 1] on the CPU and the number of steps that they were made in."""

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
) -> "Samples":
    """Pictures of the prompts; `steps=None` is what was exported for, 4 for a run, else the default of the pipeline's call.

    `lora` is a LoRA file, or an export of one with its number of steps, that is fused into the model. `height` and `width`
    are pixels, by default those of the model. A guidance scale of at most 1 is none. Raises UserError for a model that is
    neither run nor pipeline of a known family, and for a size that it cannot make.
    """
    from cdm_lightning.distributed.devices import choose_device
    from cdm_lightning.evaluation.samplers import SamplerSpec, generate

    backbone, build_network, default = open_run(model, lora) if is_run(Path(model)) else open_model(model, lora)
    backbone, steps = backbone.at(height, width), steps or default
    spec = SamplerSpec("sample", nfe=steps, guidance_scale=max(1.0, guidance_scale))
    place = choose_device(device)
    network = build_network().to(place)
    backbone.setup(place)
    return Samples(generate(backbone, network, spec, prompts, range(len(prompts)), seed, batch_size), steps)


def open_run(model: str, lora: str | None) -> "Opened":
    """The backbone of a run, how its student's network is made, and the number of steps of the paper."""
    from cdm_lightning.run.student import open_student, plain_network

    if lora is not None:
        raise UserError("--lora goes with a pipeline, not with a run; export the run first")
    found = open_student(model)
    return found.backbone, lambda: plain_network(found.backbone, found.network()), RUN_STEPS


def open_model(model: str, lora: str | None = None) -> "Opened":
    """The backbone of a folder or hub id, how its network is made, and the number of steps of its call.

    Sizes and steps are those of an exported student, or of an exported LoRA where `lora` is one.
    """
    from cdm_lightning.backbones.families import open_pipeline

    backbone, call = open_pipeline(model, lora=lora)
    return (
        backbone,
        backbone.build_teacher,
        call.get("num_inference_steps") or backbone.call_default("num_inference_steps"),
    )


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line and then those of a prompt file; UserError if there is none."""
    found = list(prompts)
    if file is not None:
        from cdm_lightning.data.prompts import PromptFile

        lines = PromptFile(file)
        found += [lines[i] for i in range(len(lines))]
    if not found:
        raise UserError("no prompt: pass --prompt TEXT or --prompts-file FILE")
    return found


def write_picture(picture: "Image", output: Path) -> None:
    """Save as PNG, whole or not at all; UserError if it cannot be written there."""
    from cdm_lightning.files import replacing

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            picture.save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"{output}: the picture cannot be written ({error.strerror}); pass another --output") from error


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(prog="python -m cdm_lightning.sample", description="A labelled grid of pictures.")
    made.add_argument("--model", required=True, metavar="FOLDER", help="export, run, pipeline folder or hub id")
    made.add_argument("--lora", metavar="FOLDER", help="LoRA file or exported LoRA to add to a pipeline")
    made.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    made.add_argument("--prompts-file", metavar="FILE", help="text file, one prompt a line, or .jsonl")
    made.add_argument("--steps", type=int, metavar="N", help="default: what the folder was exported for")
    made.add_argument("--guidance-scale", type=float, default=1.0, metavar="S", help="up to 1 is none (default: 1)")
    made.add_argument("--height", type=int, metavar="PIXELS", help="default: the size that the model was made for")
    made.add_argument("--width", type=int, metavar="PIXELS", help="default: the size that the model was made for")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    made.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (default: 8)")
    made.add_argument("--device", default="auto", help="default: CUDA if there is one")
    made.add_argument("--output", default="grid.png", metavar="FILE", help="picture to write (default: grid.png)")
    return made


def run(options: argparse.Namespace) -> Path:
    """Do what the command line says and return the picture's path."""
    prompts, output = read_prompts(options.prompt, options.prompts_file), Path(options.output)
    if output.is_dir():
        raise UserError(f"{output} is a folder; pass the name of a picture to write")
    if options.batch_size < 1 or (options.steps is not None and options.steps < 1):
        raise UserError("--steps and --batch-size must be at least 1")
    from cdm_lightning.evaluation.pictures import draw_grid

    made = sample_images(
        options.model,
        prompts,
        options.steps,
        options.guidance_scale,
        options.seed,
        options.batch_size,
        options.device,
        options.lora,
        options.height,
        options.width,
    )
    guidance = f"guidance {options.guidance_scale:g}" if options.guidance_scale > 1 else "no guidance"
    steps = "1 step" if made.steps == 1 else f"{made.steps} steps"
    name = Path(options.model).name + (f" + {Path(options.lora).name}" if options.lora else "")
    title = f"{name}: {steps}, {guidance}, seed {options.seed}"
    write_picture(draw_grid(made.images, prompts, title), output)
    return output


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a mistake of the user is one line on stderr and exit status 2."""
    quiet_libraries()
    try:
        output = run(parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"picture: {output}")


if __name__ == "__main__":
    main()
