"""How a run is spread over processes: one process, whole copies, shards, or copies of shards.

All but the first are one strategy, FSDP2 on a mesh (replicas, shards) of processes: copies of the networks alone are
(W, 1), shards alone (1, W). Mesh dimensions keep the names that Lightning gives them.
"""

import os
from collections.abc import Sequence
from typing import cast

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

from cdm_lightning.errors import UserError


class MeshStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy on `replicas` x `shards` processes; `sharding.distribute` puts the networks on it.

    Shards of the networks `on_cpu` rest in host memory and are copied to the device block by block when they compute;
    those of a trained one are also updated there.
    """

    def __init__(self, replicas: int, shards: int, on_cpu: Sequence[str] = ()) -> None:
        super().__init__(data_parallel_size=replicas, tensor_parallel_size=shards, save_distributed_checkpoint=False)
        self.replicas, self.shards, self.on_cpu = replicas, shards, tuple(on_cpu)

    def check(self, networks: Sequence[str], whole: Sequence[str]) -> None:
        """UserError if `on_cpu` names none of these networks, or one that is not `whole`."""
        check_on_cpu(self.on_cpu, networks, whole)

    def model_to_device(self) -> None:
        """Nothing: `sharding.distribute` has placed all, and what rests in host memory stays there."""

    def _configure_launcher(self) -> None:
        """Processes are started before, by `cdm_lightning.launch`, torchrun or SLURM; Lightning would run the sweep again."""
        environment = cast(ClusterEnvironment, self.cluster_environment)
        if not environment.creates_processes_externally and self.replicas * self.shards > 1:
            raise UserError("several processes are started by python -m cdm_lightning.train, torchrun or srun")
        super()._configure_launcher()

    def _get_process_group_backend(self) -> str:
        """Gloo for what lies on the CPU, counters and offloaded shards, beside NCCL for all else."""
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"


def check_on_cpu(on_cpu: Sequence[str], networks: Sequence[str], whole: Sequence[str]) -> None:
    """UserError if `on_cpu` names none of `networks`, or one that is not `whole`: an adapter, its base, or a head."""
    refused = [name for name in on_cpu if name not in whole]
    if refused:
        what = f"{refused[0]} is an adapter, the base of adapters or a head, which stay on the device"
        wrong = what if refused[0] in networks else f"there is no network {refused[0]}"
        raise UserError(f"strategy.on_cpu: {wrong}; it may list {', '.join(whole) or 'nothing here'}")


def single_process(devices: int | str | Sequence[int] = 1, num_nodes: int = 1) -> str:
    """The strategy of one process on one device, by its name for `Trainer`; UserError if more than one is asked for.

    `devices` is what `Trainer` takes: a count, a list of indices, "auto", or one of these as text. A launcher that
    started several processes counts too: they would write to one folder.
    """
    processes = max(device_count(devices) * num_nodes, launched_processes() or 1)
    if processes != 1:
        raise UserError(
            f"strategy=single runs one process, {processes} were asked for; set trainer.devices=1, or strategy=ddp, fsdp2 "
            "or hsdp"
        )
    return "auto"


def data_parallel(
    devices: int | str | Sequence[int] = 1, num_nodes: int = 1, on_cpu: Sequence[str] = ()
) -> MeshStrategy:
    """Each process holds the networks whole."""
    return MeshStrategy(replicas=world_size(devices, num_nodes), shards=1, on_cpu=on_cpu)


def fully_sharded(
    devices: int | str | Sequence[int] = 1, num_nodes: int = 1, on_cpu: Sequence[str] = ()
) -> MeshStrategy:
    """Each process holds one shard of each weight, gradient and optimizer state."""
    return MeshStrategy(replicas=1, shards=world_size(devices, num_nodes), on_cpu=on_cpu)


def hybrid_sharded(
    devices: int | str | Sequence[int] = 1, num_nodes: int = 1, replicas: int = 1, on_cpu: Sequence[str] = ()
) -> MeshStrategy:
    """`replicas` copies, each sharded over an equal part of the processes; UserError if that does not come out even."""
    processes = world_size(devices, num_nodes)
    if replicas < 1 or processes % replicas:
        raise UserError(
            f"strategy=hsdp: {processes} processes cannot be {replicas} equal groups; set strategy.replicas"
        )
    return MeshStrategy(replicas=replicas, shards=processes // replicas, on_cpu=on_cpu)


def world_size(devices: int | str | Sequence[int], num_nodes: int) -> int:
    """Number of processes in all; UserError if a launcher started another number."""
    processes = device_count(devices) * num_nodes
    launched = launched_processes() or processes
    if launched != processes:
        raise UserError(
            f"trainer.devices and trainer.num_nodes ask for {processes} processes, but the launcher started {launched}"
        )
    return processes


def launched_processes() -> int | None:
    """How many processes torchrun or SLURM started; None if neither did."""
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    return int(os.environ.get("WORLD_SIZE", "0")) or (tasks if tasks > 1 else None)


def device_count(devices: int | str | Sequence[int]) -> int:
    """Number of devices that `Trainer(devices=...)` would use."""
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) for index in devices.split(",") if index.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if devices in ("auto", "-1", -1):
        return max(1, torch.cuda.device_count())
    return int(devices)
