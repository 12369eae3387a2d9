"""Copies and casts that a GPU would have to wait for or to carry, counted on the CPU."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_lightning.backbones import packing
from cdm_lightning.core.ema import lerp_parameters_
from cdm_lightning.core.transfer import Fetched, send
from cdm_lightning.lora.plan import Adapter
from cdm_lightning.lora.shared import SharedBase


class Casts(TorchDispatchMode):
    """Bytes that are cast from one dtype to another."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.bytes += out.nbytes
        return out


def test_only_copies_from_the_host_to_a_gpu_are_pinned_and_not_waited_for(monkeypatch):
    made: list[tuple] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: made.append(("pinned",)) or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *a, **k: made.append((a, k)) or self)
    send(torch.zeros(2), "cuda:0")
    assert made == [("pinned",), ((torch.device("cuda:0"),), {"non_blocking": True})]
    made.clear()
    send(torch.zeros(2), "cpu")
    assert made == [((torch.device("cpu"),), {})]


class Event:
    """In the place of a CUDA event that has not passed when it is asked."""

    waits = 0

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        Event.waits += 1


def test_a_fetched_value_is_waited_for_when_it_is_read(monkeypatch):
    class OnGPU:
        device, shape, dtype = torch.device("cuda"), (), torch.bool

    copies: list[bool] = []
    made = torch.empty(())
    monkeypatch.setattr(torch, "empty", lambda *_, pin_memory, **__: made if pin_memory else None)
    monkeypatch.setattr(Tensor, "copy_", lambda self, values, non_blocking: copies.append(non_blocking))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    fetched = Fetched(OnGPU())
    assert (copies, Event.waits) == ([True], 0)
    assert fetched.values is made
    assert Event.waits == 1
    here = torch.ones(2)
    assert Fetched(here).values is here


def test_positions_are_made_once_and_can_be_trained_on_after_validation():
    cpu = torch.device("cpu")
    packing._kept_ids.cache_clear()
    with torch.inference_mode():
        first = packing._kept_ids(4, 6, (1, 5, 5), cpu)
    assert not first.is_inference()
    assert packing._kept_ids(4, 6, (1, 5, 5), cpu) is first
    assert torch.equal(first, packing.grid_ids(4, 6, (1, 5, 5), cpu))
    assert first[-1].tolist() == [1, 6, 7]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_cast_their_input_once_under_autocast(dora):
    def outcome(always: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).to(torch.bfloat16)
        shared = SharedBase(base, {"student": Adapter(rank=4, targets=["0", "2"], use_dora=dora)}, {}, seed=0)
        view = shared.view("student")
        with torch.no_grad():
            for name, parameter in view.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape))
        x = torch.randn(32, 16).to(torch.bfloat16).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts, shared.running("student"):
            for layer in shared.layers.values() if always else ():
                layer.cast_input_dtype_enabled = True
            out = shared.network(x)
        out.float().square().sum().backward()
        return [out, x.grad, *(parameter.grad for parameter in view.parameters())], casts.bytes

    (ours, few), (pefts, many) = outcome(False), outcome(True)
    for one, other in zip(ours, pefts, strict=True):
        assert torch.equal(one, other)
    assert few == many if dora else few < many


def test_an_average_on_another_device_follows_one_weight_at_a_time():
    networks = [nn.Linear(5, 7), nn.Linear(5, 7)]
    expected = [a.lerp(b, 0.25) for a, b in zip(networks[0].parameters(), networks[1].parameters())]
    lerp_parameters_(*networks, 0.25)
    for one, other in zip(networks[0].parameters(), expected):
        assert torch.equal(one, other)
