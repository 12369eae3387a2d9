"""The distillation as a LightningModule: an objective trains the student and further networks.

`trainer.global_step`, `max_steps`, checkpoints and logs all count iterations. An iteration takes one batch of prompts,
computes the student's rollout (its own path from noise) for each of them, and makes the optimizer steps of the
objective. A *role* is the name of a network: "student", "student_ema", "teacher", or one that the objective adds, such
as "fake_score".
"""

from collections.abc import Mapping, Sequence
from typing import cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cdm_lightning.backbones.base import Backbone, repeat_rows
from cdm_lightning.core.ema import HostFollower, lerp_parameters_
from cdm_lightning.core.schedules import SigmaSchedule
from cdm_lightning.data.batches import PADDING, PromptBatch
from cdm_lightning.distributed.ranks import largest
from cdm_lightning.distributed.sharding import average_figures
from cdm_lightning.distributed.strategy import MeshStrategy
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import SamplerSpec, generate_all
from cdm_lightning.kinds import ComputeDtype, Name, Seed
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.objectives.base import Objective, Sample, Update, VelocityFields
from cdm_lightning.training.attention import attention_by
from cdm_lightning.training.compute import Compute
from cdm_lightning.training.ema import EMA, follower_of
from cdm_lightning.training.float8 import check_device
from cdm_lightning.training.networks import Networks, bind_networks, trained_parameters
from cdm_lightning.training.optim import OptimizerRecipe
from cdm_lightning.training.phases import PhaseTimer
from cdm_lightning.training.placement import place
from cdm_lightning.training.resolution import OwnSize, Resolution
from cdm_lightning.training.roles import check_roles, network_names, whole_names
from cdm_lightning.training.rollouts import KINDS, RolloutGroups, Rollouts
from cdm_lightning.training.updates import Updates, recipes_of, steps_of

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CDMModule(L.LightningModule):
    """Distils the model of `backbone` with `objective`: CDM (arXiv:2605.06376) or another training method.

    - `optim`: the optimizer settings of each trained network, by its name (role).
    - `schedule`: draws the sigmas of rollouts. `resolution`: draws the image sizes.
    - `ema`: the settings of the student's EMA; by default there is none.
    - `lora`: the networks that are trained as LoRAs.
    - `compute`: options for memory and speed. `compute_dtype`: the dtype of network calls, "float32" or "bfloat16".
      Trained weights, gradients, sigmas and losses are always float32.
    - `samplers`: the ways in which validation makes images; by default none.
    - `seed`: random numbers depend only on this seed, the iteration and the sample's index in the global batch.

    The attribute `iteration` counts finished iterations, and `ema_updates` counts the updates of the EMA.
    `updated_roles` names the networks that the last iteration updated. Raises `UserError` for a wrong argument.
    """

    follower: HostFollower | None = None  # updates an EMA in host memory beside the GPU's work
    networks: Networks  # set by `configure_model`, when the device is known
    rollouts: Rollouts  # set by `configure_model`

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        schedule: SigmaSchedule,
        optim: Mapping[Name, OptimizerRecipe],
        samplers: Sequence[SamplerSpec] = (),
        seed: Seed = 0,
        compute_dtype: ComputeDtype = "float32",
        ema: EMA | None = None,
        lora: LoRAPlan | None = None,
        resolution: Resolution | None = None,
        compute: Compute | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"module.compute_dtype={compute_dtype} must be one of {', '.join(COMPUTE_DTYPES)}")
        self.lora, self.resolution = lora or LoRAPlan(), resolution or OwnSize()
        self.backbone, self.objective, self.schedule = backbone, objective, schedule
        self.updates = Updates(recipes_of(objective, optim))
        check_roles(objective, self.lora, backbone)
        self.samplers, self.seed = list(samplers or ()), seed
        self.compute_dtype = COMPUTE_DTYPES[compute_dtype]
        self.compute, self.ema = compute or Compute(), ema or EMA(decay=None)
        self.groups = RolloutGroups(
            self.compute.rollouts_together, objective.student_period if objective.rollout == "to_anchor" else None
        )
        self.timer = PhaseTimer()
        self.iteration = self.ema_updates = 0
        self.updated_roles: tuple[str, ...] = ()
        self._figures: dict[str, Tensor] = {}  # the figures of the last update of each role

    # ---- training

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Run one iteration: the student's rollouts for `batch`, followed by the objective's updates in their order."""
        with attention_by(self.compute.attention):
            self._train(batch)
        self.iteration += 1
        self._log_figures()

    def _train(self, batch: PromptBatch) -> None:
        samples = self.rollouts.samples(batch, self.iteration)
        steps = steps_of(self.objective, self.iteration, self.groups.of(self.iteration))
        for left, (update, repeat) in zip(reversed(range(len(steps))), steps):
            with self.timer(update.role):
                self._make(update, [sample.again(repeat) for sample in samples], counts=left == 0)
        self.updated_roles = tuple(dict.fromkeys(update.role for update, _ in steps))
        if self.ema.is_on and "student" in self.updated_roles:
            average, student = self.networks.average["student_ema"], self.networks.student
            self.ema.follow(average, student, self.ema_updates, self.follower)
            self.ema_updates += 1

    def _make(self, update: Update, samples: Sequence[Sample], counts: bool) -> None:
        """Make one optimizer step and its merge. `counts` is True for the last step of an iteration, which Lightning counts."""
        role, trained, size = update.role, self.networks.trained, sum(map(len, samples))
        losses = ((len(sample) / size, loss) for sample in samples for loss in update.losses(sample))
        optimizer = self._optimizer(role, counts)
        if role == "student" and self.follower is not None:
            self.follower.release()
        figures = self.updates.step(role, trained, optimizer, losses, self.manual_backward, self.iteration)
        if update.merge is not None:
            lerp_parameters_(trained[role], trained[update.merge.source], update.merge.weight)
        if self.objective.observes:
            self.updates.settle()
            self.objective.observe(role, average_figures(figures), made=not self.updates.skipped_in_a_row[role])
        self._figures |= {f"{role}/{name}": value for name, value in figures.items()}

    def bind(self, prompts: Sequence[str], backbone: Backbone | None = None) -> VelocityFields:
        """Return the networks as velocity fields that are conditioned on the text of `prompts`.

        The fields take latents of the image size of `backbone` (default: `self.backbone`).
        """
        backbone, networks = backbone or self.backbone, self.networks
        text, no_text = backbone.encode_prompts(prompts), repeat_rows(backbone.encode_prompts([""]), len(prompts))
        float8 = self.compute.fp8 is not None
        return bind_networks(networks, backbone, text, no_text, self.compute_dtype, float8)

    # ---- optimizers

    def configure_optimizers(self) -> list[Optimizer]:
        """Build an optimizer for each trained role, in the order of `networks.trained`.

        Raises UserError if all weights of a role are frozen, and if an optimizer refuses the weights.
        """
        parameters = trained_parameters(self.networks)
        return [self.updates.recipes[role].build_for(role, of_role) for role, of_role in parameters.items()]

    @property
    def optimizers_by_role(self) -> dict[str, Optimizer]:
        """The optimizer of each trained role, without Lightning's wrapper."""
        return dict(zip(self.networks.trained, self.trainer.optimizers, strict=True))

    def _optimizer(self, role: str, counts: bool = False) -> Optimizer:
        """Return the optimizer of a role. With `counts` it has Lightning's wrapper, by which Lightning counts its steps."""
        wrapped = self.optimizers()  # Lightning returns a list, or a single optimizer without a list
        by_role = dict(zip(self.networks.trained, wrapped if isinstance(wrapped, list) else [wrapped], strict=True))
        return cast(Optimizer, by_role[role] if counts else by_role[role].optimizer)

    # ---- set-up and state

    @property
    def network_names(self) -> tuple[str, ...]:
        """The names (roles) of all networks of the run. This property can be read before the networks are built."""
        return network_names(self.objective.roles, self.ema.is_on)

    @property
    def whole_names(self) -> tuple[str, ...]:
        """The roles of the networks that have their own copy of the pretrained weights (see `Networks.whole`)."""
        return whole_names(self.objective.roles, self.lora, self.backbone, self.ema.is_on)

    def configure_model(self) -> None:
        """Build the networks on their devices and load the backbone's frozen parts (text encoders, image codec).

        Lightning calls this method before it restores the weights of a checkpoint. Raises UserError if the trainer's
        precision is not "32-true", and if `strategy.on_cpu` names a network that cannot be in host memory.
        """
        if hasattr(self, "networks"):
            return
        if self.trainer.precision != "32-true":
            raise UserError(
                f"trainer.precision={self.trainer.precision} must be 32-true; set the networks' precision by module.compute_dtype"
            )
        strategy = self.trainer.strategy
        check_device(self.compute.fp8, strategy.root_device, self.compute_dtype)
        with torch.device("cpu"):  # Lightning sets a default device, but random weights must not depend on the device
            empty = isinstance(strategy, MeshStrategy)  # then each process reads only its own rows of the weights
            roles = self.objective.roles
            self.networks = Networks(
                self.backbone, roles, self.compute.recomputation, self.lora, self.seed, empty, self.ema.is_on
            )
        if self.compute.fp8 is not None:
            self.networks.use_float8(self.backbone.block_types, self.compute.fp8)
        if self.compute.compile_backend is not None:
            self.networks.compile_blocks(self.backbone.block_types, self.compute.compile_backend)
        is_sharded = place(self.networks, self.backbone, strategy, self.compute_dtype)
        self.follower = follower_of(self.networks.student_ema, strategy)
        self.backbone.decode_tile = self.compute.decode_tile
        self.backbone.setup(strategy.root_device)
        self.rollouts = self.make_rollouts(strategy.root_device, is_sharded)

    def make_rollouts(self, device: torch.device, is_sharded: bool = False) -> Rollouts:
        """Return the object that makes the losses' inputs from batches of prompts, by rollouts on `device`.

        `is_sharded` is True if the processes hold shards of the networks. Each process then makes as many calls of the
        student as the process that needs the most, because every call needs all processes.
        """
        return KINDS[self.objective.rollout](
            self.bind,
            self.backbone,
            self.resolution,
            self.schedule,
            self.seed,
            device,
            groups=self.groups,
            accumulate=self.compute.accumulate,
            needs_latents=self.objective.needs_latents,
            agree_on_calls=largest if is_sharded else lambda calls: calls,
            timer=self.timer,
        )

    def on_train_end(self) -> None:
        """Wait until the thread that updates an EMA in host memory has finished the last update."""
        if self.follower is not None:
            self.follower.settle()

    def on_train_start(self) -> None:
        """Drop rollouts that an earlier `fit` computed in advance, perhaps for other prompts or by another student."""
        self.rollouts.forget()

    @property
    def fingerprint(self) -> str:
        """A string that identifies the networks: the backbone's fingerprint and the trained roles' LoRA settings.

        A run refuses a checkpoint that has another fingerprint, because such a checkpoint holds other networks.
        """
        return self.backbone.fingerprint + self.lora.tag(self.updates.recipes)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the networks' fingerprint and the counters to the checkpoint: iterations, EMA updates and skipped steps."""
        checkpoint["cdm"] = {
            "fingerprint": self.fingerprint,
            "iteration": self.iteration,
            "ema_updates": self.ema_updates,
            **self.updates.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore the counters that `on_save_checkpoint` stored in `checkpoint`."""
        state = checkpoint["cdm"]
        self.iteration, self.ema_updates = state["iteration"], state["ema_updates"] if self.ema.is_on else 0
        self.updates.load_state_dict(state)

    # ---- evaluation

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that is evaluated and exported: the student's EMA if it was updated, otherwise the student."""
        average = self.networks.student_ema
        return average if average is not None and self.ema_updates else self.networks.student

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict:
        """Generate images of the batch's B prompts with each sampler in `samplers`, and return them.

        Lightning passes the result to the callbacks. It has three keys: "prompts" holds the B prompts, "indices" (B,)
        holds their numbers, and "images" maps each sampler's name to its images (B, 3, H, W) in [0, 1]. A process that
        has no prompts left gets padding as a batch, because all processes must make equally many network calls. The
        result for padding is empty under each key.
        """
        networks = {"student": self.evaluated_network, "teacher": self.networks.teacher}
        with attention_by(self.compute.attention):
            images = generate_all(self.samplers, self.backbone, networks, batch, self.seed, self.compute_dtype)
        if PADDING in batch.indices:
            return {"prompts": [], "indices": batch.indices[:0], "images": {}}
        return {"prompts": batch.prompts, "indices": batch.indices, "images": images}

    def on_validation_epoch_end(self) -> None:
        """Log the iteration under the name "step", which loggers use as the x axis of the validation figures."""
        self.log("step", float(self.iteration))

    # ---- figures

    def _log_figures(self) -> None:
        """Log the latest figures every `log_every_n_steps` iterations. "step" becomes the x axis of all loggers."""
        # pyrefly: ignore[missing-attribute]  Lightning sets it from outside the class
        if self.iteration % self.trainer.log_every_n_steps:
            return
        self.updates.settle()
        figures: dict[str, Tensor | float] = {**average_figures(self._figures)}
        for role, skipped in self.updates.skipped_steps.items():
            figures[f"{role}/skipped_steps"] = float(skipped)
            figures[f"{role}/learning_rate"] = self._optimizer(role).param_groups[0]["lr"]
        self.log_dict({**figures, "step": float(self.iteration)}, on_step=True, on_epoch=False)
