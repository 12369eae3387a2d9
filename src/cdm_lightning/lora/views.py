"""Modules that run one shared network, the base, with one LoRA adapter or with none.

Optimizers, the EMA, checkpoints and samplers use such a module like any other `nn.Module`.
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
    """The shared base network with the adapter of `role` on, or with all adapters off if `role` is None.

    The module registers only the given `parameters`, under their dotted names. The base is not a submodule, so only
    those of its parameters that are in `parameters` count as parameters of this module.
    """

    def __init__(self, shared: "SharedBase", role: str | None, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.shared, self.role = shared, role  # SharedBase is not an nn.Module, so it is not registered
        for name, parameter in parameters.items():
            _hold(self, name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with this role's adapter only. Afterwards restore the adapter that was on before."""
        with self.shared.running(self.role):
            return self.shared.network(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's weights."""
        return self.shared.dtype

    @property
    def config(self) -> Any:
        """The `config` of the base network, an attribute of diffusers models."""
        return self.shared.network.config


class AdapterView(RoleView):
    """The shared base network with one role's LoRA adapter on. Its parameters are those of the adapter, in float32."""

    def __init__(
        self, shared: "SharedBase", role: str, parameters: Mapping[str, nn.Parameter], adapter: Adapter
    ) -> None:
        super().__init__(shared, role, parameters)
        self.adapter = adapter

    @property
    def weights(self) -> AdapterWeights:
        """The weights of the adapter without the base network, for export."""
        return AdapterWeights(self.adapter, self.state_dict())


class BaseView(RoleView):
    """The shared base network with all adapters off; usually this is the teacher.

    Its parameters are those of the base, and moving it to a device moves the base.
    """

    def __init__(self, shared: "SharedBase", parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(shared, None, parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BaseView":
        self.shared.network._apply(fn, recurse)  # moves buffers too, which are not in this view
        return self


def _hold(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, and make the submodules for that name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)
