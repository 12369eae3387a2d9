"""What the benchmarks run: shapes of networks, batches and rollouts, without anything that must be imported first."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """A family's network (`network`: arguments of its class, random weights; None: the bundled pipeline) and how it is run.

    `text` are the shapes of one prompt's conditioning, drawn at random; None: the bundled pipeline's text encoders, which the
    authors' order runs in every iteration. `side` is that of a square latent. `cycles` is how often each order runs
    the objective's `student_every` iterations.
    """

    family: str = "sd3"
    network: dict[str, Any] | None = None
    text: dict[str, tuple[int, ...]] | None = None
    batch: int = 8
    longest_rollout: int = 28
    cycles: int = 8
    side: int = 16
    compute_dtype: str = "float32"
    teacher_dtype: str = "float32"
    gradient_checkpointing: bool = False  # of all blocks, in both orders; but for `recompute`
    device: str = "cpu"
    compile_backend: str | None = None  # of the blocks, in our order only: the authors' runs them as they are
    recompute: float | None = (
        None  # the share of the blocks that our order checkpoints, if it is not that of the authors'
    )
    recompute_attention: bool = True  # in our order
    accumulate: int = 1  # parts of our order's batch
    rollouts_together: int = 2  # in our order: iterations whose rollouts walk as one batch
    notes: tuple[str, ...] = field(default_factory=tuple)


SMALL = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "caption_projection_dim": 256,
    "joint_attention_dim": 64,  # that of the bundled text encoders
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}
SD3_MEDIUM = {  # the published configuration of stabilityai/stable-diffusion-3-medium-diffusers
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
LONGCAT = {"num_layers": 10, "num_single_layers": 20, "joint_attention_dim": 3584, "pooled_projection_dim": 3584}
LONGCAT_QUARTER = LONGCAT | {"num_layers": 3, "num_single_layers": 5}  # 8 of the 30 blocks, at full width
SD3_TOY = {  # SD3's classes in seconds on a CPU, for rehearsals
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}
LONGCAT_TOY = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 6, 6],
}
GPU = {"compute_dtype": "bfloat16", "teacher_dtype": "bfloat16", "gradient_checkpointing": True, "device": "cuda"}

SIZES = {
    "tiny": Size(batch=16, cycles=6),
    "small": Size(network=SMALL, batch=16, cycles=4),
    "sd3_medium": Size(
        network=SD3_MEDIUM,
        text={"prompt_embeds": (333, 4096), "pooled": (2048,)},
        batch=16,
        cycles=4,
        side=128,
        **GPU,
    ),
    "longcat": Size(
        "longcat",
        network=LONGCAT,
        text={"prompt_embeds": (512, 3584)},
        batch=4,
        cycles=4,
        side=128,
        **GPU,
    ),
    "sd3_toy": Size(
        network=SD3_TOY,
        text={"prompt_embeds": (6, 32), "pooled": (16,)},
        batch=2,
        cycles=2,
        longest_rollout=3,
        side=8,
        gradient_checkpointing=True,
    ),
    "longcat_toy": Size(
        "longcat",
        network=LONGCAT_TOY,
        text={"prompt_embeds": (6, 32)},
        batch=2,
        cycles=2,
        longest_rollout=3,
        side=8,
        gradient_checkpointing=True,
    ),
}
SIZES["longcat_quarter"] = replace(SIZES["longcat"], network=LONGCAT_QUARTER)
