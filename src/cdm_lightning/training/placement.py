"""Put the networks of a run on one device, or distribute them over the devices of several processes."""

import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed.tensor import DTensor

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.distributed.sharding import NO_OFFLOAD, fill, host_memory, mixed_precision, shard
from cdm_lightning.distributed.strategy import MeshStrategy
from cdm_lightning.training.networks import Networks


def place(networks: Networks, backbone: Backbone, strategy: Strategy, compute_dtype: torch.dtype) -> bool:
    """Put all networks on the devices of `strategy`, in place, and return whether the networks are sharded.

    The strategy names the roles whose networks stay in host memory. Raises UserError for a role that the run does not
    have, and for a network that cannot stay in host memory.
    """
    if not isinstance(strategy, MeshStrategy):
        networks.place(strategy.root_device)
        return False
    strategy.check(tuple(networks.by_role), tuple(networks.whole))
    distribute(networks, backbone, strategy, compute_dtype)
    return strategy.shards > 1


def distribute(networks: Networks, backbone: Backbone, strategy: MeshStrategy, compute_dtype: torch.dtype) -> None:
    """Distribute all networks over the strategy's device mesh, in place.

    A network with its own copy of the pretrained weights is sharded: each rank keeps its own rows of each weight. If
    such a network is on the meta device, each rank reads its own rows only. The base of LoRA adapters is sharded too if
    the strategy uses shards. Adapters and heads are small, so each rank keeps them whole. (Heads are networks that the
    objective builds itself.)
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
