"""The option compute.fp8: calls without a gradient are rounded to 8-bit floats, and no others; emulated on the CPU."""

import copy

import pytest
import torch
from tiny_pipelines import FAMILIES
from torch import nn

from benchmarks.set_up import attach, batch, build_module
from benchmarks.sizes import SIZES
from cdm_lightning.errors import UserError
from cdm_lightning.training import float8
from cdm_lightning.training.compute import Compute
from cdm_lightning.training.float8 import Float8Field, Float8Linear, check_device, float8_products, use_float8
from cdm_lightning.training.networks import bind_networks

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow, self.lora_A = nn.Linear(32, 48), nn.Linear(32, 8), nn.Linear(32, 16)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows scaled by a power of two so that the largest number is at most 448, and rounded to e4m3."""
    scale = (448 / x.abs().amax(-1, keepdim=True)).log2().floor().exp2()
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.fixture
def changed() -> tuple[Block, Block]:
    plain = Block()
    block = copy.deepcopy(plain)
    assert use_float8(block, (Block,), "emulated") == 1
    return plain, block


def test_rows_are_rounded_in_calls_without_a_gradient_alone(changed):
    plain, block = changed
    x = torch.randn(2, 5, 32)
    with float8_products(True):
        with torch.no_grad():
            made, of_one_row_a_sample = block.wide(x), block.wide(x[:, 0])
        with_gradient = block.wide(x)
    with torch.no_grad():
        outside = block.wide(x)
    expected = rounded(x) @ rounded(plain.wide.weight).T + plain.wide.bias
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    exact = plain.wide(x)
    assert 0.005 < (made - exact).norm() / exact.norm() < 0.05
    for same in (with_gradient, outside):
        torch.testing.assert_close(same, exact, rtol=0, atol=0)
    torch.testing.assert_close(of_one_row_a_sample, plain.wide(x[:, 0]), rtol=0, atol=0)


def test_adapters_and_other_widths_stay_and_names_too(changed):
    plain, block = changed
    assert [type(layer) for layer in (block.wide, block.narrow, block.lora_A)] == [Float8Linear, nn.Linear, nn.Linear]
    assert list(block.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(block)
    assert twin.wide.weight is not block.wide.weight  # a copy computes with its own weights
    with torch.no_grad(), float8_products(True):
        twin.wide.weight.zero_()
        assert not torch.equal(twin.wide(torch.ones(1, 2, 32)), block.wide(torch.ones(1, 2, 32)))


@pytest.mark.parametrize("name", ["sd3", "longcat", "sana"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_network_is_near_itself(name, dtype, tiny_folder):
    family = FAMILIES[name]
    backbone = family.backbone(str(tiny_folder(name)), **family.options)
    backbone.setup(CPU)
    network = backbone.build_network().float().requires_grad_(True)
    cond = backbone.encode_prompts(["a red circle", "two cats"])
    x, sigma = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
    field = Float8Field(backbone, network, cond, dtype)
    with torch.no_grad():
        exact = field(x, sigma)
        assert use_float8(network, backbone.block_types, "emulated") > 0
        torch.testing.assert_close(field.precise()(x, sigma), exact, rtol=0, atol=0)
        made = field(x, sigma)
    assert torch.equal(field(x, sigma).detach(), exact)  # with a gradient
    assert 1e-4 < (made - exact).norm() / exact.norm() < 0.1
    torch.testing.assert_close(field.select(slice(1)).join([field.select(slice(1, 2))])(x, sigma), exact)


def losses(module, iterations: int) -> dict[str, float]:
    attach(module)
    for iteration in range(iterations):
        module.iteration = iteration
        module.training_step(batch(iteration, 2, module.groups.of(iteration)), 0)
    module.updates.settle()
    return {name: float(value) for name, value in module._figures.items() if name.endswith("/loss")}


def test_training_learns_from_rounded_judgements():
    plain, other = (build_module(SIZES["sd3_toy"]) for _ in range(2))
    other.compute = Compute(gradient_checkpointing=True, fp8="emulated")
    other.networks.use_float8(other.backbone.block_types, "emulated")
    exact, found = losses(plain, 2), losses(other, 2)
    assert exact.keys() == found.keys() == {"student/loss", "fake_score/loss"}
    assert all(exact[name] != found[name] for name in exact)
    assert found["fake_score/loss"] == pytest.approx(exact["fake_score/loss"], rel=0.02)
    other.iteration = 0
    assert isinstance(other.bind(["a ring"]).teacher, Float8Field)
    assert type(bind_networks(plain.networks, plain.backbone, {}, {}, torch.float32).teacher) is not Float8Field


def test_what_cannot_compute_in_fp8_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"compute.fp8=int8 must be one of rowwise, emulated, or null"):
        Compute(fp8="int8")
    check_device(None, CPU, torch.float32)
    check_device("emulated", CPU, torch.float32)
    with pytest.raises(UserError, match=r"compute.fp8=rowwise: the device cpu cannot compute in fp8"):
        check_device("rowwise", CPU, torch.bfloat16)
    with pytest.raises(UserError, match=r"needs module.compute_dtype=bfloat16"):
        check_device("rowwise", CPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"NVIDIA A100 cannot compute in fp8"):
        check_device("rowwise", torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device("rowwise", torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs torchao: install the extra lowbit"):
        Compute(fp8="rowwise")


def test_a_compiled_block_computes_in_fp8_too(changed):
    _, block = changed
    layer, x = block.wide, torch.randn(2, 5, 32)
    with torch.no_grad():
        with float8_products(True):
            eager = layer(x)
        plain = layer(x)
        layer.compile(backend="aot_eager", dynamic=True, fullgraph=True)
        with float8_products(True):
            torch.testing.assert_close(layer(x), eager)
        torch.testing.assert_close(layer(x), plain)
    assert not torch.allclose(plain, eager, rtol=1e-3)
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiled_blocks_of_a_network_compute_in_fp8_too():
    module = build_module(SIZES["sd3_toy"])
    networks, backbone = module.networks, module.backbone
    field = Float8Field(backbone, networks.teacher, backbone.encode_prompts(["a", "b"]))
    x, sigma = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
    networks.use_float8(backbone.block_types, "emulated")
    with torch.no_grad():
        eager = field(x, sigma)
        networks.compile_blocks(backbone.block_types, "aot_eager")
        torch.testing.assert_close(field(x, sigma), eager, rtol=1e-3, atol=1e-4)
        precise = field.precise()(x, sigma)
    assert not torch.allclose(precise, eager, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
