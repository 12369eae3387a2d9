"""Inputs of a role's network in addition to x, sigma and text; their embeddings are added to its time embedding.

Shapes: B samples, D the width of the time embedding.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "own_inputs"  # the attribute in which a network holds its own inputs


class OwnInputs(nn.Module):
    """A module for each input, which maps values (B,) to (B, D); the sum of all is added to the time embedding."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(modules)
        self._values: Mapping[str, Tensor] = {}  # the values of the current call

    @contextmanager
    def given(self, values: Mapping[str, Tensor]) -> Generator[None]:
        """Pass these values to all calls of the network inside the block; ValueError if an input is missing or unknown."""
        if values.keys() != self.embeddings.keys():
            raise ValueError(
                f"the network has the inputs {', '.join(self.embeddings)}, but it was given {', '.join(values) or 'none'}"
            )
        self._values = values
        try:
            yield
        finally:
            self._values = {}

    def add_to(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """Add the inputs' embeddings to the output (B, D) of the time embedding; this is a forward hook of that module.

        A network that several roles share runs the hook for all of them; it changes nothing for roles without values.
        """
        for name, values in self._values.items():
            output = output + self.embeddings[name](values).to(output.dtype)
        return output


def attach_inputs(network: nn.Module, time_embedding: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Give `network` inputs of its own, which are added to the output of `time_embedding`.

    The modules are trained with the network, except for their frozen parameters. `time_embedding` is a module of the
    network, or of the base that it shares with other roles.
    """
    own = OwnInputs(modules)
    setattr(network, NAME, own)
    time_embedding.register_forward_hook(own.add_to)


@contextmanager
def giving(network: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Pass these values of its own inputs to all calls of `network` inside the block; ValueError if they do not fit."""
    own = getattr(network, NAME, None)
    if isinstance(own, OwnInputs):
        with own.given(values):
            yield
    elif values:
        raise ValueError(f"the network has no inputs of its own, but it was given {', '.join(values)}")
    else:
        yield


def join_values(values: list[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Concatenate the values of several batches; None if they are not values of the same inputs."""
    names = values[0].keys()
    if any(other.keys() != names for other in values):
        return None
    return {name: torch.cat([one[name] for one in values]) for name in names}
