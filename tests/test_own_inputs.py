"""A network's own inputs: no effect at the start, values that travel with the batch, calls of other roles left alone."""

import pytest
import torch
from torch import Tensor, nn

from cdm_lightning.backbones.base import BoundField
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.core.ema import lerp_parameters_
from cdm_lightning.core.flow import FunctionField
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.objectives.base import Role
from cdm_lightning.training.networks import Networks

B = 4


class Embedding(nn.Module):
    """A line through 0 whose slope starts as 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor) -> Tensor:
        return values[:, None] * self.slope


ROLES = (Role("judge", inputs={"seen": Embedding}),)


@pytest.fixture(scope="module", params=["toy2d", "sd3"])
def backbone(request, tiny_pipeline_folder):
    if request.param == "toy2d":
        return Toy2DBackbone(hidden=16, depth=2, fit_steps=5)
    made = SD3Backbone(str(tiny_pipeline_folder), max_sequence_length=8)
    made.setup(torch.device("cpu"))
    return made


def adapted(backbone) -> LoRAPlan:
    targets = "blocks" if isinstance(backbone, Toy2DBackbone) else "attention"
    return LoRAPlan(student=Adapter(rank=2, targets=targets), judge=Adapter(rank=2, targets=targets))


@pytest.fixture(params=["full", "lora"])
def networks(request, backbone) -> Networks:
    networks = Networks(backbone, ROLES, lora=adapted(backbone) if request.param == "lora" else None)
    networks.place(torch.device("cpu"))
    return networks


def field(backbone, network: nn.Module) -> BoundField:
    return BoundField(backbone, network, backbone.encode_prompts(["a red circle", "north", "a star", "west"]))


def arguments(backbone) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, *backbone.latent_shape, generator=generator), torch.rand(B, generator=generator)


def moved(networks: Networks) -> Networks:
    with torch.no_grad():
        networks.judge.own_inputs.embeddings["seen"].slope.normal_(generator=torch.Generator().manual_seed(1))
    return networks


@torch.no_grad()
def test_it_has_no_effect_at_the_start(backbone, networks):
    x, sigma = arguments(backbone)
    judge, student = field(backbone, networks.judge), field(backbone, networks.student)
    assert torch.equal(judge.given(seen=sigma)(x, sigma), student(x, sigma))


@torch.no_grad()
def test_it_acts_in_the_calls_of_its_role_alone(backbone, networks):
    x, sigma = arguments(backbone)
    before = {role: field(backbone, getattr(networks, role))(x, sigma) for role in ("student", "teacher")}
    judge = field(backbone, moved(networks).judge)
    low, high = (judge.given(seen=torch.full((B,), value))(x, sigma) for value in (0.0, 1.0))
    assert not torch.allclose(low, high, atol=1e-3)
    assert torch.allclose(low, before["student"])  # the line through 0
    for role, velocity in before.items():
        assert torch.equal(field(backbone, getattr(networks, role))(x, sigma), velocity)


@torch.no_grad()
def test_values_travel_with_their_samples(backbone, networks):
    x, sigma = arguments(backbone)
    seen = torch.linspace(0, 1, B)
    judge = field(backbone, moved(networks).judge).given(seen=seen)
    whole = judge(x, sigma)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(judge.select(rows)(x[rows], sigma[rows]), whole[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judge.select(slice(1, 3))(x[1:3], sigma[1:3]), whole[1:3], rtol=1e-4, atol=1e-5)
    joined = judge.join([judge.given(seen=1 - seen)])
    twice = joined(torch.cat([x, x]), torch.cat([sigma, sigma]))
    torch.testing.assert_close(twice[:B], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice[B:], judge.given(seen=1 - seen)(x, sigma), rtol=1e-4, atol=1e-5)
    assert judge.join([field(backbone, networks.judge)]) is None  # without values one call cannot serve both


def test_values_that_do_not_fit_are_refused(backbone, networks):
    x, sigma = arguments(backbone)
    judge, student = field(backbone, networks.judge), field(backbone, networks.student)
    with pytest.raises(ValueError, match="has the inputs seen, but values are given for none"):
        judge(x, sigma)
    with pytest.raises(ValueError, match="has the inputs seen, but values are given for other"):
        judge.given(other=sigma)(x, sigma)
    with pytest.raises(ValueError, match="no additional inputs, but values are given for seen"):
        student.given(seen=sigma)(x, sigma)
    with pytest.raises(ValueError, match="FunctionField has no input seen"):
        FunctionField(lambda x, sigma: x).given(seen=sigma)
    assert judge.given(seen=sigma)(x, sigma).isfinite().all()  # an error leaves nothing behind


def test_its_weights_learn_and_are_kept_by_a_merge(backbone, networks):
    x, sigma = arguments(backbone)
    moved(networks)
    field(backbone, networks.judge).given(seen=sigma)(x, sigma).square().mean().backward()
    slope = networks.judge.own_inputs.embeddings["seen"].slope
    assert slope.grad.abs().max() > 0
    before = slope.detach().clone()
    lerp_parameters_(networks.judge, networks.student, 1.0)
    assert torch.equal(slope, before)
    assert "own_inputs.embeddings.seen.slope" in dict(networks.judge.named_parameters())


def test_a_role_that_is_built_has_none():
    with pytest.raises(ValueError, match="role head has both build and inputs"):
        Role("head", build=nn.Identity, inputs={"seen": Embedding})
