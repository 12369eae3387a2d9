"""The four networks of a distillation, all started from the same pretrained weights."""

import copy

import torch
from torch import nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.lora.plan import LoRAPlan


class Networks(nn.Module):
    """`student` and `fake_score` (trained, float32), `student_ema` and `teacher` (frozen).

    Roles with an adapter in `lora` share one frozen base and hold the adapter's parameters alone; `seed` decides how
    adapters start. Where there is such a base, the teacher is that base with all adapters off.

    The teacher is kept out of the module tree: it never changes, so it is in no checkpoint and in no optimizer; the
    backbone builds it anew, always the same. `place` moves it along.
    """

    teacher: nn.Module

    def __init__(
        self, backbone: Backbone, gradient_checkpointing: bool = False, lora: LoRAPlan | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        lora = lora or LoRAPlan()
        shared = None
        if lora.adapters:
            from cdm_lightning.lora.shared import SharedBase  # imports peft

            shared = SharedBase(backbone.build_base(), lora.adapters, backbone.lora_targets, seed)
            if gradient_checkpointing:
                backbone.enable_gradient_checkpointing(shared.network, shared.checkpoint)
        self._build_trained(backbone, lora, shared, gradient_checkpointing)
        self.student_ema.requires_grad_(False).eval()
        teacher = shared.base_view() if shared and backbone.teacher_is_base else backbone.build_teacher()
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())
        base = shared.base_view() if shared else teacher
        object.__setattr__(self, "_unregistered", (base, teacher))

    def _build_trained(self, backbone: Backbone, lora: LoRAPlan, shared: object, gradient_checkpointing: bool) -> None:
        def full() -> nn.Module:
            return backbone.build_network().float().requires_grad_(True)

        self.student = shared.view("student") if lora.student else full()
        if lora.fake_score:
            self.fake_score = shared.view("fake_score")
        else:
            self.fake_score = full() if lora.student else copy.deepcopy(self.student)
        self.student_ema = shared.view("student_ema") if lora.student else copy.deepcopy(self.student)
        for network, adapter in ((self.student, lora.student), (self.fake_score, lora.fake_score)):
            if gradient_checkpointing and adapter is None:
                backbone.enable_gradient_checkpointing(network)

    def place(self, device: torch.device) -> None:
        """Move the teacher, and a shared base, to `device`; the other networks are moved as parts of the module."""
        for network in self._unregistered:
            network.to(device)

    def train(self, mode: bool = True) -> "Networks":
        """Set the mode of the trained networks; the average stays in eval mode, as does the teacher."""
        super().train(mode)
        self.student_ema.eval()
        return self
