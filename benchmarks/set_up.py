"""Modules to be timed: the real `CDMModule` with its optimizers, on networks of any size with random weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.sizes import Size
from cdm_lightning.backbones.base import Backbone, Conditioning
from cdm_lightning.backbones.longcat import LongCatBackbone
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.config import asset_path
from cdm_lightning.core.lengths import UniformLength
from cdm_lightning.core.rng import stream
from cdm_lightning.core.schedules import RandomSchedule
from cdm_lightning.data.batches import PromptBatch
from cdm_lightning.data.prompts import PromptFile
from cdm_lightning.data.text_memory import RememberedText
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.training.compute import Compute
from cdm_lightning.training.ema import EMA
from cdm_lightning.training.networks import Networks
from cdm_lightning.training.optim import LearningRate, OptimizerRecipe

VAE_OF_FACTOR_8 = {"block_out_channels": [1, 1, 1, 1]}
PROMPTS = 64  # distinct ones


@dataclass(frozen=True)
class Bare:
    """An optimizer as Lightning would wrap it, with nothing around it."""

    optimizer: Optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def build_backbone(size: Size) -> Backbone:
    """The family with a random network of this size (weights a function of nothing but the size)."""
    dtypes = {"teacher_dtype": size.teacher_dtype}
    if size.family == "longcat":
        backbone = LongCatBackbone(asset_path("tiny_sd3"), **dtypes)
        backbone.shared |= {"scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)}
        backbone.shared |= {"vae_config": VAE_OF_FACTOR_8, "network_config": {"in_channels": 64, **size.network}}
        backbone.height = backbone.width = size.side * backbone.vae_factor
    else:
        backbone = SD3Backbone(asset_path("tiny_sd3"), compact_text=8 if size.text is None else None, **dtypes)
        if size.network is not None:
            backbone.shared |= {"network_config": {**size.network, "sample_size": size.side}}
    if size.network is not None:
        backbone._load_pretrained = partial(random_network, backbone, size.device)
    if size.text is not None:
        backbone.setup = lambda device: None
        backbone.encode_prompts = lambda prompts: random_text(size.text, prompts, size.device)
    return backbone


def random_network(backbone: Backbone, device: str, dtype: torch.dtype) -> nn.Module:
    """The transformer with the random start of its class, alike at each call; on a GPU it is drawn there, in seconds."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return backbone.transformer_class(**backbone.network_config).to(dtype)


def random_text(shapes: dict[str, tuple[int, ...]], prompts: Sequence[str], device: str) -> Conditioning:
    """Normal conditioning of B prompts, as a cache of text embeddings would give it."""
    return {
        name: torch.stack([_row(prompt, name, shape, device) for prompt in prompts]) for name, shape in shapes.items()
    }


@cache
def _row(prompt: str, name: str, shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randn(shape, generator=stream(0, f"{name} of {prompt}")).to(device)


def compute_of(size: Size) -> Compute:
    """The options of memory and speed that our order has at this size."""
    return Compute(
        gradient_checkpointing=size.gradient_checkpointing if size.recompute is None else size.recompute,
        recompute_attention=size.recompute_attention,
        accumulate=size.accumulate,
        rollouts_together=size.rollouts_together,
    )


def module_of(size: Size) -> CDMModule:
    """The module with the published recipe on a backbone of this size, without networks."""
    objective = CDMObjective()
    adamw = partial(AdamW, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, fused=True)
    rates = {"student": 1e-5, **{role.name: 5e-6 for role in objective.roles}}
    return CDMModule(
        build_backbone(size),
        objective,
        RandomSchedule(UniformLength(1, size.longest_rollout)),
        {role: OptimizerRecipe(adamw, LearningRate(rate)) for role, rate in rates.items()},
        compute_dtype=size.compute_dtype,
        ema=EMA(),
        compute=compute_of(size),
    )


def build_module(size: Size) -> CDMModule:
    """The module of this size with its networks, ready for `training_step` without a `Trainer`."""
    module = module_of(size)
    build_networks(module, torch.device(size.device))
    if size.text is None:  # as `train` does for few prompts
        module.backbone.use_text_memory(RememberedText(module.backbone.encode_prompts, prompts(), 10**9))
    return module


def build_networks(module: CDMModule, device: torch.device) -> None:
    """What a `Trainer` would have the module build on `device`: networks, frozen parts, rollouts."""
    module.networks = Networks(
        module.backbone,
        module.objective.roles,
        module.compute.recomputation,
        module.lora,
        module.seed,
        average=module.ema.is_on,
    ).to(device)
    module.networks.place(device)
    module.to(device)
    module.backbone.setup(device)
    module.rollouts = module.make_rollouts(device)


def attach(module: CDMModule, wrap: Callable[[Optimizer], Any] = Bare, optimizers: Sequence[Optimizer] = ()) -> None:
    """Put a stand-in for a `Trainer` under the module that does what Lightning's strategy does, and nothing else."""
    wrapped = [wrap(optimizer) for optimizer in optimizers or module.configure_optimizers()]
    strategy = SimpleNamespace(
        backward=lambda loss, optimizer, *args, **kwargs: loss.backward(*args, **kwargs),
        _lightning_optimizers=wrapped,
    )
    module._trainer = SimpleNamespace(strategy=strategy, log_every_n_steps=10**9, world_size=1, global_rank=0)


def batch(number: int, size: int, group: range = range(0)) -> PromptBatch:
    """Batch `number` of `size` bundled captions; if it is the first of a `group`, with all of that."""
    texts = prompts()
    chosen = [texts[(number * size + slot) % len(texts)] for slot in range(size)]
    whole_group = tuple(batch(one, size) for one in group) if number in group[:1] and len(group) > 1 else ()
    return PromptBatch(chosen, torch.arange(size), group=whole_group)


@cache
def prompts() -> list[str]:
    """Some bundled captions."""
    file = PromptFile(asset_path("prompts/shapes_train.txt"))
    return list(dict.fromkeys(file[number] for number in range(4 * PROMPTS)))[:PROMPTS]
