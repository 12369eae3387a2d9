"""Fuse a LoRA adapter into its base: add it to the weights, which gives a plain network without modules of peft."""

import torch
from torch import nn

from cdm_lightning.lora.shared import adapter_parameters, inject, tuner_layers
from cdm_lightning.lora.weights import AdapterWeights

ROLE = "fused"


def fuse(weights: AdapterWeights, network: nn.Module) -> nn.Module:
    """Add the adapter to the weights of `network`, in place, and return `network` in eval mode.

    Each target weight W becomes W + scale B A. With DoRA, the rows of this sum are also scaled to the lengths that were
    trained. `network` must be a float32 copy of the network on which the adapter was trained. All its parameters
    require gradients afterwards. Raises KeyError if `weights` lacks a tensor of the adapter.
    """
    layer_names = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in weights.tensors))
    inject(network, ROLE, weights.adapter, layer_names)
    layers = tuner_layers(network)
    for name, parameter in adapter_parameters(layers, ROLE).items():
        parameter.data = weights.tensors[name].detach().to(parameter.device, torch.float32)
    for name, layer in layers.items():
        layer.merge(adapter_names=[ROLE])
        network.set_submodule(name, layer.get_base_layer())
    del network.peft_config
    return network.requires_grad_(True).eval()
