"""Modules that run one base network, which they share, with one LoRA adapter on or with none.

Optimizers, the EMA, checkpoints and the generation of images use such a module like any other `nn.Module`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cdm_lightning.lora.plan import Adapter
from cdm_lightning.lora.weights import AdapterWeights

if TYPE_CHECKING:  # peft takes seconds to import, and a run without adapters does not need it
    from cdm_lightning.lora.shared import SharedBase


class RoleView(nn.Module):
    """A network that calls the base of `shared` with the adapter of `role` on, or without an adapter if `role` is None.

    `parameters`, by dotted name, are all the parameters that this module has: the base is not one of its submodules.
    """

    def __init__(self, shared: "SharedBase", role: str | None, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.shared, self.role = shared, role  # SharedBase is not an nn.Module, so it is not registered
        for name, parameter in parameters.items():
            _hold(self, name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with these arguments and with this role's adapter only; restore the former adapter after the call."""
        with self.shared.running(self.role):
            return self.shared.network(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights of the base."""
        return self.shared.dtype

    @property
    def config(self) -> Any:
        """The `config` of the base network, as diffusers models have it."""
        return self.shared.network.config


class AdapterView(RoleView):
    """A network that runs the base with the adapter of one role on; its parameters are those of the adapter, in float32."""

    def __init__(
        self, shared: "SharedBase", role: str, parameters: Mapping[str, nn.Parameter], adapter: Adapter
    ) -> None:
        super().__init__(shared, role, parameters)
        self.adapter = adapter

    @property
    def weights(self) -> AdapterWeights:
        """The adapter alone, without its base, for export."""
        return AdapterWeights(self.adapter, self.state_dict())


class BaseView(RoleView):
    """A network that runs the base with all adapters off; usually this is the teacher.

    Its parameters are those of the base, and moving it to a device moves the base.
    """

    def __init__(self, shared: "SharedBase", parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(shared, None, parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BaseView":
        self.shared.network._apply(fn, recurse)  # moves buffers too, which are not in this view
        return self


def _hold(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, and make the modules that this needs."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)
