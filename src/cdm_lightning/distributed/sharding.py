"""Shard networks over processes with FSDP2.

Each process holds some rows of each weight. The weights of a block are gathered while the block computes, and freed
afterwards. Weights are rounded to the compute dtype before they are sent, and gradients are summed in float32. Inputs
are cast by autocast, as in a run with one process. FSDP2 does not cast them, so timesteps stay float32.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cdm_lightning.core.ema import local
from cdm_lightning.distributed import ranks

NO_OFFLOAD = OffloadPolicy()


def host_memory(device: torch.device) -> OffloadPolicy:
    """Return FSDP2's policy for a network whose shards stay in host memory, and which computes on `device`.

    The memory is pinned if `device` is a CUDA GPU.
    """
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def mixed_precision(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Return FSDP2's policy that sends weights in `compute_dtype`, sums gradients in float32 and leaves inputs unchanged."""
    param_dtype = None if compute_dtype == torch.float32 else compute_dtype
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard(
    network: nn.Module,
    block_types: tuple[type[nn.Module], ...],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    whole: Set[nn.Parameter] = frozenset(),
    offload: OffloadPolicy = NO_OFFLOAD,
) -> None:
    """Shard a network over the processes of `mesh` with FSDP2, in place.

    Each submodule of a class in `block_types` is sharded separately. The parameters in `whole` stay unsharded. All
    others are gathered for a forward or backward pass and freed after it, so that between passes a process holds only
    its shards. `offload` can keep the shards in host memory (see `host_memory`).
    """
    if all(parameter in whole for parameter in network.parameters()):
        return
    options = {
        "mesh": mesh,
        "mp_policy": policy,
        "offload_policy": offload,
        "reshard_after_forward": True,
        "ignored_params": set(whole),
    }
    for block in [module for module in network.modules() if isinstance(module, block_types)]:
        fully_shard(block, **options)
    fully_shard(network, **options)


@torch.no_grad()
def fill(network: nn.Module, read_rows: Callable[[str, int, int], Tensor], device: torch.device) -> None:
    """Allocate memory on `device` for the meta-device weights of a sharded network, and fill it with their values.

    Each process reads only the rows in its shard: `read_rows(name, first, end)` returns the rows first, ..., end - 1 of
    the parameter `name`.
    """
    empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if not empty:
        return
    network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for name in empty:
        parameter = cast(DTensor, network.get_parameter(name))
        sizes, starts = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        local(parameter).copy_(read_rows(name, starts[0], starts[0] + sizes[0]))


# ---- reductions over processes; with one process, each function returns its argument


def average_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of unsharded parameters over all processes, in place.

    FSDP2 itself averages the gradients of sharded parameters.
    """
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if ranks.world_size() == 1 or not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= ranks.world_size()
    for gradient, summed in zip(gradients, together.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(summed.view_as(gradient))


def average_figures(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean over all processes of each 0-d tensor in `figures`, by name.

    All processes must call this with the same names. The tensors may be on different devices: the gradient norm of a
    network in host memory is on the CPU, losses are on the GPU. The means are on the GPU if one of the tensors is.
    """
    if ranks.world_size() == 1:
        return dict(figures)
    device = max((value.device for value in figures.values()), key=lambda device: device.type != "cpu")
    together = torch.stack([value.to(device, torch.float32) for value in figures.values()])
    dist.all_reduce(together)
    return dict(zip(figures, together / ranks.world_size()))


def put_together(network: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
    """Return an unsharded copy of a sharded network on the first process, in eval mode on the CPU.

    The first process calls `build()`, which must return an unsharded network of the same architecture, and copies the
    weights into that network. The other processes get None, but all processes must call `put_together`. A network
    without shards is returned unchanged, on every process.
    """
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return network
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ranks.rank():
        return None
    copy = build()
    copy.load_state_dict(state)
    return copy.eval()


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (DTensor) as a plain one. All processes must call this. A plain tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
