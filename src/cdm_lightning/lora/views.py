"""One role on a shared base as a network of its own: what optimizers, averages, checkpoints and samplers are given."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cdm_lightning.lora.plan import Adapter

if TYPE_CHECKING:  # peft takes seconds to import, and a run without adapters does not need it
    from cdm_lightning.lora.shared import SharedBase
    from cdm_lightning.lora.weights import AdapterWeights


class RoleView(nn.Module):
    """A call of the shared base with the adapter `role` on, or with none for None.

    Its parameters are those given, under their own dotted names; the base is not in its module tree.
    """

    def __init__(self, shared: "SharedBase", role: str | None, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.shared, self.role = shared, role  # the base is no nn.Module: it is not registered
        for name, parameter in parameters.items():
            _hold(self, name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns with this role's adapter; the adapter is off again after the call."""
        with self.shared.running(self.role):
            return self.shared.network(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights, and so of what is given to it."""
        return self.shared.dtype

    @property
    def config(self) -> Any:
        """The base's own configuration."""
        return self.shared.network.config


class AdapterView(RoleView):
    """A role with an adapter: its parameters, float32, are the adapter's."""

    def __init__(
        self, shared: "SharedBase", role: str, parameters: Mapping[str, nn.Parameter], adapter: Adapter
    ) -> None:
        super().__init__(shared, role, parameters)
        self.adapter = adapter

    @property
    def weights(self) -> "AdapterWeights":
        """The adapter apart from the base, for export."""
        from cdm_lightning.lora.weights import AdapterWeights

        return AdapterWeights(self.adapter, self.state_dict())


class BaseView(RoleView):
    """The base with all adapters off: the teacher. Its parameters are the base's own; moving it moves the base."""

    def __init__(self, shared: "SharedBase", parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(shared, None, parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BaseView":
        self.shared.network._apply(fn, recurse)  # buffers too, which are not held here; parameters move in place
        return self


def _hold(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, making modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)
