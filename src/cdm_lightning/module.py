"""The distillation as a LightningModule: an objective trains the student, and networks beside it, on the student's rollouts.

Everything counts iterations: an iteration is one batch, one rollout and the updates that the objective asks for.
`trainer.global_step`, `max_steps`, checkpoints and logs all count that.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cdm_lightning.backbones.base import Backbone, repeat_rows
from cdm_lightning.core.ema import lerp_parameters_
from cdm_lightning.core.schedules import SigmaSchedule
from cdm_lightning.data.batches import PADDING, PromptBatch
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation import SamplerSpec, generate_all
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.networks import Networks, bind_networks, check_roles, network_names, trainable, whole_names
from cdm_lightning.objectives.base import Objective, Sample, Update, VelocityFields
from cdm_lightning.optim import OptimizerRecipe
from cdm_lightning.parallel import MeshStrategy
from cdm_lightning.ranks import largest
from cdm_lightning.recomputation import Recomputation
from cdm_lightning.resolution import OwnSize, Resolution
from cdm_lightning.sharding import average_figures, place
from cdm_lightning.training.phases import PhaseTimer
from cdm_lightning.training.rollouts import KINDS, RolloutGroups, Rollouts
from cdm_lightning.training.updates import Updates, recipes_of, steps_of

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CDMModule(L.LightningModule):
    """Distils `backbone` by `objective`: Continuous-Time Distribution Matching (arXiv:2605.06376), or any other.

    `optim` has an optimizer recipe for each role that the objective trains, `lora` says which of them are adapters on a frozen
    base, `schedule` draws the sigmas of rollouts, `resolution` the image sizes. With `samplers` validation generates images.
    Networks compute in `compute_dtype` ("float32", "bfloat16"); trained weights, gradients, sigmas and losses are always
    float32. A batch is computed in `accumulate` parts, one after another, with the result of the whole. The share
    `gradient_checkpointing` of the blocks recompute their activations in the backward pass, that of attention only with
    `recompute_attention`. `compile_backend` (of torch.compile, for example "inductor") compiles the networks' blocks. At most
    `rollouts_together` iterations between two updates of the student roll out as one batch. All random draws are functions
    of (`seed`, iteration, slot in the global batch).

    `iteration` counts the finished iterations, `ema_updates` those of `networks.student_ema` (made by the callback
    `StudentEMA`). `updated_roles` were updated in the last iteration. Raises `UserError` for an argument out of its range.
    """

    networks: Networks  # from `configure_model` on, when the device is known, as are `rollouts`
    rollouts: Rollouts

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        schedule: SigmaSchedule,
        optim: Mapping[str, OptimizerRecipe],
        samplers: Sequence[SamplerSpec] = (),
        seed: int = 0,
        compute_dtype: str = "float32",
        gradient_checkpointing: float | bool = False,
        lora: LoRAPlan | None = None,
        resolution: Resolution | None = None,
        accumulate: int = 1,
        compile_backend: str | None = None,
        recompute_attention: bool = True,
        rollouts_together: int = 2,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name, count in (("accumulate", accumulate), ("rollouts_together", rollouts_together)):
            if count < 1:
                raise UserError(f"module: {name} must be at least 1, got {count}")
        if compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"module: compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {compute_dtype!r}")
        self.lora, self.resolution = lora or LoRAPlan(), resolution or OwnSize()
        self.backbone, self.objective, self.schedule = backbone, objective, schedule
        self.updates = Updates(recipes_of(objective, optim))
        check_roles(objective, self.lora, backbone)
        self.samplers, self.seed = list(samplers or ()), seed
        self.compute_dtype = COMPUTE_DTYPES[compute_dtype]
        self.recomputation = Recomputation(float(gradient_checkpointing), recompute_attention)
        self.accumulate, self.compile_backend = accumulate, compile_backend
        self.groups = RolloutGroups(
            rollouts_together, objective.student_period if objective.rollout == "to_anchor" else None
        )
        self.timer = PhaseTimer()
        self.iteration = self.ema_updates = 0
        self.updated_roles: tuple[str, ...] = ()
        self._figures: dict[str, Tensor] = {}  # of the last update of each role

    # ---- the algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: noise, sigmas, length, walk to the anchor, point; then the objective's updates in their order."""
        samples = self.rollouts.samples(batch, self.iteration)
        steps = steps_of(self.objective, self.iteration, self.groups.of(self.iteration))
        for left, (update, repeat) in zip(reversed(range(len(steps))), steps):
            with self.timer(update.role):
                self._make(update, [sample.again(repeat) for sample in samples], counts=left == 0)
        self.updated_roles = tuple(dict.fromkeys(update.role for update, _ in steps))
        self.iteration += 1
        self._log_figures()

    def _make(self, update: Update, samples: Sequence[Sample], counts: bool) -> None:
        """One optimizer step and the merge after it; `counts` marks the last step of an iteration, which Lightning counts."""
        role, trained, size = update.role, self.networks.trained, sum(map(len, samples))
        losses = ((len(sample) / size, loss) for sample in samples for loss in update.losses(sample))
        optimizer = self._optimizer(role, counts)
        figures = self.updates.step(role, trained, optimizer, losses, self.manual_backward, self.iteration)
        if update.merge is not None:
            lerp_parameters_(trained[role], trained[update.merge.source], update.merge.weight)
        if self.objective.observes:
            self.objective.observe(role, average_figures(figures), made=not self.updates.skipped_in_a_row[role])
        self._figures |= {f"{role}/{name}": value for name, value in figures.items()}

    def bind(self, prompts: Sequence[str], backbone: Backbone | None = None) -> VelocityFields:
        """The networks as velocity fields of these prompts, at the image size of `backbone` (default: `self.backbone`)."""
        backbone, networks = backbone or self.backbone, self.networks
        text, no_text = backbone.encode_prompts(prompts), repeat_rows(backbone.encode_prompts([""]), len(prompts))
        return bind_networks(networks, backbone, text, no_text, self.compute_dtype)

    # ---- optimizers

    def configure_optimizers(self) -> list[Optimizer]:
        """An optimizer for each trained role, in the order of `networks.trained`; UserError for a role that is all frozen."""
        parameters = {role: trainable(network) for role, network in self.networks.trained.items()}
        if frozen := [role for role, those in parameters.items() if not those]:
            raise UserError(
                f"objective: the network {frozen[0]} has no weight to train; leave some unfrozen in Role.build"
            )
        return [self.updates.recipes[role].build(those) for role, those in parameters.items()]

    @property
    def optimizers_by_role(self) -> dict[str, Optimizer]:
        """Each trained network's optimizer, itself."""
        return dict(zip(self.networks.trained, self.trainer.optimizers, strict=True))

    def _optimizer(self, role: str, counts: bool = False) -> Optimizer:
        """A network's optimizer: wrapped, so that Lightning counts its step, or bare."""
        wrapped = self.optimizers()  # Lightning returns a single one as it is
        by_role = dict(zip(self.networks.trained, wrapped if isinstance(wrapped, list) else [wrapped], strict=True))
        return cast(Optimizer, by_role[role] if counts else by_role[role].optimizer)

    # ---- set-up and state

    @property
    def network_names(self) -> tuple[str, ...]:
        """The names of all networks, before they are built."""
        return network_names(self.objective.roles)

    @property
    def whole_names(self) -> tuple[str, ...]:
        """The names of those that will be whole pretrained networks of their own (`Networks.whole`)."""
        return whole_names(self.objective.roles, self.lora, self.backbone)

    def configure_model(self) -> None:
        """Build the networks and load the frozen parts; called by Lightning before weights are restored.

        Raises UserError for a trainer's precision other than "32-true".
        """
        if hasattr(self, "networks"):
            return
        if self.trainer.precision != "32-true":
            raise UserError("trainer.precision must stay 32-true: set the networks' precision by module.compute_dtype")
        strategy = self.trainer.strategy
        with torch.device("cpu"):  # Lightning sets the default device here, and weights must not depend on it
            empty = isinstance(strategy, MeshStrategy)  # each process then reads its own rows
            roles = self.objective.roles
            self.networks = Networks(self.backbone, roles, self.recomputation, self.lora, self.seed, empty)
        if self.compile_backend is not None:
            self.networks.compile_blocks(self.backbone.block_types, self.compile_backend)
        is_sharded = place(self.networks, self.backbone, strategy, self.compute_dtype)
        self.backbone.setup(strategy.root_device)
        self.rollouts = self.make_rollouts(strategy.root_device, is_sharded)

    def make_rollouts(self, device: torch.device, is_sharded: bool = False) -> Rollouts:
        """What turns batches into samples on `device`; processes that share sharded networks agree on the number of calls."""
        return KINDS[self.objective.rollout](
            self.bind,
            self.backbone,
            self.resolution,
            self.schedule,
            self.seed,
            device,
            groups=self.groups,
            accumulate=self.accumulate,
            needs_latents=self.objective.needs_latents,
            agree_on_calls=largest if is_sharded else lambda calls: calls,
            timer=self.timer,
        )

    def on_train_start(self) -> None:
        """Forget rollouts of an earlier training, of other prompts or another student."""
        self.rollouts.forget()

    @property
    def fingerprint(self) -> str:
        """That of the backbone and the adapters in use: checkpoints of another fingerprint do not fit."""
        return self.backbone.fingerprint + self.lora.tag(self.updates.recipes)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the counters, and the fingerprint of the networks that all of it belongs to."""
        checkpoint["cdm"] = {
            "fingerprint": self.fingerprint,
            "iteration": self.iteration,
            "ema_updates": self.ema_updates,
            **self.updates.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take the counters back."""
        state = checkpoint["cdm"]
        self.iteration, self.ema_updates = state["iteration"], state["ema_updates"]
        self.updates.load_state_dict(state)

    # ---- evaluation

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that is evaluated and exported: the student's average once there is one."""
        return self.networks.student_ema if self.ema_updates else self.networks.student

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict:
        """Generate once for all callbacks: {"prompts", "indices" (B,), "images": {sampler: (B, 3, H, W) in [0, 1]}}.

        Without prompts and images for a batch that is there only so that all processes make equally many calls.
        """
        networks = {"student": self.evaluated_network, "teacher": self.networks.teacher}
        images = generate_all(self.samplers, self.backbone, networks, batch, self.seed, self.compute_dtype)
        if PADDING in batch.indices:
            return {"prompts": [], "indices": batch.indices[:0], "images": {}}
        return {"prompts": batch.prompts, "indices": batch.indices, "images": images}

    def on_validation_epoch_end(self) -> None:
        """Give validation figures the iteration as their place on the x axis."""
        self.log("step", float(self.iteration))

    # ---- figures

    def _log_figures(self) -> None:
        """Log the latest figures every `log_every_n_steps` iterations; "step" becomes the x axis of all loggers."""
        # pyrefly: ignore[missing-attribute]  Lightning sets it from elsewhere
        if self.iteration % self.trainer.log_every_n_steps:
            return
        figures: dict[str, Tensor | float] = {**average_figures(self._figures)}
        for role, skipped in self.updates.skipped_steps.items():
            figures[f"{role}/skipped_steps"] = float(skipped)
            figures[f"{role}/learning_rate"] = self._optimizer(role).param_groups[0]["lr"]
        self.log_dict({**figures, "step": float(self.iteration)}, on_step=True, on_epoch=False)
