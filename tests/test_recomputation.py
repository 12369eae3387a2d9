"""Gradient checkpointing recomputes what it is told to, counted in operations and bytes, and changes no gradient."""

import pytest
import torch
from torch import Tensor, nn

from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.config import asset_path
from cdm_lightning.planning.live import LiveBytes, storages
from cdm_lightning.training.gradient_checkpointing import Recomputation

BATCH = 48


@pytest.fixture(scope="module")
def backbone() -> SD3Backbone:
    made = SD3Backbone(asset_path("tiny_sd3"), max_sequence_length=16)
    made.setup(torch.device("cpu"))
    return made


class Cost:
    """Gradients, FLOPs and peak bytes of a forward and a backward pass."""

    def __init__(self, backbone: SD3Backbone, recomputation: Recomputation, compiler: str | None = None) -> None:
        self.network = backbone.build_network()
        blocks = [block for block in self.network.modules() if isinstance(block, backbone.block_types)]
        self.blocks = len(blocks)
        if recomputation.share:
            function = recomputation.function(self.network, backbone.block_types)
            backbone.enable_gradient_checkpointing(self.network, function)
        for block in blocks if compiler else []:
            block.compile(backend=compiler)
        cond = backbone.encode_prompts(["a red circle"] * BATCH)
        x = torch.randn(BATCH, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))

        def passes() -> None:
            backbone.velocity(self.network, x, torch.linspace(0.1, 0.9, BATCH), cond).square().mean().backward()

        if compiler:  # torch compiles nothing under the mode that counts
            passes()
            return
        with LiveBytes(storages(self.network), self.network.parameters()) as live:
            passes()
        self.flops, self.peak = live.flops, live.timeline.peak(0)

    @property
    def gradients(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])


def attention_flops(backbone: SD3Backbone, network: nn.Module) -> int:
    """Of one forward pass: two products of N x N x width a block."""
    config = network.config
    tokens = (config.sample_size // config.patch_size) ** 2 + backbone.encode_prompts(["a"])["prompt_embeds"].shape[1]
    return config.num_layers * BATCH * 4 * tokens**2 * config.num_attention_heads * config.attention_head_dim


def test_operations_and_bytes_are_those_of_the_share(backbone):
    none, half, whole = (Cost(backbone, Recomputation(share)) for share in (0.0, 0.5, 1.0))
    assert none.blocks % 2 == 0
    assert none.flops < half.flops < whole.flops
    assert half.flops - none.flops == pytest.approx((whole.flops - none.flops) / 2, rel=0.15)  # the last one is smaller
    assert none.peak > 1.1 * half.peak
    assert half.peak > 1.1 * whole.peak
    for other in (half, whole):
        torch.testing.assert_close(other.gradients, none.gradients, rtol=1e-5, atol=1e-8)


def test_attention_that_is_kept_is_not_computed_again(backbone):
    whole, kept = Cost(backbone, Recomputation(1.0)), Cost(backbone, Recomputation(1.0, attention=False))
    assert whole.flops - kept.flops == attention_flops(backbone, whole.network)
    assert whole.peak <= kept.peak < Cost(backbone, Recomputation(0.5)).peak
    torch.testing.assert_close(kept.gradients, whole.gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("compact_text", [None, 8])
def test_compiled_blocks_are_recomputed_too(tiny_folder, compact_text):
    backbone = SD3Backbone(str(tiny_folder("sd3")), max_sequence_length=16, compact_text=compact_text)  # of two blocks
    backbone.setup(torch.device("cpu"))
    plain = Cost(backbone, Recomputation())
    for recomputation in (Recomputation(0.5), Recomputation(1.0, attention=False)):
        compiled = Cost(backbone, recomputation, compiler="aot_eager")
        torch.testing.assert_close(compiled.gradients, plain.gradients, rtol=1e-4, atol=1e-6)


def test_a_share_of_few_blocks_is_rounded_up():
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    ran = []
    for block in blocks:  # a hook sees the forward pass, and its repetition
        block.register_forward_pre_hook(lambda module, _: ran.append(module))
    function = Recomputation(0.4).function(blocks, (nn.Linear,))
    x = torch.ones(1, 2, requires_grad=True)
    for block in blocks:
        x = function(block, x)
    x.sum().backward()
    assert [ran.count(block) for block in blocks] == [2, 2, 1]
