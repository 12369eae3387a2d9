"""What of networks and optimizers a checkpoint holds, as named tensors and plain values.

The tensors are the live ones, whole or sharded: nothing is copied before it is written, and reading fills them in place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cdm_lightning.checkpoint.stored import StoredCheckpoint
from cdm_lightning.errors import UserError

PLAIN = (bool, int, float)


def tensors_of(networks: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """All tensors by name: "networks.student.LAYER.weight", "optimizers.student.LAYER.weight.exp_avg", ...

    `optimizers` has the names of the networks that they train.
    """
    found = {f"networks.{name}": value for name, value in networks.state_dict().items()}
    for role, optimizer in optimizers.items():
        for name, state in states_of(getattr(networks, role), optimizer).items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    found |= plain_tensors(f"optimizers.{role}.{name}.{key}", value)
    return found


def plain_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """`value`, or for one of torchao's quantized states the tensors it is made of, sharing its memory.

    Codes have the shape of the parameter and a scale stands for a block of them in a row, so both are cut as it is.
    """
    local = value.to_local() if isinstance(value, DTensor) else value
    if not hasattr(local, "__tensor_flatten__"):
        return {name: value}
    found = {}
    for part in local.__tensor_flatten__()[0]:
        tensor = getattr(local, part)
        if isinstance(value, DTensor) and part in ("codes", "scale"):
            shape = value.shape if part == "codes" else (value.numel() * tensor.numel() // local.numel(),)
            stride = value.stride() if part == "codes" else (1,)
            tensor = DTensor.from_local(
                tensor, value.device_mesh, value.placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
        found[f"{name}.{part}"] = tensor
    return found


def plain_values_of(networks: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """What optimizers keep that is no tensor: states, and options that they have changed themselves."""
    found: dict[str, Any] = {}
    for role, optimizer in optimizers.items():
        states = states_of(getattr(networks, role), optimizer)
        found[role] = {
            "states": {name: plain for name, state in states.items() if (plain := only_plain(state))},
            "options": [
                {key: value for key, value in only_plain(group).items() if value != optimizer.defaults.get(key)}
                for group in ({**group, "lr": None} for group in optimizer.param_groups)
            ],
        }
    return found


def only_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and truth values alone."""
    return {key: value for key, value in values.items() if isinstance(value, PLAIN)}


def states_of(network: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state of each parameter that has one, by the parameter's name."""
    return {name: optimizer.state[p] for name, p in network.named_parameters() if optimizer.state.get(p)}


def restore(networks: nn.Module, optimizers: Mapping[str, Optimizer], stored: StoredCheckpoint) -> None:
    """Fill networks and optimizers from a checkpoint; UserError if it holds other tensors than they have."""
    for role, optimizer in optimizers.items():
        prefix = f"optimizers.{role}."
        names = [name.removeprefix(prefix) for name in stored.sizes if name.startswith(prefix)]
        begin_states(getattr(networks, role), optimizer, names)
    tensors = tensors_of(networks, optimizers)
    differing = tensors.keys() ^ stored.sizes.keys()
    differing |= {name for name in tensors.keys() - differing if tensors[name].shape != stored.sizes[name][0]}
    if differing:
        raise UserError(f"{stored.path}: its tensors are not those of this configuration ({min(differing)} differs)")
    stored.fill(tensors)
    for role, optimizer in optimizers.items():
        plain = stored.record["optimizers"][role]
        states = states_of(getattr(networks, role), optimizer)
        for name, values in plain["states"].items():
            states[name].update(values)
        for group, values in zip(optimizer.param_groups, plain["options"]):
            group.update(values)


def begin_states(network: nn.Module, optimizer: Optimizer, names: list[str]) -> None:
    """Let the optimizer make the states that a checkpoint has (`names`: parameter and key), to be filled afterwards.

    Only the optimizer knows how it lays them out, so it makes a step without gradient and at rate zero.
    """
    if not names:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0  # a number or a tensor
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    known = {name.rpartition(".")[0] for name in names}
    known |= {name.rpartition(".")[0] for name in known}  # a quantized state's parts have one more name
    for name, parameter in network.named_parameters():
        if name not in known:
            optimizer.state.pop(parameter, None)
