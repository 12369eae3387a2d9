"""Collect the tensors and plain values of networks and optimizers for a checkpoint, and load them from a checkpoint.

The tensors are the run's own tensors, whole or sharded. They are written without a copy, and reading a checkpoint
overwrites them in place.
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
AVERAGE = "networks.student_ema."


def tensors_of(networks: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """Return {name: tensor} for the tensors of all networks and of all optimizer states. The tensors are not copied.

    Names look like "networks.student.LAYER.weight" and "optimizers.student.LAYER.weight.exp_avg". The keys of
    `optimizers` are names of networks in `networks`.
    """
    found = {f"networks.{name}": value for name, value in networks.state_dict().items()}
    for role, optimizer in optimizers.items():
        for name, state in states_of(getattr(networks, role), optimizer).items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    found |= plain_tensors(f"optimizers.{role}.{name}.{key}", value)
    return found


def plain_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return {`name`: `value`}, or the inner tensors of `value` if it is a quantized optimizer state of torchao.

    Inner tensors are ordinary tensors, which a safetensors file can store. Their names begin with `name`, as in
    "NAME.codes" and "NAME.scale". The codes have the shape of the parameter, and each number of the scale is the factor
    for a block of consecutive codes. Both are sharded like the parameter.
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
    """Return the states and options of the optimizers that are numbers or booleans, to be stored in state.json.

    The result is {network: {"states": {parameter: {key: value}}, "options": [...]}}. "options" is a list with a dict
    for each parameter group. The dict holds the group's options that differ from the optimizer's defaults, except the
    learning rate.
    """
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
    """Return the entries of `values` whose values are numbers or booleans."""
    return {key: value for key, value in values.items() if isinstance(value, PLAIN)}


def states_of(network: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return {name of a parameter: the optimizer's state for it}. Parameters without a state are left out."""
    return {name: optimizer.state[p] for name, p in network.named_parameters() if optimizer.state.get(p)}


def restore(networks: nn.Module, optimizers: Mapping[str, Optimizer], stored: StoredCheckpoint) -> None:
    """Load a checkpoint into networks and optimizers, in place.

    Raises `UserError` if the checkpoint's tensors have other names or shapes than those of the run. The EMA is an
    exception: if only the run has an EMA, it starts as a copy of the student, and if only the checkpoint has an EMA,
    the checkpoint's EMA is ignored.
    """
    for role, optimizer in optimizers.items():
        prefix = f"optimizers.{role}."
        names = [name.removeprefix(prefix) for name in stored.sizes if name.startswith(prefix)]
        begin_states(getattr(networks, role), optimizer, names)
    tensors = tensors_of(networks, optimizers)
    differing = (tensors.keys() ^ stored.sizes.keys()) - unmatched_average(tensors, stored)
    both = tensors.keys() & stored.sizes.keys()
    differing |= {name for name in both if tensors[name].shape != stored.sizes[name][0]}
    differing |= {name for name in both if tensors[name].is_floating_point() != stored.sizes[name][1].is_floating_point}
    if differing:
        raise UserError(
            f"{stored.path}: the tensor {min(differing)} does not fit the networks of this configuration; restore the "
            "configuration, or set another run_name"
        )
    stored.fill({name: value for name, value in tensors.items() if name in both})
    if average := unmatched_average(tensors, stored) & tensors.keys():
        begin_average(networks, average)
    for role, optimizer in optimizers.items():
        plain = stored.record["optimizers"][role]
        states = states_of(getattr(networks, role), optimizer)
        for name, values in plain["states"].items():
            states[name].update(values)
        for group, values in zip(optimizer.param_groups, plain["options"]):
            group.update(values)


def unmatched_average(tensors: Mapping[str, Tensor], stored: StoredCheckpoint) -> set[str]:
    """Return the names of the EMA's tensors if only the run or only the checkpoint has an EMA, otherwise an empty set.

    `tensors` holds the tensors of the run by name, and `stored` is the checkpoint.
    """
    here, there = ({name for name in names if name.startswith(AVERAGE)} for names in (tensors, stored.sizes))
    return here ^ there if not here or not there else set()


def begin_average(networks: nn.Module, names: set[str]) -> None:
    """Copy the student's weights to the EMA's tensors `names`, such as "networks.student_ema.LAYER.weight".

    The EMA of a run starts in this way if the checkpoint has no EMA.
    """
    state = networks.state_dict()
    with torch.no_grad():
        for name in (name.removeprefix("networks.") for name in names):
            state[name].copy_(state["student." + name.removeprefix("student_ema.")])


def begin_states(network: nn.Module, optimizer: Optimizer, names: list[str]) -> None:
    """Make the optimizer create its states, so that a checkpoint can be read into them.

    `names` are the states in the checkpoint, such as "LAYER.weight.exp_avg". Only the optimizer knows the shapes of its
    states. It therefore creates them itself, in a step with zero gradients and a learning rate of zero. A parameter
    without a state in `names` gets no state.
    """
    if not names:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0  # the product keeps the type: a number or a tensor
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    known = {name.rpartition(".")[0] for name in names}
    known |= {name.rpartition(".")[0] for name in known}  # the names of a quantized state's parts have one more level
    for name, parameter in network.named_parameters():
        if name not in known:
            optimizer.state.pop(parameter, None)
