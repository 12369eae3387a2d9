"""One frozen network with several LoRA adapters of peft, one for each role (trained network).

At most one adapter is on. peft's own switches (`set_adapter`, `disable_adapters`) also change `requires_grad`, so they
would freeze an optimizer's parameters whenever another role runs. `SharedBase.running` changes only attributes that
peft's layers read in the forward pass.
"""

import math
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cdm_lightning.core.rng import stream
from cdm_lightning.errors import UserError
from cdm_lightning.lora.plan import Adapter, Presets
from cdm_lightning.lora.views import AdapterView, BaseView

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class SharedBase:
    """A frozen network, the base, with a LoRA adapter for each role, so that several trained networks share its memory.

    `view(role)` returns a module that runs the base with this role's adapter. While no such module runs, all adapters
    are off. The base is set to eval mode and keeps its dtype; adapters are float32.

    A LoRA adds B A to a weight. B starts at zero, so every role starts equal to the base. A starts with uniform random
    numbers, as in peft. They depend only on `seed` and the layer, so all roles start with the same A. An objective may
    average the A and the B of two roles. This also averages B A, as long as both roles have the same A. Raises
    UserError for targets that `network` lacks.
    """

    def __init__(self, network: nn.Module, adapters: Mapping[str, Adapter], presets: Presets, seed: int) -> None:
        self.network = network.requires_grad_(False).eval()
        self.dtype = next(p.dtype for p in network.parameters() if p.is_floating_point())
        self._adapters = dict(adapters)
        own = dict(network.named_parameters())
        targets = {role: target_layers(network, adapter, presets) for role, adapter in adapters.items()}
        for role, adapter in adapters.items():
            inject(network, role, adapter, targets[role])
        self.layers = tuner_layers(network)
        places = {parameter: place for place, parameter in network.named_parameters()}
        self._place_of = {
            name: places[parameter] for name, parameter in own.items()
        }  # peft has renamed some parameters
        for role in adapters:
            self._start(role, seed)
        self._role: str | None = None
        self._switch(None)

    def view(self, role: str) -> AdapterView:
        """Return a network that runs the base with the adapter of `role`. Its parameters are those of the adapter only."""
        return AdapterView(self, role, adapter_parameters(self.layers, role), self._adapters[role])

    def base_view(self) -> BaseView:
        """Return a network that runs the base with all adapters off. Call this again after sharding, which replaces parameters."""
        return BaseView(self, {name: self.network.get_parameter(place) for name, place in self._place_of.items()})

    @contextmanager
    def running(self, role: str | None) -> Generator[None]:
        """Turn on the adapter of `role` inside the `with` block, or turn all adapters off if `role` is None.

        After the block, the earlier state is restored.
        """
        before = self._role
        self._switch(role)
        try:
            yield
        finally:
            self._switch(before)

    def with_its_adapter(self, block: nn.Module) -> Callable[..., Any]:
        """Return a function that runs `block`, a module of the base, always with the same adapter.

        This is the adapter that is on when `with_its_adapter` is called. Gradient checkpointing needs the function,
        because checkpointing runs blocks again in the backward pass. At that time another adapter or none may be on,
        and the gradients would be wrong without an error.
        """
        return partial(self._rerun, self._role, block)

    def _rerun(self, role: str | None, block: nn.Module, *args: Any) -> Any:
        with self.running(role):
            return block(*args)

    def _switch(self, role: str | None) -> None:
        # peft casts an adapter's input to float32, and autocast casts it back: slower, with the same numbers
        device = next(self.network.parameters()).device.type
        casts = device == "meta" or not torch.is_autocast_enabled(
            device
        )  # the planner builds on meta, which has no autocast
        for layer in self.layers.values():
            layer._disable_adapters = role is None
            layer.cast_input_dtype_enabled = (
                casts or len(layer.lora_magnitude_vector) > 0
            )  # DoRA computes with the input's dtype
            if role is not None:
                layer._active_adapter = [role]  # a layer that has no such adapter computes like the base
        self._role = role

    @torch.no_grad()
    def _start(self, role: str, seed: int) -> None:
        for name, layer in self.layers.items():
            if role not in layer.lora_A:
                continue
            a, b = (cast(nn.Linear, pair[role].float()).weight for pair in (layer.lora_A, layer.lora_B))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=stream(seed, f"lora {name}"))  # as peft does
            b.zero_()
            if role in layer.lora_magnitude_vector:  # computed again: peft rounded it to the base's dtype
                weight = cast(Tensor, layer.get_base_layer().weight)
                magnitude = cast(nn.Parameter, layer.lora_magnitude_vector[role].float().weight)
                magnitude.copy_(weight.float().norm(dim=1))
        for parameter in adapter_parameters(self.layers, role).values():
            parameter.requires_grad_(True)


def target_layers(network: nn.Module, adapter: Adapter, presets: Presets) -> list[str]:
    """Return the names of the linear layers of `network` whose names end in one of the adapter's target endings.

    Raises UserError if there is none, or if `adapter.targets` is a list with an ending that fits no layer. In a preset, some
    endings may fit no layer.
    """
    endings = adapter.endings(presets)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    found = {ending: [name for name in linear if f".{name}".endswith(f".{ending}")] for ending in endings}
    absent = [ending for ending, names in found.items() if not names]
    if absent and (len(absent) == len(endings) or not isinstance(adapter.targets, str)):
        raise UserError(
            f"lora.ROLE.targets: no linear layer of {type(network).__name__} has a name ending in {', '.join(absent)} "
            "(ROLE is a trained network such as student); correct or remove these endings"
        )
    chosen = {name for names in found.values() for name in names}
    return [name for name in linear if name in chosen]


def adapter_shapes(network: nn.Module, adapter: Adapter, presets: Presets) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Return the shape of each tensor of an adapter of `network`, as a dict {name: (shape, True)}.

    The names are those of `adapter_parameters`. True says that the tensor is floating-point, as all tensors of an
    adapter are. `network` may be on the meta device. Raises UserError for targets that `network` lacks.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in target_layers(network, adapter, presets):
        layer = cast(nn.Linear, network.get_submodule(name))
        found[f"{name}.lora_A.weight"] = (adapter.rank, layer.in_features)
        found[f"{name}.lora_B.weight"] = (layer.out_features, adapter.rank)
        if adapter.use_dora:
            found[f"{name}.lora_magnitude_vector.weight"] = (layer.out_features,)
    return {name: (shape, True) for name, shape in found.items()}


def inject(network: nn.Module, role: str, adapter: Adapter, layers: Sequence[str]) -> None:
    """Add a new peft adapter named `role` to the linear layers `layers` of `network`, in place."""
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyrefly: ignore[bad-argument-type]  peft accepts any number
        target_modules="|".join(map(re.escape, layers)),  # peft matches a string with whole names, a list with endings
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft also draws an initialization
        warnings.filterwarnings("ignore", ".*Already found a `peft_config`.*")  # several adapters are intended
        inject_adapter_in_model(config, network, role)


def tuner_layers(network: nn.Module) -> "dict[str, LoraLayer]":
    """Return the layers that peft has put in place of linear layers, by name."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    return cast("dict[str, LoraLayer]", found)


def adapter_parameters(layers: "Mapping[str, LoraLayer]", role: str) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapter `role` by name: "LAYER.lora_A.weight" (rank, in), "LAYER.lora_B.weight" (out, rank).

    With DoRA there is also "LAYER.lora_magnitude_vector.weight" (out,). `layers` is the result of `tuner_layers`.
    """
    return {
        f"{name}.{kind}.{key}": parameter
        for name, layer in layers.items()
        for kind in dict.fromkeys(layer.adapter_layer_names)
        if role in getattr(layer, kind)
        for key, parameter in getattr(layer, kind)[role].named_parameters()
    }
