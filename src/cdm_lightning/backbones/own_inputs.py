"""Inputs that a role's network has beside x, sigma and text: values added to what its time embedding tells the blocks.

Shapes: B samples, D the width of the time embedding.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "own_inputs"  # of the attribute of a network that has some


class OwnInputs(nn.Module):
    """One module for each input, from its values (B,) to (B, D); the sum of all is added to the time embedding."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(modules)
        self._values: Mapping[str, Tensor] = {}  # those of the call that runs now

    @contextmanager
    def given(self, values: Mapping[str, Tensor]) -> Generator[None]:
        """Inside the block, calls of the network get these values; ValueError if an input is missing or unknown."""
        if values.keys() != self.embeddings.keys():
            raise ValueError(
                f"the network has the inputs {', '.join(self.embeddings)}, it was given {', '.join(values) or 'none'}"
            )
        self._values = values
        try:
            yield
        finally:
            self._values = {}

    def add_to(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """A forward hook of the time embedding: its output (B, D) with the inputs' embeddings added.

        A network that several roles share runs the hook for all of them; those that give no values change nothing.
        """
        for name, values in self._values.items():
            output = output + self.embeddings[name](values).to(output.dtype)
        return output


def attach_inputs(network: nn.Module, time_embedding: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Give `network` inputs of its own, trained with it but for what is frozen, which act on the output of `time_embedding`.

    That is a module of the network, or of the base that it shares with other roles.
    """
    own = OwnInputs(modules)
    setattr(network, NAME, own)
    time_embedding.register_forward_hook(own.add_to)


@contextmanager
def giving(network: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Inside the block, calls of `network` get the values of its own inputs; ValueError if they do not fit."""
    own = getattr(network, NAME, None)
    if isinstance(own, OwnInputs):
        with own.given(values):
            yield
    elif values:
        raise ValueError(f"the network has no inputs of its own, it was given {', '.join(values)}")
    else:
        yield


def join_values(values: list[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """The values of several batches one after the other; None if they are not values of the same inputs."""
    names = values[0].keys()
    if any(other.keys() != names for other in values):
        return None
    return {name: torch.cat([one[name] for one in values]) for name in names}
