"""Suggest options that make a run take less memory, or make it faster with the memory that is free."""

from dataclasses import dataclass, replace

from cdm_lightning.planning.layout import GPUs, Layout, make_layout
from cdm_lightning.planning.memory import Sizes, largest_batch, total
from cdm_lightning.training.gradient_checkpointing import Recomputation

ADAM, ADAM_8_BIT = 8.0, 2.03  # bytes of state for each weight
WORTH_A_TRY = 0.15  # the share of a GPU's memory that must be free before faster settings are suggested


@dataclass(frozen=True)
class Remedy:
    """Command-line overrides that save memory.

    `saves` is the number of bytes saved on each GPU if the batch stays the same. `batch` is the largest number of
    prompts that fits on each GPU with these overrides.
    """

    overrides: str
    saves: float
    batch: int


def remedies(sizes: Sizes, layout: Layout, gpus: GPUs, batch: int, accumulate: int = 1) -> list[Remedy]:
    """Return ways to save memory, sorted by the saved bytes, with the largest first.

    Ways that the run uses already are left out. If there are several ways, one more entry at the end combines all of
    them. `batch` is the number of prompts on each GPU in an iteration. A GPU computes them in `accumulate` parts, one
    after another.
    """
    now = total(sizes, layout, batch, accumulate)
    found = []
    everything, everywhere = sizes, layout

    def consider(overrides: str, other: Sizes, where: Layout, parts: int = accumulate) -> None:
        saves = now - total(other, where, batch, parts)
        if saves > 0:
            found.append(Remedy(overrides, saves, largest_batch(other, where, gpus.usable, parts)))

    if layout.shards == 1 and gpus.count > 1:
        everywhere = make_layout("fsdp2", gpus.count, layout.on_cpu)
        consider("strategy=fsdp2", sizes, everywhere)
    if "student_ema" in sizes.networks and "student_ema" not in (*layout.on_cpu, *sizes.held_whole):
        moved = (*layout.on_cpu, "student_ema")
        everywhere = replace(everywhere, on_cpu=moved)
        consider("strategy.on_cpu=[student_ema]", sizes, replace(layout, on_cpu=moved))
    if sizes.text:
        everything = replace(everything, text=0)
        consider("text_cache.folder=DIR (after cdm_lightning.cache_text)", replace(sizes, text=0), layout)
    if sum(sizes.states.values()) > ADAM_8_BIT / 4 * sum(sizes.trained.values()) * 1.5:
        states = {role: size * ADAM_8_BIT / ADAM for role, size in sizes.states.items()}
        small = {"states": states, "step_copies": dict.fromkeys(sizes.step_copies, 0.0)}
        everything = replace(everything, **small)
        consider("optim=adamw8bit", replace(sizes, **small), layout)
    if batch > accumulate:
        consider(f"compute.accumulate={batch}", sizes, layout, batch)
    found.sort(key=lambda remedy: -remedy.saves)
    if len(found) > 1:
        consider("all of these", everything, everywhere, max(batch, accumulate))
    return found


def further(recomputation: Recomputation, lora: bool) -> list[str]:
    """Return overrides that save memory by gradient checkpointing or LoRAs.

    Overrides that the run uses already are left out. To see how much an override saves, plan again with it.
    `recomputation` is the run's gradient checkpointing, and `lora` says whether the run trains LoRAs.
    """
    lines = [] if recomputation.share == 1 else ["compute.gradient_checkpointing=true"]
    return lines if lora else [*lines, "lora=lora"]


def faster(recomputation: Recomputation, free: float, batch: int) -> list[str]:
    """Return overrides that make the run faster but take more memory.

    To see whether an override fits into memory, plan again with it. `recomputation` is the run's gradient
    checkpointing, `free` is the free share of a GPU's usable memory, and `batch` is the number of prompts on each GPU.
    The list is empty if the run recomputes no activations, or if `free` is below `WORTH_A_TRY`.
    """
    if not recomputation.share or free < WORTH_A_TRY:
        return []
    first = ["compute.recompute_attention=false"] if recomputation.attention else []
    return [*first, f"compute.gradient_checkpointing=false compute.accumulate={max(batch // 2, 1)}"]
