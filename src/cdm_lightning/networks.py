"""The four networks of a distillation, all started from the same pretrained weights."""

import copy

import torch
from torch import nn

from cdm_lightning.backbones.base import Backbone


class Networks(nn.Module):
    """`student` and `fake_score` (trained, float32), `student_ema` and `teacher` (frozen).

    The teacher is kept out of the module tree: it never changes, so it is in no checkpoint and in no optimizer; the
    backbone builds it anew, always the same. `place` moves it along.
    """

    teacher: nn.Module

    def __init__(self, backbone: Backbone, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.student = backbone.build_network().float().requires_grad_(True)
        self.fake_score = copy.deepcopy(self.student)
        self.student_ema = copy.deepcopy(self.student).requires_grad_(False).eval()
        object.__setattr__(self, "teacher", backbone.build_teacher().requires_grad_(False).eval())
        if gradient_checkpointing:
            backbone.enable_gradient_checkpointing(self.student)
            backbone.enable_gradient_checkpointing(self.fake_score)

    def place(self, device: torch.device) -> None:
        """Move the teacher to `device`; the other networks are moved as parts of the module."""
        self.teacher.to(device)

    def train(self, mode: bool = True) -> "Networks":
        """Set the mode of the trained networks; the average stays in eval mode, as does the teacher."""
        super().train(mode)
        self.student_ema.eval()
        return self
