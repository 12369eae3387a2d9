"""How networks are distributed over the GPUs of a run: the share of each network that a GPU holds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cdm_lightning.errors import UserError

GIBIBYTE = 2**30
NODE = 8  # GPUs in a node
DIGITS = 9  # of a number in gpus=COUNTxGB
MOST_GPUS = 100_000  # as kinds.Processes
LEAST_MEMORY, MOST_MEMORY = 0.001, 100_000  # GB of one GPU
STRATEGIES = ("single", "ddp", "fsdp2", "hsdp")


@dataclass(frozen=True)
class GPUs:
    """`count` identical GPUs with `gigabytes` GiB of memory each (an "80 GB" GPU is counted as 80 GiB).

    The share `reserve` of the memory is left for CUDA itself and for gaps between tensors.
    """

    count: int
    gigabytes: float
    reserve: float = 0.08

    def __str__(self) -> str:
        return f"{self.count}x{self.gigabytes:g}"

    @property
    def usable(self) -> float:
        """The bytes of one GPU's memory that tensors may take."""
        return self.gigabytes * GIBIBYTE * (1 - self.reserve)


def read_gpus(text: str, reserve: float = 0.08) -> GPUs:
    """Parse a string such as "8x80", which means eight GPUs with 80 GB of memory each.

    `reserve` is the share of the memory that is kept free (see `GPUs`). Raises UserError for a string of another form,
    and for a `reserve` outside [0, 1).
    """
    match = re.fullmatch(rf"([0-9]{{1,{DIGITS}}})x([0-9]{{1,{DIGITS}}}(?:\.[0-9]{{1,{DIGITS}}})?)", str(text).strip())
    if not match or not 1 <= int(match[1]) <= MOST_GPUS or not LEAST_MEMORY <= float(match[2]) <= MOST_MEMORY:
        raise UserError(
            f"gpus={str(text)[:60]}: write COUNTxGB, for example gpus=1x24 or gpus=8x80, with a whole COUNT of at most "
            f"{MOST_GPUS:,} and GB from {LEAST_MEMORY} to {MOST_MEMORY:,}"
        )
    if not 0 <= reserve < 1:
        raise UserError(
            f"reserve={reserve} must be at least 0 and below 1: the share of a GPU's memory that is kept free"
        )
    return GPUs(int(match[1]), float(match[2]), reserve)


@dataclass(frozen=True)
class Layout:
    """The distribution of the networks over GPUs.

    There are `replicas` copies of the networks. Each copy is cut into `shards` shards, and each GPU holds one shard.
    `strategy` is "single", "ddp", "fsdp2" or "hsdp". Networks whose names are in `on_cpu` stay in host memory between
    their calls.
    """

    strategy: str
    replicas: int = 1
    shards: int = 1
    on_cpu: tuple[str, ...] = ()

    @property
    def gathers(self) -> bool:
        """Whether FSDP gathers and casts a network's weights block by block for each call.

        This is True for "ddp", "fsdp2" and "hsdp", which all use FSDP. With "single", autocast casts the weights.
        """
        return self.strategy != "single"

    def share(self, role: str) -> float:
        """Return the share of the network `role` that each GPU holds between the network's calls."""
        return 0.0 if role in self.on_cpu else 1 / self.shards


def make_layout(strategy: str, count: int, on_cpu: Sequence[str] = ()) -> Layout:
    """Return the layout of a strategy ("single", "ddp", "fsdp2" or "hsdp") on `count` GPUs.

    With "hsdp", each node of eight GPUs holds one copy of the networks. Networks whose names are in `on_cpu` stay in
    host memory between their calls. Raises UserError if the strategy cannot run on `count` GPUs.
    """
    match strategy:
        case "single" if count == 1:
            return Layout(strategy, on_cpu=tuple(on_cpu))
        case "single":
            raise UserError(f"strategy=single runs on one GPU, but gpus says {count}; set strategy=ddp, fsdp2 or hsdp")
        case "ddp":
            return Layout(strategy, replicas=count, on_cpu=tuple(on_cpu))
        case "fsdp2":
            return Layout(strategy, shards=count, on_cpu=tuple(on_cpu))
        case "hsdp":
            if count % NODE:
                raise UserError(
                    f"strategy=hsdp needs whole nodes of {NODE} GPUs, but gpus says {count}; "
                    f"give a multiple of {NODE}, or set strategy=fsdp2"
                )
            return Layout(strategy, replicas=count // NODE, shards=NODE, on_cpu=tuple(on_cpu))
    raise UserError(f"strategy={strategy} is not one of {', '.join(STRATEGIES)}")
