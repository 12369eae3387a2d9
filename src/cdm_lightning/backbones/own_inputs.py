"""Additional inputs that an objective gives to a network besides x, sigma and text, such as a second noise level.

A module embeds each input, and the embeddings are added to the network's time embedding. Shapes: B samples, D the width of the
time embedding.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "own_inputs"  # the attribute in which a network holds its own inputs


class OwnInputs(nn.Module):
    """The modules that embed a network's additional inputs. Each module maps the values (B,) of one input to (B, D).

    `modules` maps the inputs' names to the modules. The sum of the embeddings is added to the network's time embedding.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(modules)
        self._values: Mapping[str, Tensor] = {}  # the values of the current call

    @contextmanager
    def given(self, values: Mapping[str, Tensor]) -> Generator[None]:
        """Use `values` in all calls of the network inside the `with` block.

        `values` maps the name of each input to a tensor (B,). Raises ValueError for a missing or unknown name.
        """
        if values.keys() != self.embeddings.keys():
            raise ValueError(
                f"the network has the inputs {', '.join(self.embeddings)}, but values are given for {', '.join(values) or 'none'}"
            )
        self._values = values
        try:
            yield
        finally:
            self._values = {}

    def add_to(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """Return the time embedding, `output` (B, D), plus the embeddings of the values that `given` has set.

        This is a forward hook of the module that embeds the time. If `given` has set no values, `output` is returned
        unchanged. This happens if several LoRA networks share a base network: each call of the base network runs the
        hooks of all these LoRA networks, but `given` sets values for only one of them.
        """
        for name, values in self._values.items():
            output = output + self.embeddings[name](values).to(output.dtype)
        return output


def attach_inputs(network: nn.Module, time_embedding: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Give `network` additional inputs, whose embeddings are added to its time embedding.

    `modules[NAME]` maps the values (B,) of the input NAME to an embedding (B, D), which is added to the output of
    `time_embedding`.

    The modules become submodules of `network` and are trained with it, except for frozen parameters. `time_embedding` is a
    module of `network`, or of the base network if `network` is a LoRA view.
    """
    own = OwnInputs(modules)
    setattr(network, NAME, own)
    time_embedding.register_forward_hook(own.add_to)


@contextmanager
def giving(network: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Use `values` for the additional inputs of `network` in all its calls inside the `with` block.

    `values` maps the name of each input to a tensor (B,). Raises ValueError for a missing or unknown name.
    """
    own = getattr(network, NAME, None)
    if isinstance(own, OwnInputs):
        with own.given(values):
            yield
    elif values:
        raise ValueError(f"the network has no additional inputs, but values are given for {', '.join(values)}")
    else:
        yield


def join_values(values: list[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Concatenate the values (B,) of each input over several batches. Return None if the inputs' names differ."""
    names = values[0].keys()
    if any(other.keys() != names for other in values):
        return None
    return {name: torch.cat([one[name] for one in values]) for name in names}
