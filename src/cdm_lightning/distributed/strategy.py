"""Lightning strategies for a run with one process, and for a run that distributes its networks over several processes.

With several processes the strategy is FSDP2 on a mesh (replicas, shards). W processes form one of these meshes:

- (W, 1) if each process holds whole copies of the networks (strategy=ddp),
- (1, W) if the networks are sharded over all processes (strategy=fsdp2),
- (R, W / R) if each of R groups of processes shards its own copy of the networks (strategy=hsdp).

Lightning calls the two dimensions of the mesh "data_parallel" and "tensor_parallel".
"""

import atexit
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import cast

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import DevicesOption, Network, Processes, Seconds

TIMEOUT = 1800.0  # seconds, the default of torch.distributed
LONGEST_TIMEOUT = 10**6  # seconds, eleven days
FEWEST_PROCESSES = 4  # allowed on a machine with fewer CPU cores, to try a layout out


class MeshStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy on a mesh of `replicas` x `shards` processes.

    `training.placement.distribute` shards the networks. `on_cpu` lists networks, such as "teacher", whose shards stay
    in host memory. A block of such a network is copied to the device while the block computes, and the optimizer
    updates the network in host memory. If a process waits for another longer than `timeout` seconds, the run ends with
    an error. Raises `UserError` if `timeout` is 0 or less, or above `LONGEST_TIMEOUT`.
    """

    def __init__(self, replicas: int, shards: int, on_cpu: Sequence[str] = (), timeout: Seconds = TIMEOUT) -> None:
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise UserError(f"strategy.timeout={timeout} must be above 0 and at most {LONGEST_TIMEOUT} seconds")
        super().__init__(
            data_parallel_size=replicas,
            tensor_parallel_size=shards,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout),
        )
        self.replicas, self.shards, self.on_cpu = replicas, shards, tuple(on_cpu)

    def check(self, networks: Sequence[str], whole: Sequence[str]) -> None:
        """Raise `UserError` if `on_cpu` names a network that cannot be in host memory.

        `check_on_cpu` explains `networks` and `whole`.
        """
        check_on_cpu(self.on_cpu, networks, whole)

    def setup_environment(self) -> None:
        """Create the process group and the mesh. If it has a GPU, the process destroys the group when it exits.

        Lightning does so only for the backend "nccl" alone. Without it, NCCL prints a warning at the end of each run.
        """
        super().setup_environment()
        if self.root_device.type == "cuda":
            atexit.register(end_process_group)

    def model_to_device(self) -> None:
        """Do nothing: `training.placement.distribute` has already placed all networks, and some must stay in host memory."""

    def teardown(self) -> None:
        """Free the optimizer states and leave the networks where they are (see `leave_in_place`)."""
        free_states(self.optimizers)
        super().teardown()

    def _configure_launcher(self) -> None:
        """Raise `UserError` if Lightning would have to start the processes itself.

        Lightning would run the whole command, even a whole sweep, again in each process.
        """
        environment = cast(ClusterEnvironment, self.cluster_environment)
        if not environment.creates_processes_externally and self.replicas * self.shards > 1:
            raise UserError(
                f"the strategy needs {self.replicas * self.shards} processes, but this process was started alone; "
                "start the run with python -m cdm_lightning.train, torchrun or srun"
            )
        super()._configure_launcher()

    def _get_process_group_backend(self) -> str:
        """Use Gloo for tensors on the CPU (counters and offloaded shards) and NCCL for tensors on the GPU."""
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"


def end_process_group() -> None:
    """Destroy torch's process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_in_place(strategy: Strategy) -> None:
    """Let a strategy of Lightning end a run without copying networks and optimizer states to host memory.

    By default Lightning copies them at the end of each run. If all weights of SD3-Medium are trained, they take 57 GB,
    which the host may not have. An evaluation after training would also have to copy the networks back.
    After this call, the strategy frees the optimizer states and leaves the networks where they are. All checkpoints
    have been written by then.
    """

    def teardown() -> None:
        free_states(strategy.optimizers)
        strategy.precision_plugin.teardown()
        cast(Accelerator, strategy.accelerator).teardown()
        strategy.checkpoint_io.teardown()

    if not isinstance(strategy, MeshStrategy):
        strategy.teardown = teardown


def free_states(optimizers: Iterable[Optimizer]) -> None:
    """Free the states of the optimizers, and the gradients of their parameters."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()


def check_on_cpu(on_cpu: Sequence[str], networks: Sequence[str], whole: Sequence[str]) -> None:
    """Raise `UserError` if `on_cpu` names a network that cannot be in host memory.

    `networks` are the names of all networks of the run. `whole` are those that can be in host memory: networks with their own
    copy of all pretrained weights. The others must stay on the device: LoRA adapters, their shared base network, and heads
    (networks that the objective builds itself).
    """
    refused = [name for name in on_cpu if name not in whole]
    if refused:
        what = f"{refused[0]}, which is an adapter, the base of adapters or a head of the objective, and must stay on the device"
        wrong = what if refused[0] in networks else f"{refused[0]}, which is not a network of this run"
        cure = f"it may list {', '.join(whole)}" if whole else "set strategy.on_cpu=[]"
        raise UserError(f"strategy.on_cpu names {wrong}; {cure}")


def single_process(devices: DevicesOption = 1, num_nodes: Processes = 1) -> str:
    """Return the name of Lightning's strategy for one process on one device.

    `devices` and `num_nodes` are the arguments of Lightning's `Trainer`: the devices of a node (a count, a list of
    indices, "auto", or one of these as a string) and the number of nodes. Raises `UserError` if they request more than
    one process, or if torchrun or SLURM has started several processes, because all of them would write to one folder.
    """
    processes = max(device_count(devices) * num_nodes, launched_processes() or 1)
    if processes != 1:
        raise UserError(
            f"strategy=single runs one process, but {processes} were requested; set trainer.devices=1, or strategy=ddp, fsdp2 "
            "or hsdp"
        )
    return "auto"


def data_parallel(
    devices: DevicesOption = 1,
    num_nodes: Processes = 1,
    on_cpu: Sequence[Network] = (),
    timeout: Seconds = TIMEOUT,
) -> MeshStrategy:
    """Return the strategy in which each process holds whole copies of all networks (strategy=ddp).

    `world_size` explains `devices` and `num_nodes`, and `MeshStrategy` explains `on_cpu` and `timeout`. Raises
    `UserError` in the cases of `world_size` and `MeshStrategy`.
    """
    return MeshStrategy(world_size(devices, num_nodes), 1, on_cpu, timeout)


def fully_sharded(
    devices: DevicesOption = 1,
    num_nodes: Processes = 1,
    on_cpu: Sequence[Network] = (),
    timeout: Seconds = TIMEOUT,
) -> MeshStrategy:
    """Return the strategy in which each process holds one shard of each weight, gradient and optimizer state (strategy=fsdp2).

    `world_size` explains `devices` and `num_nodes`, and `MeshStrategy` explains `on_cpu` and `timeout`. Raises
    `UserError` in the cases of `world_size` and `MeshStrategy`.
    """
    return MeshStrategy(1, world_size(devices, num_nodes), on_cpu, timeout)


def hybrid_sharded(
    devices: DevicesOption = 1,
    num_nodes: Processes = 1,
    replicas: Processes = 1,
    on_cpu: Sequence[Network] = (),
    timeout: Seconds = TIMEOUT,
) -> MeshStrategy:
    """Return the strategy with `replicas` copies of the networks. Each copy is sharded over a group of processes (strategy=hsdp).

    All groups have the same size. `world_size` explains `devices` and `num_nodes`, and `MeshStrategy` explains `on_cpu`
    and `timeout`. Raises `UserError` in the cases of `world_size` and `MeshStrategy`, and if `replicas` does not divide
    the number of processes.
    """
    processes = world_size(devices, num_nodes)
    if replicas < 1 or processes % replicas:
        raise UserError(
            f"strategy.replicas={replicas} does not divide the number of processes, {processes}; set it to a divisor of {processes}"
        )
    return MeshStrategy(replicas, processes // replicas, on_cpu, timeout)


def world_size(devices: int | str | Sequence[int], num_nodes: int) -> int:
    """Return the number of processes on all nodes: one for each device.

    `devices` says which devices of a node are used (see `device_count`), and `num_nodes` is the number of nodes. Raises
    `UserError` if torchrun or SLURM has started another number of processes.
    """
    processes = device_count(devices) * num_nodes
    launched = launched_processes() or processes
    if launched != processes:
        raise UserError(
            f"trainer.devices and trainer.num_nodes give {processes} processes, but the launcher started {launched}; "
            "set trainer.devices and trainer.num_nodes to what the launcher started"
        )
    return processes


def launched_processes() -> int | None:
    """Return the number of processes that torchrun or SLURM has started, or None if the run was not started by one of them."""
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    return int(os.environ.get("WORLD_SIZE", "0")) or (tasks if tasks > 1 else None)


def require_devices(devices: int | str | Sequence[int], accelerator: str = "auto") -> None:
    """Raise `UserError` if this machine has fewer devices than `devices` requests.

    A run checks this before it starts processes. `devices` and `accelerator` are the arguments of Lightning's
    `Trainer`. On a CPU each usable core counts as a device. Up to `FEWEST_PROCESSES` processes are allowed even on
    fewer cores, so that a strategy can be tried out on a small machine. Only the accelerators "auto", "cpu", "cuda" and
    "gpu" are checked.
    """
    count = device_count(devices)
    is_gpu = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = torch.cuda.device_count() if is_gpu else max(cores, FEWEST_PROCESSES)
    if accelerator not in ("auto", "cpu", "cuda", "gpu"):
        return  # Lightning knows it
    if not 1 <= count <= most:
        what = f"{most} GPUs" if is_gpu else f"{cores} CPU cores, enough for {most} processes"
        raise UserError(f"trainer.devices={devices}: this machine has {what}; set a number from 1 to {most}")


def device_count(devices: int | str | Sequence[int]) -> int:
    """Return the number of devices that Lightning's `Trainer(devices=devices)` would use.

    `devices` is a count, a list of indices, a string such as "0,1", or "auto". "auto" means all GPUs, or 1 without a
    GPU.
    """
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) for index in devices.split(",") if index.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if devices in ("auto", "-1", -1):
        return max(1, torch.cuda.device_count())
    return int(devices)
