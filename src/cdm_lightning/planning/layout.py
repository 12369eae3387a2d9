"""How the networks of a run are distributed over its GPUs: the share that each GPU holds, by plain arithmetic."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cdm_lightning.errors import UserError

GIBIBYTE = 2**30
NODE = 8  # GPUs in a node
STRATEGIES = ("single", "ddp", "fsdp2", "hsdp")


@dataclass(frozen=True)
class GPUs:
    """`count` identical GPUs of `gigabytes` of memory each, in the GB of vendors, which are GiB.

    The share `reserve` of the memory is left for CUDA itself and for gaps between tensors.
    """

    count: int
    gigabytes: float
    reserve: float = 0.08

    def __str__(self) -> str:
        return f"{self.count}x{self.gigabytes:g}"

    @property
    def usable(self) -> float:
        """The bytes on one GPU that tensors may take."""
        return self.gigabytes * GIBIBYTE * (1 - self.reserve)


def read_gpus(text: str, reserve: float = 0.08) -> GPUs:
    """Read "8x80" as eight GPUs of 80 GB; UserError for a text of another form and for a `reserve` outside [0, 1)."""
    match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", str(text).strip())
    if not match or int(match[1]) < 1 or float(match[2]) <= 0:
        raise UserError(f"gpus={text}: write COUNTxGB, for example gpus=1x24 or gpus=8x80")
    if not 0 <= reserve < 1:
        raise UserError(
            f"reserve={reserve} must be in [0, 1): it is the share of a GPU's memory that tensors may not take"
        )
    return GPUs(int(match[1]), float(match[2]), reserve)


@dataclass(frozen=True)
class Layout:
    """How a strategy lays out the networks: `replicas` copies, each cut into `shards` shards, one for each GPU.

    Networks whose roles (names) are in `on_cpu` rest in host memory between their calls.
    """

    strategy: str
    replicas: int = 1
    shards: int = 1
    on_cpu: tuple[str, ...] = ()

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered and cast block by block for each call (FSDP), instead of being cast by autocast."""
        return self.strategy != "single"

    def share(self, role: str) -> float:
        """Return the share of the network of `role` that each GPU holds between the network's calls."""
        return 0.0 if role in self.on_cpu else 1 / self.shards


def make_layout(strategy: str, count: int, on_cpu: Sequence[str] = ()) -> Layout:
    """Return the layout of `strategy` ("single", "ddp", "fsdp2", "hsdp") on `count` GPUs; UserError if they do not fit together.

    For hsdp, each node of eight GPUs is assumed to hold one copy of the networks.
    """
    match strategy:
        case "single" if count == 1:
            return Layout(strategy, on_cpu=tuple(on_cpu))
        case "single":
            raise UserError(
                f"strategy=single runs on one GPU, but gpus asks for {count}; set strategy=ddp, fsdp2 or hsdp"
            )
        case "ddp":
            return Layout(strategy, replicas=count, on_cpu=tuple(on_cpu))
        case "fsdp2":
            return Layout(strategy, shards=count, on_cpu=tuple(on_cpu))
        case "hsdp":
            if count % NODE:
                raise UserError(
                    f"strategy=hsdp needs whole nodes of {NODE} GPUs, but gpus asks for {count}: "
                    f"give a multiple of {NODE}, or set strategy=fsdp2"
                )
            return Layout(strategy, replicas=count // NODE, shards=NODE, on_cpu=tuple(on_cpu))
    raise UserError(f"strategy={strategy} is not one of {', '.join(STRATEGIES)}")
