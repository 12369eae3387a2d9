"""Networks on a mesh of processes by FSDP2: who holds which rows, in what precision they travel, what is summed up.

A network's blocks are gathered one at a time, for as long as they compute. The weights that compute are rounded to the
compute dtype before they travel; gradients are summed in float32. Inputs are never cast here: autocast does that as it
does in one process, and timesteps stay float32.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cdm_lightning import ranks
from cdm_lightning.backbones.base import Backbone
from cdm_lightning.core.ema import local
from cdm_lightning.networks import Networks
from cdm_lightning.parallel import MeshStrategy

NO_OFFLOAD = OffloadPolicy()


def place(networks: Networks, backbone: Backbone, strategy: Strategy, compute_dtype: torch.dtype) -> bool:
    """Put all networks where `strategy` wants them, in place; whether several processes share one network's shards.

    UserError if the strategy names a network to rest in host memory that there is not.
    """
    if not isinstance(strategy, MeshStrategy):
        networks.place(strategy.root_device)
        return False
    strategy.check(tuple(networks.by_role), tuple(networks.whole))
    distribute(networks, backbone, strategy, compute_dtype)
    return strategy.shards > 1


def distribute(networks: Networks, backbone: Backbone, strategy: MeshStrategy, compute_dtype: torch.dtype) -> None:
    """Put all networks on the strategy's mesh, in place: each rank keeps its rows of each weight.

    Networks without weights are filled, each rank reading its rows alone. Adapters, and networks that the objective builds
    itself, are held whole by every rank; the base under adapters is sharded where there are shards.
    """
    mesh, device = strategy.device_mesh["data_parallel", "tensor_parallel"], strategy.root_device
    policy, block_types = mixed_precision(compute_dtype), backbone.block_types
    for role, network in networks.whole.items():
        rests = role in strategy.on_cpu
        shard(network, block_types, mesh, policy, offload=host_memory(device) if rests else NO_OFFLOAD)
        fill(network, backbone.read_rows, torch.device("cpu") if rests else device)
    if networks.base is not None and strategy.shards > 1:
        adapters = {parameter for parameter in networks.parameters() if not isinstance(parameter, DTensor)}
        shard(networks.base, block_types, mesh, policy, adapters)
        networks.view_base()
    for network in (*networks.children(), *networks.unregistered):
        if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
            network.to(device)


def host_memory(device: torch.device) -> OffloadPolicy:
    """Shards rest in host memory, pinned where there is a device to copy them to."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def mixed_precision(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights travel in the compute dtype unless it is float32, gradients are summed in float32, inputs stay as they are."""
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
    """Shard a network in place, its blocks each for itself; parameters in `whole` are left alone.

    Parameters outside blocks are resharded after the forward pass as well: weights at rest are always shards.
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
    """Give the weights that are on the meta device memory on `device`, and this rank's rows of `read_rows(name, first, end)`."""
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


# ---- sums over processes; in one process all of them return what they are given


def average_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over all processes the gradients of parameters that each holds whole (those of shards FSDP2 has averaged)."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if ranks.world_size() == 1 or not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= ranks.world_size()
    for gradient, summed in zip(gradients, together.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(summed.view_as(gradient))


def average_figures(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over all processes of 0-d figures, which all processes name alike, on the device if some lie there.

    The gradient norm of a network that rests in host memory lies there too, beside losses on the device.
    """
    if ranks.world_size() == 1:
        return dict(figures)
    device = max((value.device for value in figures.values()), key=lambda device: device.type != "cpu")
    together = torch.stack([value.to(device, torch.float32) for value in figures.values()])
    dist.all_reduce(together)
    return dict(zip(figures, together / ranks.world_size()))


def put_together(network: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
    """A whole copy of a sharded network on the first process's CPU, into what `build` returns there; None on the others.

    All processes must ask. A network that is whole already is returned as it is.
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
    """A tensor of which each rank may hold a part, put together; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
