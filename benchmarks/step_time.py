"""`python -m benchmarks.step_time --size small`: an iteration against the authors' order of work, and the frame's cost.

Both orders train the same networks in one process, in turn, on the same random numbers; a check of losses and gradients comes
first. Results have date, hardware, commit and command; benchmarks/README.md says where they go and what they mean.
"""

import argparse
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from benchmarks.evidence import add_publish
from benchmarks.sizes import SIZES, Size

ATTENTION = ("flash", "cudnn", "efficient")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments; what is not given is as in `benchmarks/sizes.py`."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time", description="Step times against the authors' order."
    )
    made.add_argument("--size", choices=SIZES, default="tiny", help="which networks (default: tiny)")
    made.add_argument("--batch", type=int, metavar="B", help="samples an iteration")
    made.add_argument("--side", type=int, metavar="N", help="latents along one side: 128 is 1024 pixels")
    made.add_argument("--cycles", type=int, metavar="N", help="cycles of two iterations of each order")
    made.add_argument("--longest-rollout", type=int, metavar="K", help="rollouts have 1 to K steps")
    made.add_argument("--precision", choices=["float32", "bfloat16"], help="what networks compute in")
    made.add_argument("--device", metavar="NAME", help="cpu or cuda")
    made.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="our order with torch.compile of the blocks (default backend: inductor, which needs a C++ compiler)",
    )
    made.add_argument(
        "--recompute",
        type=float,
        metavar="SHARE",
        help="our order with gradient checkpointing of this share of the blocks",
    )
    made.add_argument(
        "--keep-attention",
        action="store_true",
        help="our order with attention's results kept where blocks are recomputed",
    )
    made.add_argument("--accumulate", type=int, metavar="N", help="our order with the batch in N parts")
    made.add_argument(
        "--rollouts-together", type=int, metavar="N", help="our order with the rollouts of N iterations as one batch"
    )
    made.add_argument(
        "--attention", choices=ATTENTION, help="which of torch's attentions both orders run (default: torch's choice)"
    )
    made.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU")
    made.add_argument(
        "--frame", type=int, default=0, metavar="N", help="also compare N iterations of Trainer.fit, tiny"
    )
    made.add_argument("--name", metavar="NAME", help="of the result files (default: step_time_SIZE)")
    add_publish(made)
    return made


def chosen_size(options: argparse.Namespace) -> Size:
    """The size with what the command line changes in it."""
    given = {
        "batch": options.batch,
        "side": options.side,
        "cycles": options.cycles,
        "longest_rollout": options.longest_rollout,
        "compute_dtype": options.precision,
        "device": options.device,
        "compile_backend": options.compile,
        "recompute": options.recompute,
        "recompute_attention": False if options.keep_attention else None,
        "accumulate": options.accumulate,
        "rollouts_together": options.rollouts_together,
    }
    return replace(SIZES[options.size], **{name: value for name, value in given.items() if value is not None})


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check, time, measure memory, write the results; the result as written."""
    import torch

    from cdm_lightning.terminal.quiet import quiet_libraries

    quiet_libraries()  # before what libraries say when they are imported
    from benchmarks.comparison import Comparison
    from benchmarks.frame import frame_cost
    from benchmarks.machine import command_of, facts, write_results

    if options.threads:
        torch.set_num_threads(options.threads)
    size = chosen_size(options)
    where = facts(size.device, command_of("benchmarks.step_time"))
    comparison = Comparison(size)
    with attention(options.attention):
        result = {"facts": where, "size": asdict(size), "check": comparison.check()}
        result |= comparison.measure()
    tables = {"Against the authors' order of work": main_rows(result), "Seconds an iteration": phase_rows(result)}
    if options.frame:
        result["frame"] = frame_cost(options.frame)
        tables["Cost of the frame"] = [{name: f"{value:.4g}" for name, value in result["frame"].items()}]
    name = options.name or f"step_time_{options.size}"
    write_results(name, f"Step time: {options.size}", result, tables, options.publish)
    return result


def attention(name: str | None) -> AbstractContextManager[Any]:
    """Inside the block torch runs this attention alone; None leaves the choice to torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return nullcontext() if name is None else sdpa_kernel(getattr(SDPBackend, f"{name.upper()}_ATTENTION"))


def main_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """One row an order, and one of ratios."""
    rows = []
    for order in ("authors", "ours"):
        one = result[order]
        rows.append(
            {
                "order": order,
                "samples/s": f"{one['samples_per_second']:.3g}",
                "iteration, s": spread(one["seconds"]),
                "peak memory, GB": f"{one['peak_bytes'] / 1e9:.3g}",
                "network calls a sample": f"{one['calls_per_sample']:.3g}",
                "model TFLOP/s": f"{one['flops_per_second'] / 1e12:.3g}",
                "of the ceiling": f"{one['flops_per_second'] / result['ceiling']:.0%}",
            }
        )
    rows.append(
        {
            "order": "ours / authors",
            "samples/s": f"{result['speed_ratio']:.3g}",
            "iteration, s": "ratio " + spread(result["ratios"]),
            "peak memory, GB": f"{result['memory_ratio']:.3g}",
            "network calls a sample": f"{result['ours']['calls_per_sample'] / result['authors']['calls_per_sample']:.3g}",
            "model TFLOP/s": "",
            "of the ceiling": "",
        }
    )
    return rows


def phase_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Mean seconds of each phase by order, in the sequence in which the authors' order has them."""
    orders = ("authors", "ours")
    names = dict.fromkeys(name for order in orders for name in result[order]["phases"])
    return [
        {"order": order, **{name: f"{result[order]['phases'].get(name, 0.0):.4g}" for name in names}}
        for order in orders
    ]


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parser().parse_args(arguments))


if __name__ == "__main__":
    main()
