"""`python -m benchmarks.inference --size tiny`: a student's 4 network calls an image against its teacher's 100, in turn.

Student and teacher are the same network with other calls (4 steps; 50 steps, guided), so random weights serve as well.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.evidence import add_publish
from benchmarks.sizes import SIZES

STUDENT, TEACHER = "student, 4 steps", "teacher, 50 steps, guided"


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.inference", description="Seconds an image.")
    made.add_argument("--size", choices=SIZES, default="tiny", help="which network (default: tiny)")
    made.add_argument("--batch", type=int, metavar="B", help="images at a time")
    made.add_argument("--device", metavar="NAME", help="cpu or cuda")
    made.add_argument("--repeats", type=int, default=3, metavar="N", help="how often each is timed (default: 3)")
    made.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="also with torch.compile of the blocks (default backend: inductor, which needs a C++ compiler)",
    )
    made.add_argument("--name", metavar="NAME", help="of the result files (default: inference_SIZE)")
    add_publish(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time and write the results; the result as written."""
    import torch

    from cdm_lightning.terminal.quiet import quiet_libraries

    quiet_libraries()  # before what libraries say when they are imported
    from benchmarks.machine import command_of, facts, write_results
    from benchmarks.set_up import build_backbone
    from cdm_lightning.training.networks import compile_blocks

    given = {"batch": options.batch, "device": options.device}
    size = replace(SIZES[options.size], **{name: value for name, value in given.items() if value is not None})
    where = facts(size.device, command_of("benchmarks.inference"))
    device = torch.device(size.device)
    backbone = build_backbone(size)
    backbone.setup(device)
    networks = {"": backbone.build_teacher().to(device)}
    if options.compile:
        compiled = backbone.build_teacher().to(device)
        compile_blocks(compiled, backbone.block_types, options.compile)
        networks[", compiled"] = compiled
    seconds = {name + kind: [] for kind in networks for name in (STUDENT, TEACHER)}
    for repeat in range(options.repeats + 1):
        for kind, network in networks.items():
            for name in (STUDENT, TEACHER):
                taken = seconds_of_images(backbone, network, size, guided=name == TEACHER)
                if repeat:  # the first one sets things up
                    seconds[name + kind].append(taken / size.batch)
    result = {"facts": where, "size": asdict(size), "seconds_per_image": seconds}
    write_results(
        options.name or f"inference_{options.size}",
        f"Inference: {options.size}",
        result,
        {"Seconds an image": rows(seconds)},
        options.publish,
    )
    return result


def seconds_of_images(backbone: Any, network: Any, size: Any, guided: bool) -> float:
    """Seconds of one batch, from conditioning to latents."""
    import torch

    from benchmarks.machine import seconds_of
    from benchmarks.set_up import batch
    from cdm_lightning.backbones.base import BoundField, repeat_rows
    from cdm_lightning.core.flow import GuidedField
    from cdm_lightning.core.rng import evaluation_noise
    from cdm_lightning.core.rollout import sample
    from cdm_lightning.core.schedules import inference_sigmas
    from cdm_lightning.module import COMPUTE_DTYPES

    prompts, dtype = batch(0, size.batch).prompts, COMPUTE_DTYPES[size.compute_dtype]
    field = BoundField(backbone, network, backbone.encode_prompts(prompts), dtype)
    if guided:
        no_text = BoundField(backbone, network, repeat_rows(backbone.encode_prompts([""]), size.batch), dtype)
        field = GuidedField(field, no_text, 4.5, backbone.guide)
    noise = evaluation_noise(0, range(size.batch), backbone.latent_shape, torch.device(size.device))
    sigmas = inference_sigmas(50 if guided else 4, backbone.shift_steps).to(noise.device)
    return seconds_of(lambda: sample(field, noise, sigmas), size.device)


def rows(seconds: dict[str, list[float]]) -> list[dict[str, str]]:
    """One row a way to make images."""
    import statistics

    slowest = statistics.median(seconds[TEACHER])
    return [
        {
            "images": name,
            "s/image": f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})",
            "times as fast as the teacher": f"{slowest / statistics.median(times):.3g}",
        }
        for name, times in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parser().parse_args(arguments))


if __name__ == "__main__":
    main()
