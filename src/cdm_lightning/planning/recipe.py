"""Compute what a plan needs to know of a `CDMModule`: the bytes of its parts and the work of an iteration."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from cdm_lightning.backbones.pipeline_settings import PipelineSettings
from cdm_lightning.core.schedules import SigmaSchedule
from cdm_lightning.errors import UserError
from cdm_lightning.lora.views import BaseView, RoleView
from cdm_lightning.module import CDMModule
from cdm_lightning.planning.memory import Sizes
from cdm_lightning.planning.skeleton import FrozenParts, hollow, text_bytes, to_mode
from cdm_lightning.planning.step import Step, every_network, trace_step
from cdm_lightning.planning.work import Work, expected_calls
from cdm_lightning.training.networks import Networks, trainable
from cdm_lightning.training.optim import OptimizerRecipe

BASE = "base of the adapters"
PROBE_WEIGHTS = (256, 256)  # the shape of the weight with which an optimizer's bytes are measured


@dataclass(frozen=True)
class Recipe:
    """The facts about a run that do not depend on the GPUs: the bytes of its parts, and the work for one sample.

    `parameters` holds the numbers of parameters of the transformer, of each text encoder and of the image codec
    ("vae"), by name. `source` says where the architecture comes from. For a pipeline in a local folder it is the path
    of the folder. For a pipeline whose architecture is part of this package, it is a note on the architecture's origin.
    """

    sizes: Sizes
    work: Work
    parameters: dict[str, int]
    source: str


def read_recipe(module: CDMModule, text_cached: bool) -> Recipe:
    """Return the recipe of `module`, by running an iteration on fake tensors, which have shapes but no contents.

    With `text_cached=True` the text encoders are not counted, because a run with a text cache loads none. Raises
    UserError for a model family that cannot be planned, for an unknown architecture, and for a schedule without a mean
    number of steps.
    """
    return traced_recipe(module, hollow(module.backbone), text_cached)


def traced_recipe(module: CDMModule, frozen: FrozenParts, text_cached: bool) -> Recipe:
    """Return the recipe of `module`, whose backbone builds its networks without weights (see `skeleton.hollow`).

    `frozen` are the sizes of the backbone's frozen parts. With `text_cached=True` the text encoders are not counted.
    """
    backbone, mode = module.backbone, FakeTensorMode()
    with torch.device("meta"):  # for the adapters too
        networks = Networks(
            backbone,
            module.objective.roles,
            module.compute.recomputation,
            module.lora,
            module.seed,
            average=module.ema.is_on,
        )
    roots = every_network(networks)
    to_mode([*roots, *(view.shared.network for view in roots if isinstance(view, RoleView))], mode)
    step = trace_step(module, networks, mode)
    text = 0 if text_cached else text_bytes(frozen, cast(PipelineSettings, backbone).text_dtype)
    return Recipe(
        sizes=_sizes(module, networks, step, text, 4 * frozen.vae),
        work=_work(module, step),
        parameters={"transformer": _count(networks.teacher.parameters()), **frozen.text, "vae": frozen.vae},
        source=frozen.source,
    )


def _sizes(module: CDMModule, networks: Networks, step: Step, text: float, vae: float) -> Sizes:
    weights = {role: _bytes(network.parameters()) for role, network in networks.by_role.items()}
    base, teacher = networks.unregistered[0], networks.teacher
    if {id(p) for p in base.parameters()} != {id(p) for p in teacher.parameters()}:
        weights[BASE] = _bytes(base.parameters())
    kept = {role: optimizer_bytes(recipe) for role, recipe in module.updates.recipes.items()}
    trained = {role: _bytes(trainable(network)) for role, network in networks.trained.items()}
    blocks = [m for m in every_network(networks)[-1].modules() if isinstance(m, module.backbone.block_types)]
    largest = max((_count(block.parameters()) for block in blocks), default=0)
    return Sizes(
        networks=weights,
        trained=trained,
        held_whole=frozenset(networks.by_role) - frozenset(networks.whole) - {"teacher"},
        buffers=_buffers(networks),
        states={role: kept[role][0] * size / 4 for role, size in trained.items()},
        step_copies={role: kept[role][1] * size / 4 for role, size in trained.items()},
        text=text,
        vae=vae,
        largest_block=largest,
        outside_blocks=_count(teacher.parameters()) - sum(_count(block.parameters()) for block in blocks),
        compute=module.compute_dtype.itemsize,
        phases={"rollout": step.rollout.memory, **{role: phase.memory for role, phase in step.updates.items()}},
    )


def _work(module: CDMModule, step: Step) -> Work:
    calls = expected_calls(mean_length(module.schedule), module.objective.rollout)
    return Work(calls, calls * step.rollout.flops, {role: phase.flops for role, phase in step.updates.items()})


def mean_length(schedule: SigmaSchedule) -> float:
    """Return the expected number of steps of the schedule's rollouts.

    Raises UserError if the schedule does not have the property `mean_length`.
    """
    try:
        return float(schedule.mean_length)
    except AttributeError as error:
        raise UserError(
            f"schedule: {type(schedule).__name__} lacks the property mean_length (expected number of steps); add it"
        ) from error


def optimizer_bytes(recipe: OptimizerRecipe) -> tuple[float, float]:
    """Return an optimizer's bytes for each trained weight: the bytes of its state, and further bytes during a step.

    The bytes of the state are measured by a step on a small weight. During a step, torch's optimizers by default update
    all weights on a GPU together (the option `foreach`). For this they hold one more float32 copy of the weights.
    """
    weight = nn.Parameter(torch.zeros(PROBE_WEIGHTS))
    optimizer = recipe.build([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(map(_stored, states)) / weight.numel(), 4.0 if _steps_together(optimizer) else 0.0


def _steps_together(optimizer: Optimizer) -> bool:
    group = optimizer.param_groups[0]
    return "foreach" in group and group["foreach"] is not False and not group.get("fused")


def _stored(value: Tensor) -> int:
    """Return the bytes of a tensor. For a quantized one these are the bytes of its inner tensors."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(_stored(getattr(value, name)) for name in names)
    return value.numel() * value.element_size()


def _buffers(networks: Networks) -> dict[str, int]:
    """Return the bytes of each network's buffers. Those of a shared base count once, for the teacher."""
    seen, sizes = set(), {}
    for role, network in {**networks.by_role, BASE: networks.unregistered[0]}.items():
        holder = network.shared.network if isinstance(network, BaseView) else network
        new = [buffer for buffer in holder.buffers() if id(buffer) not in seen]
        seen |= {id(buffer) for buffer in new}
        sizes[role] = sum(buffer.numel() * buffer.element_size() for buffer in new)
    return sizes


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
