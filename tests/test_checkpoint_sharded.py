"""Sharded networks and optimizers in a checkpoint: written in one layout, read in another, bit for bit the same."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cdm_lightning.checkpoint.save import save_checkpoint
from cdm_lightning.checkpoint.state import plain_tensors, plain_values_of, restore, tensors_of
from cdm_lightning.checkpoint.stored import read_checkpoint

Layout = tuple[int, int] | None  # (replicas, shards); None: no mesh at all


class Networks(nn.Module):
    """Two small networks with odd sizes, a scalar and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("student", "fake_score"):
            layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1), nn.LayerNorm(1))
            layers.register_buffer("table", torch.randn(3))
            self.add_module(name, layers)


def build(layout: Layout) -> tuple[Networks, dict[str, torch.optim.Optimizer]]:
    torch.manual_seed(0)
    networks = Networks()
    for network in networks.children():
        if layout is not None:
            mesh = init_device_mesh("cpu", layout, mesh_dim_names=("replicate", "shard"))
            fully_shard(network, mesh=mesh, reshard_after_forward=True)
    return networks, {
        name: torch.optim.AdamW(getattr(networks, name).parameters(), lr=0.1) for name in ("student", "fake_score")
    }


def step(networks: Networks, optimizers: dict, *names: str) -> None:
    for name in names:
        getattr(networks, name)(torch.ones(2, 5)).square().sum().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}


def work(layout: Layout, place: Path, task: str) -> None:
    """In a process: "save" after the fake score alone was trained, "go on" from that and save again after both were."""
    torch.set_num_threads(1)
    if layout is not None:
        dist.init_process_group("gloo")
    networks, optimizers = build(layout)
    iteration = 1
    if task == "save":
        step(networks, optimizers, "fake_score", "fake_score")
    else:
        for parameter in networks.parameters():
            nn.init.zeros_(parameter)
        restore(networks, optimizers, read_checkpoint(place / "iteration_0000001"))
        assert not optimizers["student"].state  # it had made no step
        step(networks, optimizers, "student", "fake_score")
        iteration = 2
    counts = {"iteration": iteration, "ema_updates": 0, "fingerprint": "two"}
    record = {**counts, "optimizers": plain_values_of(networks, optimizers)}
    path = save_checkpoint(place, tensors_of(networks, optimizers), record, {})
    expected = whole(tensors_of(networks, optimizers))
    found = read_checkpoint(path)
    assert found.find_fault() is None
    tensors = found.tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    if layout is not None:
        dist.destroy_process_group()


def run(layout: Layout, place: Path, task: str) -> None:
    together(1 if layout is None else layout[0] * layout[1], work, (layout, place, task))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[Layout, dict[str, Tensor]]:
    """What two iterations give in one process without a mesh."""
    networks, optimizers = build(None)
    step(networks, optimizers, "fake_score", "fake_score")
    step(networks, optimizers, "student", "fake_score")
    return {name: value.detach().clone() for name, value in tensors_of(networks, optimizers).items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 2), (1, 2)), ((1, 2), None), (None, (1, 2)), ((2, 1), (1, 2)), ((1, 2), (2, 1)), ((1, 2), (1, 3))],
    ids=str,
)
def test_any_layout_goes_on_from_any_other(tmp_path, straight, before, after):
    run(before, tmp_path, "save")
    run(after, tmp_path, "go on")
    found = read_checkpoint(tmp_path / "iteration_0000002").tensors()
    assert found.keys() == straight.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, straight[name], rtol=1e-6, atol=1e-6)
    shards = {file.name[:11] for file in (tmp_path / "iteration_0000001").glob("shard-*")}
    assert len(shards) == (1 if before is None else 2)


def quantized(layout: Layout, place: Path) -> None:
    """Save a quantized state, or with one there read it into a fresh one, and compare."""
    from torchao.optim import AdamW8bit

    torch.set_num_threads(1)
    holder = nn.Linear(64, 128, bias=False)
    nn.init.normal_(holder.weight, generator=torch.Generator().manual_seed(0))
    if layout is not None:
        dist.init_process_group("gloo")
        fully_shard(holder, mesh=init_device_mesh("cpu", layout, mesh_dim_names=("replicate", "shard")))
    optimizer = AdamW8bit([holder.weight], lr=1e-2)
    state, fresh = (optimizer._new_buffer(holder.weight, True) for _ in range(2))
    values = holder.weight.detach()
    local, values = (t.to_local() if layout is not None else t for t in (state, values))
    local.copy_(values)
    tensors = plain_tensors("state", state)
    assert set(tensors) == {"state.codes", "state.scale", "state.qmap"}
    if not (place / "iteration_0000001").exists():
        save_checkpoint(place, tensors, {"iteration": 1, "ema_updates": 0, "fingerprint": ""}, {})
        return
    read_checkpoint(place / "iteration_0000001").fill(plain_tensors("state", fresh))
    read = fresh.to_local() if layout is not None else fresh
    assert torch.equal(read.codes, local.codes)
    assert torch.equal(read.scale, local.scale)
    assert read.codes.any()


@pytest.mark.parametrize(("before", "after"), [((1, 2), (1, 2)), ((1, 2), None), (None, (2, 1))], ids=str)
def test_quantized_optimizer_states_are_cut_as_their_parameters(tmp_path, before, after):
    for layout in (before, after):
        together(1 if layout is None else layout[0] * layout[1], quantized, (layout, tmp_path))
