"""The four networks of a distillation, all started from the same pretrained weights."""

import copy

import torch
from torch import nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.recomputation import Guard, Recomputation


class Networks(nn.Module):
    """`student` and `fake_score` (trained, float32), `student_ema` and `teacher` (frozen).

    Roles with an adapter in `lora` share one frozen base and hold the adapter's parameters alone; `seed` decides how
    adapters start. Where there is such a base, the teacher is that base with all adapters off.

    The teacher is kept out of the module tree: it never changes, so it is in no checkpoint and in no optimizer; the
    backbone builds it anew, always the same. `place` moves it along.

    `recomputation` says which activations the backward pass computes anew (default: none).
    With `empty`, whole networks stay on the meta device where the backbone can fill them later, shard by shard.
    """

    teacher: nn.Module

    def __init__(
        self,
        backbone: Backbone,
        recomputation: Recomputation | None = None,
        lora: LoRAPlan | None = None,
        seed: int = 0,
        empty: bool = False,
    ) -> None:
        super().__init__()
        self._empty = empty
        self._recomputation = recomputation or Recomputation()
        lora = lora or LoRAPlan()
        shared = None
        if lora.adapters:
            from cdm_lightning.lora.shared import SharedBase  # imports peft

            shared = SharedBase(backbone.build_base(), lora.adapters, backbone.lora_targets, seed)
            self._checkpoint(backbone, shared.network, shared.with_its_adapter)
        self._build_trained(backbone, lora, shared)
        self.student_ema.requires_grad_(False).eval()
        own_teacher = None if shared and backbone.teacher_is_base else self._build(backbone, teacher=True)
        self._keep_unregistered(shared=shared, own_teacher=own_teacher)
        self.view_base()

    def _build_trained(self, backbone: Backbone, lora: LoRAPlan, shared: object) -> None:
        def full() -> nn.Module:
            return self._build(backbone, teacher=False).float().requires_grad_(True)

        self.student = shared.view("student") if lora.student else full()
        if lora.fake_score:
            self.fake_score = shared.view("fake_score")
        else:
            self.fake_score = full() if lora.student else copy.deepcopy(self.student)
        self.student_ema = shared.view("student_ema") if lora.student else copy.deepcopy(self.student)
        for network, adapter in ((self.student, lora.student), (self.fake_score, lora.fake_score)):
            if adapter is None:
                self._checkpoint(backbone, network)

    def _checkpoint(self, backbone: Backbone, network: nn.Module, guard: Guard | None = None) -> None:
        if self._recomputation.share:
            function = self._recomputation.function(network, backbone.block_types, guard)
            backbone.enable_gradient_checkpointing(network, function)

    def _build(self, backbone: Backbone, teacher: bool) -> nn.Module:
        made = backbone.build_empty(teacher) if self._empty else None
        if made is not None:
            return made
        return backbone.build_teacher() if teacher else backbone.build_network()

    def view_base(self) -> None:
        """Make the teacher a view of the shared base as it is now, where the two are one; else freeze it alone."""
        base_view = self._shared.base_view() if self._shared else None
        teacher = self._own_teacher or base_view
        self._keep_unregistered(base_view=base_view, teacher=teacher.requires_grad_(False).eval())

    def _keep_unregistered(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name if name == "teacher" else f"_{name}", value)

    @property
    def base(self) -> nn.Module | None:
        """The frozen network under the adapters, if there are any."""
        return self._shared.network if self._shared else None

    @property
    def whole(self) -> dict[str, nn.Module]:
        """The networks that share no weight with another, by role: all but adapters and the base that is the teacher."""
        from cdm_lightning.lora.views import RoleView

        roles = ("student", "fake_score", "student_ema", "teacher")
        return {role: getattr(self, role) for role in roles if not isinstance(getattr(self, role), RoleView)}

    @property
    def unregistered(self) -> list[nn.Module]:
        """A view of the shared base, if there is one, and the teacher: what is outside the module tree."""
        return [network for network in (self._base_view, self.teacher) if network is not None]

    def compile_blocks(self, block_types: tuple[type[nn.Module], ...], backend: str) -> None:
        """Compile the blocks of every network, each once."""
        for network in [*self.whole.values(), *([self.base] if self.base is not None else [])]:
            compile_blocks(network, block_types, backend)

    def place(self, device: torch.device) -> None:
        """Move the teacher, and a shared base, to `device`; the other networks are moved as parts of the module."""
        for network in self.unregistered:
            network.to(device)

    def train(self, mode: bool = True) -> "Networks":
        """Set the mode of the trained networks; the average stays in eval mode, as does the teacher."""
        super().train(mode)
        self.student_ema.eval()
        return self


def compile_blocks(network: nn.Module, block_types: tuple[type[nn.Module], ...], backend: str) -> None:
    """Compile every block by torch.compile, in place: names of weights stay, and all blocks of a kind share the code."""
    for block in network.modules():
        if isinstance(block, block_types):
            block.compile(backend=backend)
