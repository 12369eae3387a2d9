"""The option compute.attention: every kernel computes what the definition says, in the families' own networks."""

from collections import Counter

import pytest
import torch
from tiny_pipelines import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_lightning.errors import UserError
from cdm_lightning.training import attention
from cdm_lightning.training.attention import KERNELS, attention_by, check_attention
from cdm_lightning.training.compute import Compute

FUSED = "_scaled_dot_product_flash_attention_for_cpu"


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def outcome(backbone, network, kernel: str | None) -> tuple[list[torch.Tensor], Counter[str]]:
    """The velocity and the gradients of all weights that have one, and the operators that made them."""
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = backbone.encode_prompts(["a red circle", "two cats"])
    network.zero_grad()
    with attention_by(kernel), Operators() as ran:
        velocity = backbone.velocity(network, noise, torch.tensor([0.3, 0.8]), cond)
        velocity.square().mean().backward()
    return [velocity.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)], ran.names


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kernel_computes_what_the_definition_says(name, tiny_folder):
    family = FAMILIES[name]
    backbone = family.backbone(str(tiny_folder(name)), **family.options)
    backbone.setup(torch.device("cpu"))
    network = backbone.build_network().float().requires_grad_(True)
    exact, by_definition = outcome(backbone, network, "math")
    fused, by_kernel = outcome(backbone, network, "flash")
    assert by_definition[FUSED] == 0 < by_kernel[FUSED]  # the processors of this family listen
    assert len(exact) == len(fused) > 10
    for one, other in zip(fused, exact):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


def test_the_choice_ends_with_the_block():
    q = torch.randn(1, 2, 8, 8)
    with attention_by("math"), Operators() as inside:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with Operators() as after:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert inside.names[FUSED] == 0 < after.names[FUSED]
    with attention_by(None), Operators() as none:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert none.names[FUSED] == 1


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_what_a_kernel_cannot_compute_another_one_does(kernel):
    """A CPU has neither of the two."""
    q = torch.randn(1, 2, 8, 8)
    with attention_by(kernel):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_another_version_of_flash_attention_stays_until_a_block_asks_for_another(monkeypatch):
    calls: list[str | None] = []
    monkeypatch.setattr(attention.attention, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(attention.attention, "restore_flash_attention_impl", lambda: calls.append(None))
    monkeypatch.setattr(attention, "_active", [None])
    for kernel in ("flash3", "flash3", None, "flash4", "cudnn", "math"):
        with attention_by(kernel):
            pass
    assert calls == ["FA3", "FA4", None]


def test_a_kernel_that_there_is_not_is_refused(monkeypatch):
    for kernel in (*KERNELS, None):
        check_attention(kernel, "compute.attention")
    with pytest.raises(UserError, match=r"compute.attention=fast must be one of math, flash, .*, flash4, or null"):
        Compute(attention="fast")
    with pytest.raises(
        UserError, match=r"compute.attention=flex is not supported: .*docs/speed.md\); set flash, cudnn or null"
    ):
        Compute(attention="flex")
    with pytest.raises(
        UserError, match=r"--attention=flash3 needs the package FlashAttention 3 \(module flash_attn_interface\)"
    ):
        check_attention("flash3", "--attention")
    with pytest.raises(UserError, match=r"flash4 .*flash_attn.cute"):
        check_attention("flash4", "--attention")
    monkeypatch.setattr(attention, "_is_installed", lambda module: True)
    check_attention("flash3", "--attention")
