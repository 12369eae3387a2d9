"""Bytes on one GPU, part by part, from the sizes of a run and its layout. Plain arithmetic; every figure is in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

from cdm_lightning.planning.layout import Layout
from cdm_lightning.planning.live import Timeline

MOST = 1_000_000  # no batch is larger


@dataclass(frozen=True)
class Sizes:
    """What a run holds in all, whole: bytes of each network, of optimizer states and of the frozen parts.

    `buffers` are bytes of tables in a network that are no weights and are never cut into shards, such as SD3's of positions.
    `trained`, `states` (of optimizers after their first step) and `step_copies` (what an optimizer's step takes in addition) are
    by trained role; the roles `held_whole`, adapters and heads, are never cut into shards. `largest_block` and
    `outside_blocks` are numbers of weights of one network, `compute` the bytes of one in computing. `phases` are the timelines
    of the rollout and of each role's updates.
    """

    networks: Mapping[str, float]
    trained: Mapping[str, float]
    buffers: Mapping[str, float]
    states: Mapping[str, float]
    step_copies: Mapping[str, float]
    text: float
    vae: float
    largest_block: float
    outside_blocks: float
    compute: int
    phases: Mapping[str, Timeline]
    held_whole: frozenset[str] = frozenset()

    def share(self, role: str, layout: Layout) -> float:
        """The share of a network that lies on each GPU between its calls."""
        return 1.0 if role in self.held_whole else layout.share(role)

    def gradient_share(self, role: str, layout: Layout) -> float:
        """The share of its gradients that lies on each GPU."""
        return 1.0 if role in self.held_whole else 1 / layout.shards


def resting(sizes: Sizes, layout: Layout) -> dict[str, float]:
    """What lies on a GPU all the time, by part."""
    parts = {f"weights: {role}": size * sizes.share(role, layout) for role, size in sizes.networks.items()}
    return parts | {
        "tables of the networks": sum(size for role, size in sizes.buffers.items() if role not in layout.on_cpu),
        "optimizer states": sum(size * sizes.share(role, layout) for role, size in sizes.states.items()),
        "text encoders": sizes.text,
        "image codec (VAE)": sizes.vae,
    }


def gathered(sizes: Sizes, layout: Layout) -> float:
    """Whole weights at one moment where they are gathered: what is outside blocks, and a block with the next one.

    With the gradients of two blocks that are not reduced yet (float32).
    """
    if not layout.gathers:
        return 0.0
    return (sizes.outside_blocks + 2 * sizes.largest_block) * sizes.compute + 2 * sizes.largest_block * 4


def phase_peaks(sizes: Sizes, layout: Layout, batch: int, accumulate: int = 1) -> dict[str, float]:
    """The most that each part of an iteration takes beside what rests, with its gradients; the batch is computed in parts."""
    part, repeated = at_once(batch, accumulate), accumulate > 1
    fixed = 0.0 if layout.gathers else 1.0  # a copy of all weights by autocast, or blocks gathered in its place
    peaks = {
        name: timeline.peak(part, sizes.gradient_share(name, layout), fixed, repeated) + gathered(sizes, layout)
        for name, timeline in sizes.phases.items()
    }
    peaks["optimizer step"] = max(  # each network's gradients are dropped before another's are made
        sizes.gradient_share(role, layout) * (size + sizes.step_copies[role]) for role, size in sizes.trained.items()
    )
    return peaks


def total(sizes: Sizes, layout: Layout, batch: int, accumulate: int = 1) -> float:
    """The most bytes of tensors on a GPU in training."""
    return sum(resting(sizes, layout).values()) + max(phase_peaks(sizes, layout, batch, accumulate).values())


def at_once(batch: int, accumulate: int) -> int:
    """Samples of the largest of the parts that a batch is computed in."""
    return -(-batch // accumulate)


def largest_batch(sizes: Sizes, layout: Layout, usable: float, accumulate: int = 1) -> int:
    """The largest batch of a GPU, in so many parts, whose `total` is at most `usable`; 0 if a single sample is too much."""
    low, high = 0, accumulate  # multiples of it: parts of one size
    while high < MOST and total(sizes, layout, high, accumulate) <= usable:
        low, high = high, 2 * high
    while high - low > accumulate:
        middle = (low + high) // 2 // accumulate * accumulate
        low, high = (middle, high) if total(sizes, layout, middle, accumulate) <= usable else (low, middle)
    return low


def checkpoint_bytes(sizes: Sizes) -> float:
    """A resumable checkpoint: trained networks, the student's average and optimizer states; the teacher is not in it."""
    roles = (*sizes.trained, "student_ema")
    networks = sum(sizes.networks[role] + sizes.buffers.get(role, 0) for role in roles)
    return networks + sum(sizes.states.values())
