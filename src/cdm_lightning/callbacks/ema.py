"""The student's moving average: a twin network that is evaluated and exported in the student's place."""

from typing import TYPE_CHECKING

import lightning as L

from cdm_lightning.core.ema import lerp_parameters_, warmed_up_decay

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


class StudentEMA(L.Callback):
    """Moves `networks.student_ema` towards the student after each iteration that updated it; decay min(`decay`, (1 + n) / (10 + n)).

    n counts the updates before this one (`module.ema_updates`, saved with the module). 0.999 is the decay of CDM,
    arXiv:2605.06376; short runs want less.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: "CDMModule", *_: object) -> None:
        """Follow the student if it was updated."""
        if "student" in pl_module.updated_roles:
            networks = pl_module.networks
            weight = 1 - warmed_up_decay(pl_module.ema_updates, self.decay)
            lerp_parameters_(networks.student_ema, networks.student, weight)
            pl_module.ema_updates += 1
