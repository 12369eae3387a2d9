"""What to switch on when a run does not fit, with what each saves. Plain arithmetic."""

from dataclasses import dataclass, replace

from cdm_lightning.planning.layout import GPUs, Layout, make_layout
from cdm_lightning.planning.memory import Sizes, largest_batch, total
from cdm_lightning.recomputation import Recomputation

ADAM, ADAM_8_BIT = 8.0, 2.03  # bytes of state for each weight
WORTH_A_TRY = 0.15  # of a GPU's memory: with less left over there is nothing to gain


@dataclass(frozen=True)
class Remedy:
    """Overrides, bytes that they save on a GPU at the same batch, and the largest batch that then fits."""

    overrides: str
    saves: float
    batch: int


def remedies(sizes: Sizes, layout: Layout, gpus: GPUs, batch: int, accumulate: int = 1) -> list[Remedy]:
    """Each way to take less memory that this run does not use yet, the largest saving first, and last all together."""
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
    if "student_ema" not in (*layout.on_cpu, *sizes.held_whole):
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
        consider(f"module.accumulate={batch}", sizes, layout, batch)
    found.sort(key=lambda remedy: -remedy.saves)
    if len(found) > 1:
        consider("all of these", everything, everywhere, max(batch, accumulate))
    return found


def further(recomputation: Recomputation, lora: bool) -> list[str]:
    """What makes it smaller and changes the run itself: to be planned anew, since what it saves must be traced."""
    lines = [] if recomputation.share == 1 else ["module.gradient_checkpointing=true"]
    return lines if lora else [*lines, "lora=lora"]


def faster(recomputation: Recomputation, free: float, batch: int) -> list[str]:
    """What makes it faster where a share of the memory is `free`: to be planned anew, too."""
    if not recomputation.share or free < WORTH_A_TRY:
        return []
    first = ["module.recompute_attention=false"] if recomputation.attention else []
    return [*first, f"module.gradient_checkpointing=false module.accumulate={max(batch // 2, 1)}"]
