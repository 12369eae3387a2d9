"""Compute the bytes that each part of a run takes on one GPU.

The inputs are the sizes of the parts (`Sizes`) and the distribution of the networks over the GPUs (`Layout`). All
figures are bytes. A role is the name of a network: "student", "student_ema", "teacher", or one that the objective adds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cdm_lightning.planning.layout import Layout
from cdm_lightning.planning.live import Timeline

VALIDATION, TEXT = "validation", "text encoding"  # the names of their phases
MOST = 1_000_000  # the search for the largest batch stops here


@dataclass(frozen=True)
class Validation:
    """The bytes that validation takes in its three stages: sampling, decoding, and scaling of the pixels to [0, 1].

    Sampling B images takes as much memory as a training rollout of `share` * B samples. Decoding takes `first` bytes
    for the first image of a batch and `more` bytes for each further image. Scaling the pixels takes `copies` bytes for
    each image. `batch` is the number of images in a batch; None means as many as there are samples in a training batch.
    """

    first: float
    more: float
    copies: float = 0.0
    share: float = 1.0
    batch: int | None = None

    def peak(self, rollout: Timeline | None, batch: int, fixed: float) -> float:
        """Return the largest number of bytes at any moment of validation.

        `rollout` is the memory of a training rollout (None: there are no rollouts), and `batch` is the number of
        samples in a training batch. `fixed` is the share of the rollout's fixed bytes (those that do not grow with the
        batch) that this GPU holds.
        """
        images = self.batch or batch
        sampled = rollout.peak(math.ceil(images * self.share), 1.0, fixed) if rollout is not None else 0.0
        return max(sampled, self.first + (images - 1) * self.more, images * self.copies)


@dataclass(frozen=True)
class Sizes:
    """The bytes of everything that a run holds, before sharding: networks, optimizer states and frozen parts.

    These fields map the role of a network to its bytes:
    - `networks`: all weights.
    - `buffers`: tensors that are not weights and are never sharded, such as SD3's table of positions.
    - `trained`: the trained weights.
    - `states`: the optimizer's state after its first step.
    - `step_copies`: copies that the optimizer holds only during its step.

    `phases` maps a role to the memory during that network's updates, and the key "rollout" to the memory during the
    rollout. `text` and `vae` are the bytes of the text encoders and of the image codec. `largest_block` is the number
    of weights in a network's largest block, `outside_blocks` is the number of weights outside all blocks, and `compute`
    is the bytes of one weight in the compute dtype. The roles in `held_whole` are never sharded: LoRA adapters, and
    heads, which the objective builds itself. `validation` is None if the memory of validation is not counted.
    `text_rests` is True if the text encoders stay in host memory while no prompts are encoded, as with the option
    `text_cache.encode_ahead`.
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
    validation: Validation | None = None
    text_rests: bool = False

    def share(self, role: str, layout: Layout) -> float:
        """Return the share of the network `role` that each GPU holds between the network's calls.

        The share is 1 for roles in `held_whole`.
        """
        return 1.0 if role in self.held_whole else layout.share(role)

    def gradient_share(self, role: str, layout: Layout) -> float:
        """Return the share of the gradients of `role` that each GPU holds; 1 for roles in `held_whole`."""
        return 1.0 if role in self.held_whole else 1 / layout.shards


def resting(sizes: Sizes, layout: Layout) -> dict[str, float]:
    """Return the bytes that a GPU holds all the time, by the name of the part, such as "optimizer states"."""
    parts = {f"weights: {role}": size * sizes.share(role, layout) for role, size in sizes.networks.items()}
    return parts | {
        "tables of the networks": sum(size for role, size in sizes.buffers.items() if role not in layout.on_cpu),
        "optimizer states": sum(size * sizes.share(role, layout) for role, size in sizes.states.items()),
        "text encoders": 0.0 if sizes.text_rests else sizes.text,
        "image codec (VAE)": sizes.vae,
    }


def gathered(sizes: Sizes, layout: Layout) -> float:
    """Return the bytes of the weights and gradients that FSDP gathers at the same time; 0 if `layout` gathers none.

    FSDP gathers, in the compute dtype, the weights outside all blocks and the weights of two blocks, the current one
    and the next one. It also gathers the float32 gradients of two blocks.
    """
    if not layout.gathers:
        return 0.0
    return (sizes.outside_blocks + 2 * sizes.largest_block) * sizes.compute + 2 * sizes.largest_block * 4


def phase_peaks(sizes: Sizes, layout: Layout, batch: int, accumulate: int = 1) -> dict[str, float]:
    """Return the peak bytes on a GPU in each phase of an iteration, in addition to the bytes that `resting` returns.

    The phases are the rollout, each role's updates and the optimizer step. The encoding of prompts is a phase too if
    `sizes.text_rests` is True, and so is validation if `sizes.validation` is given. Gradients are included in the
    bytes. `batch` is the number of samples on the GPU, which computes them in `accumulate` parts, one after another.
    """
    part, repeated = at_once(batch, accumulate), accumulate > 1
    fixed = 0.0 if layout.gathers else 1.0  # autocast copies all weights; FSDP gathers single blocks instead
    peaks = {
        name: timeline.peak(part, sizes.gradient_share(name, layout), fixed, repeated) + gathered(sizes, layout)
        for name, timeline in sizes.phases.items()
    }
    peaks["optimizer step"] = max(  # a network's gradients are dropped before the next network's are computed
        sizes.gradient_share(role, layout) * (size + sizes.step_copies[role]) for role, size in sizes.trained.items()
    )
    if sizes.text_rests:
        peaks[TEXT] = sizes.text
    if sizes.validation is not None:
        rollout = sizes.phases.get("rollout")
        peaks[VALIDATION] = sizes.validation.peak(rollout, batch, fixed) + gathered(sizes, layout)
    return peaks


def total(sizes: Sizes, layout: Layout, batch: int, accumulate: int = 1) -> float:
    """Return the peak bytes of tensors on a GPU in training with `batch` samples.

    The GPU computes the samples in `accumulate` parts, one after another.
    """
    return sum(resting(sizes, layout).values()) + max(phase_peaks(sizes, layout, batch, accumulate).values())


def at_once(batch: int, accumulate: int) -> int:
    """Return the number of samples in the largest part of a batch that is computed in `accumulate` parts."""
    return -(-batch // accumulate)


def largest_batch(sizes: Sizes, layout: Layout, usable: float, accumulate: int = 1) -> int:
    """Return the largest number of samples for which a GPU needs at most `usable` bytes (see `total`); 0 if none fits.

    The result is a multiple of `accumulate`, the number of parts in which a batch is computed.
    """
    low, high = 0, accumulate  # both are always multiples of `accumulate`, so that all parts have the same size
    while high < MOST and total(sizes, layout, high, accumulate) <= usable:
        low, high = high, 2 * high
    while high - low > accumulate:
        middle = (low + high) // 2 // accumulate * accumulate
        low, high = (middle, high) if total(sizes, layout, middle, accumulate) <= usable else (low, middle)
    return low


def checkpoint_bytes(sizes: Sizes) -> float:
    """Return the bytes of a checkpoint, which holds trained networks, the student's EMA and optimizer states, but no teacher."""
    roles = [*sizes.trained, *(["student_ema"] if "student_ema" in sizes.networks else [])]
    networks = sum(sizes.networks[role] + sizes.buffers.get(role, 0) for role in roles)
    return networks + sum(sizes.states.values())
