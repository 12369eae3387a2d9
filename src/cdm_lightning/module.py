"""The distillation as a LightningModule: two networks trained in turn on the student's own rollouts.

Everything counts iterations: an iteration is one batch, one rollout and `fake_score_steps` updates of the fake score (one,
as published), and at every `student_every`-th one an update of the student. `trainer.global_step`, `max_steps`,
checkpoints and logs all count that.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cdm_lightning.backbones.base import Backbone, BoundField, repeat_rows
from cdm_lightning.core.ema import lerp_parameters_
from cdm_lightning.core.flow import VelocityField
from cdm_lightning.core.objective import Objective, TermLosses, VelocityFields
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import Rollout, TrajectoryPoint, simulate, walk
from cdm_lightning.core.schedules import SigmaSchedule
from cdm_lightning.data.batches import PADDING, PromptBatch, spans
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation import SamplerSpec, generate
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.networks import Networks
from cdm_lightning.optim import OptimizerRecipe
from cdm_lightning.parallel import MeshStrategy
from cdm_lightning.ranks import largest
from cdm_lightning.recomputation import Recomputation
from cdm_lightning.resolution import OwnSize, Resolution
from cdm_lightning.sharding import average_figures, average_whole_gradients, distribute, whole

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """What is computed at once: the networks bound to some samples of the batch, their draws, rollouts and points."""

    fields: VelocityFields
    rng: StepRandom
    backbone: Backbone  # at the image size of this iteration
    share: float  # of the batch
    rollout: Rollout | None = None
    point: TrajectoryPoint | None = None  # known after the rollout

    def split(self, count: int) -> list["Part"]:
        """This in `count` parts whose sizes differ by 1 at most, or in single samples if there are fewer."""
        return [self._select(span) for span in spans(len(self.rng), count)]

    def _select(self, rows: slice) -> "Part":
        rng = self.rng.select(rows)
        share = self.share * len(rng) / len(self.rng)
        return Part(self.fields.select(rows), rng, self.backbone, share, point=self.point.select(rows))


class CDMModule(L.LightningModule):
    """Continuous-Time Distribution Matching (arXiv:2605.06376), or any other `objective` on the same rollouts.

    The student is updated in the last of every `student_every` iterations; the fake score `fake_score_steps` times in
    each, on the same clean predictions with fresh noise and sigma, and after each of its own updates it is merged with
    the student by the weight `fake_score_merge` (0: not at all). `samplers` are the ways in which validation generates
    images. Networks compute in `compute_dtype` ("float32", "bfloat16"); trained weights, gradients, sigmas and losses are
    float32 always. `lora` says which of the networks are adapters on a frozen base, `resolution` at which sizes of image
    they are trained. A batch is computed in `accumulate` parts, one after another, with the result of the whole.
    The share `gradient_checkpointing` of the blocks recompute their activations in the backward pass, that of attention
    only with `recompute_attention`.
    `compile_backend` (of torch.compile, for example "inductor") compiles the networks' blocks. All random draws are
    functions of (`seed`, iteration, slot in the global batch).

    `iteration` counts the finished iterations, `ema_updates` those of `networks.student_ema` (made by the callback
    `StudentEMA`), `skipped_steps` the updates left out for a loss or gradient that was not finite, `skipped_in_a_row` those
    since the last one that was not left out. Raises `UserError` for an argument out of its range.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        schedule: SigmaSchedule,
        student_optim: OptimizerRecipe,
        fake_score_optim: OptimizerRecipe,
        student_every: int = 2,
        fake_score_steps: int = 1,
        fake_score_merge: float = 1e-3,
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
        spread_anchors: bool = False,
    ) -> None:
        super().__init__()
        for name, count in (("accumulate", accumulate), ("rollouts_together", rollouts_together)):
            if count < 1:
                raise UserError(f"module: {name} must be at least 1, got {count}")
        if student_every < 1 or fake_score_steps < 1 or not 0 <= fake_score_merge <= 1:
            raise UserError(
                "module: student_every and fake_score_steps must be at least 1, fake_score_merge must lie in [0, 1]"
            )
        if not 0 <= gradient_checkpointing <= 1:
            raise UserError(
                f"module: gradient_checkpointing is a share of the blocks, from 0 to 1, got {gradient_checkpointing}"
            )
        if compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"module: compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {compute_dtype!r}")
        self.lora, self.resolution = lora or LoRAPlan(), resolution or OwnSize()
        self.lora.check(backbone.lora_targets, fake_score_merge)
        self.automatic_optimization = False
        self.backbone, self.objective, self.schedule = backbone, objective, schedule
        self.recipes = {"student": student_optim, "fake_score": fake_score_optim}
        self.student_every, self.fake_score_steps = student_every, fake_score_steps
        self.fake_score_merge = fake_score_merge
        self.samplers, self.seed = list(samplers or ()), seed
        self.compute_dtype = COMPUTE_DTYPES[compute_dtype]
        self.recomputation = Recomputation(float(gradient_checkpointing), recompute_attention)
        self.accumulate, self.compile_backend = accumulate, compile_backend
        self.rollouts_together, self.spread_anchors = rollouts_together, spread_anchors
        self._walked: dict[int, list[Part]] = {}  # by iteration: parts at their anchors that wait for their turn
        self.networks: Networks | None = None  # built by `configure_model`, when the device is known
        self.is_sharded = False
        self.iteration = 0
        self.ema_updates = 0
        self.skipped_steps = {"student": 0, "fake_score": 0}
        self.skipped_in_a_row = {"student": 0, "fake_score": 0}
        self.time_phases = False  # set by a monitor: wait for the device around each phase, so that times are true
        self.phase_seconds: dict[str, float] = {}  # in all, since the start of this process
        self._health: dict[str, Tensor] = {}

    # ---- the algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: rollout, anchor, fake score, merge and, in its turn, student; each in `accumulate` parts."""
        parts = self._parts_at_anchors(batch)
        with self._phase("rollout"):
            parts = [self._with_point(part) for part in parts]
        with self._phase("fake_score"):
            for step in range(self.fake_score_steps):
                losses = self.fake_score_losses(parts, step)
                self._update("fake_score", losses, counts=step == self.fake_score_steps - 1)
                self._merge_fake_score()
        if self.is_student_turn:
            with self._phase("student"):
                self._update("student", self._student_losses(parts))
        self.iteration += 1
        self._log_health()

    def _parts_at_anchors(self, batch: PromptBatch) -> list[Part]:
        """The batch's parts, walked to their anchors; with the first batch of those that are rolled out together, all walk."""
        if self.iteration not in self._walked:
            iterations = self.rolled_out_together(self.iteration)
            batches = dict(zip(iterations, batch.together, strict=True)) if batch.together else {self.iteration: batch}
            drawn = [self._parts(one, iteration) for iteration, one in batches.items()]
            with self._phase("rollout"):
                walked = zip(*(self._walk(parts) for parts in zip(*drawn)))  # the first parts of all, then the second
            self._walked = dict(zip(batches, map(list, walked)))
        return self._walked.pop(self.iteration)

    def _parts(self, batch: PromptBatch, iteration: int) -> list[Part]:
        return [
            self._part(part, len(part.prompts) / len(batch.prompts), iteration) for part in batch.split(self.accumulate)
        ]

    def _part(self, batch: PromptBatch, share: float, iteration: int) -> Part:
        rng = StepRandom(self.seed, iteration, batch.indices.tolist(), self.device)
        backbone = self.resolution.draw(self.backbone, rng)
        fields = self.bind(batch.prompts, backbone)
        return Part(fields, rng, backbone, share, self.draw_rollout(fields.student, rng, backbone))

    def _walk(self, parts: Sequence[Part]) -> list[Part]:
        if self.objective.needs_full_rollout:
            return list(parts)
        walked = walk([part.rollout for part in parts], self._agree_on_calls)
        return [replace(part, rollout=rollout) for part, rollout in zip(parts, walked)]

    def _with_point(self, part: Part) -> Part:
        """The part at its point, where the student may have been called with gradient; full rollouts keep no graph."""
        rollout = part.rollout
        if self.objective.needs_full_rollout:
            point = simulate(rollout.student, rollout.noise, rollout.sigmas).at(rollout.anchor)
        else:
            point = rollout.point(with_grad=self.trains_at_anchor(self.iteration))
        return replace(part, rollout=None, point=point)

    def fake_score_losses(self, parts: Sequence[Part], step: int) -> Iterator[tuple[float, TermLosses]]:
        """(share of the batch, loss) of each part, computed when it is asked for, in the `step`-th update of an iteration.

        Beside a graph of the student's that waits for its turn, a part is computed in halves: one graph and a half in memory,
        not two. With every block recomputed graphs are small.
        """
        for part in parts:
            waiting = part.point.v_with_grad is not None and self.recomputation.share < 1
            for one in part.split(2) if waiting else [part]:
                rng, shift = one.rng.again(step), one.backbone.shift_sigmas
                yield one.share, self.objective.fake_score_loss(one.fields, one.point, rng, shift)

    def _student_losses(self, parts: Sequence[Part]) -> Iterator[tuple[float, TermLosses]]:
        """(share of the batch, summand of the loss) of each part, computed when it is asked for."""
        for part in parts:
            shift = part.backbone.shift_sigmas
            for one in self.objective.student_losses(part.fields, part.point, part.rng, shift, self.iteration):
                yield part.share, one

    def bind(self, prompts: Sequence[str], backbone: Backbone | None = None) -> VelocityFields:
        """The networks as velocity fields of these prompts, at the image size of `backbone` (default: the own one)."""
        backbone = backbone or self.backbone
        text, no_text = backbone.encode_prompts(prompts), repeat_rows(backbone.encode_prompts([""]), len(prompts))
        networks = self.networks
        return VelocityFields(
            student=BoundField(backbone, networks.student, text, self.compute_dtype),
            fake_score=BoundField(backbone, networks.fake_score, text, self.compute_dtype),
            teacher=BoundField(backbone, networks.teacher, text, self.compute_dtype),
            teacher_uncond=BoundField(backbone, networks.teacher, no_text, self.compute_dtype),
        )

    def draw_rollout(self, student: VelocityField, rng: StepRandom, backbone: Backbone | None = None) -> Rollout:
        """Backward simulation with the student and one anchor a sample, as drawn: nothing is walked yet."""
        backbone = backbone or self.backbone
        sigmas = self.schedule.sample(rng, backbone.shift_steps)
        noise = rng.normal("rollout.noise", backbone.latent_shape)
        draw = rng.spread_index if self.spread_anchors else rng.index
        return Rollout(student, noise, sigmas, draw("rollout.anchor", sigmas.shape[1] - 1))

    def _agree_on_calls(self, calls: int) -> int:
        """How many network calls a rollout makes: as many as the longest of the processes that share one network."""
        return largest(calls) if self.is_sharded else calls

    def rolled_out_together(self, iteration: int) -> range:
        """The iterations whose rollouts walk as one batch with that of `iteration`: between two updates of the student.

        Each for itself where points come from full rollouts, which keep all their states.
        """
        if self.objective.needs_full_rollout:
            return range(iteration, iteration + 1)
        in_turn = iteration % self.student_every
        first = iteration - in_turn % self.rollouts_together
        return range(first, min(first + self.rollouts_together, iteration - in_turn + self.student_every))

    @property
    def is_student_turn(self) -> bool:
        """Whether the student is updated in the current iteration."""
        return self._is_turn(self.iteration)

    def _is_turn(self, iteration: int) -> bool:
        return iteration % self.student_every == self.student_every - 1

    def trains_at_anchor(self, iteration: int) -> bool:
        """Whether the student is trained on its rollout's call at the anchor in this iteration (counted from 0).

        That saves a call, and keeps its graph while the fake score is updated. So not where the batch is computed in parts,
        each of which would keep one. Full rollouts keep none.
        """
        possible = self.accumulate == 1 and not self.objective.needs_full_rollout
        return possible and self._is_turn(iteration) and self.objective.trains_at_anchor(iteration)

    def _merge_fake_score(self) -> None:
        if self.fake_score_merge:
            lerp_parameters_(self.networks.fake_score, self.networks.student, self.fake_score_merge)

    def _update(self, name: str, losses: Iterable[tuple[float, TermLosses]], counts: bool = False) -> None:
        """One clipped step of a network on (share, summand) of the batch's parts; left out if its gradient is not finite.

        Each summand's backward pass runs before the next one is computed. Steps left out are counted. The one update
        of an iteration that `counts` is made where Lightning sees and counts it. Whether the gradient is finite is the one
        thing that the host waits for in each update.
        """
        recipe, optimizer = self.recipes[name], self._optimizer(name, counts)
        recipe.set_learning_rate(optimizer, self.iteration)
        figures: dict[str, Tensor] = {}
        for share, one in losses:
            self.manual_backward(one.total * share * unless_infinite(one.total))
            for key, value in {"loss": one.total, **one.terms, **one.logs}.items():
                figures[key] = figures.get(key, 0.0) + share * value.detach()
        parameters = list(getattr(self.networks, name).parameters())
        average_whole_gradients(parameters)
        norm = whole(nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
        finite = bool(torch.isfinite(norm))
        self.skipped_in_a_row[name] = 0 if finite else self.skipped_in_a_row[name] + 1
        if not finite:
            self.skipped_steps[name] += 1
            optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing, but Lightning counts it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        figures["grad_norm"] = norm.detach()
        self._health.update({f"{name}/{key}": value for key, value in figures.items()})

    # ---- optimizers

    def configure_optimizers(self) -> list[Optimizer]:
        """The fake score's optimizer and the student's."""
        networks = self.networks
        trained = {"fake_score": networks.fake_score, "student": networks.student}
        return [self.recipes[name].build(network.parameters()) for name, network in trained.items()]

    @property
    def optimizers_by_role(self) -> dict[str, Optimizer]:
        """Each trained network's optimizer, itself."""
        fake_score, student = self.trainer.optimizers
        return {"fake_score": fake_score, "student": student}

    def _optimizer(self, name: str, counts: bool = False) -> Optimizer:
        """A network's optimizer: wrapped, so that Lightning counts its step, or bare."""
        wrapped = dict(zip(("fake_score", "student"), self.optimizers()))[name]
        return wrapped if counts else wrapped.optimizer

    # ---- set-up and state

    def configure_model(self) -> None:
        """Build the networks and load the frozen parts; called by Lightning before weights are restored."""
        if self.networks is not None:
            return
        if self.trainer.precision != "32-true":
            raise UserError("trainer.precision must stay 32-true: set the networks' precision by module.compute_dtype")
        device = self.trainer.strategy.root_device
        with torch.device("cpu"):  # Lightning sets the default device here; weights shall not depend on it
            empty = isinstance(self.trainer.strategy, MeshStrategy)  # each process then reads its own rows
            self.networks = Networks(self.backbone, self.recomputation, self.lora, self.seed, empty)
        if self.compile_backend is not None:
            self.networks.compile_blocks(self.backbone.block_types, self.compile_backend)
        if isinstance(self.trainer.strategy, MeshStrategy):
            distribute(self.networks, self.backbone, self.trainer.strategy, self.compute_dtype)
            self.is_sharded = self.trainer.strategy.shards > 1
        else:
            self.networks.place(device)
        self.backbone.setup(device)

    def on_train_start(self) -> None:
        """Forget rollouts of an earlier training, of other prompts or another student."""
        self._walked = {}

    @property
    def fingerprint(self) -> str:
        """That of the backbone and the LoRA settings: checkpoints of another fingerprint do not fit."""
        return self.backbone.fingerprint + self.lora.tag

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the counters, and the fingerprint of the networks that all of it belongs to."""
        checkpoint["cdm"] = {
            "fingerprint": self.fingerprint,
            "iteration": self.iteration,
            "ema_updates": self.ema_updates,
            "skipped_steps": dict(self.skipped_steps),
            "skipped_in_a_row": dict(self.skipped_in_a_row),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take the counters back."""
        state = checkpoint["cdm"]
        self.iteration, self.ema_updates = state["iteration"], state["ema_updates"]
        self.skipped_steps = dict(state["skipped_steps"])
        self.skipped_in_a_row = dict(state["skipped_in_a_row"])

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
        images = {
            spec.name: generate(
                self.backbone,
                networks[spec.network],
                spec,
                batch.prompts,
                batch.indices.tolist(),
                seed=self.seed,
                batch_size=len(batch.prompts),
                compute_dtype=self.compute_dtype,
            )
            for spec in self.samplers
        }
        if PADDING in batch.indices:
            return {"prompts": [], "indices": batch.indices[:0], "images": {}}
        return {"prompts": batch.prompts, "indices": batch.indices, "images": images}

    def on_validation_epoch_end(self) -> None:
        """Give validation figures the iteration as their place on the x axis."""
        self.log("step", float(self.iteration))

    # ---- health figures

    def _log_health(self) -> None:
        """Log the latest figures every `log_every_n_steps` iterations; "step" becomes the x axis of all loggers."""
        if self.iteration % self.trainer.log_every_n_steps:
            return
        figures: dict[str, Tensor | float] = average_figures(self._health)
        for name in self.recipes:
            figures[f"{name}/skipped_steps"] = float(self.skipped_steps[name])
            figures[f"{name}/learning_rate"] = self._optimizer(name).param_groups[0]["lr"]
        self.log_dict({**figures, "step": float(self.iteration)}, on_step=True, on_epoch=False)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `phase_seconds[name]`."""
        wait = self.time_phases and self.device.type == "cuda"
        if wait:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        yield
        if wait:
            torch.cuda.synchronize(self.device)
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.perf_counter() - start


def unless_infinite(loss: Tensor) -> Tensor:
    """1, or NaN for a loss that is not finite: then so are all gradients, and all processes leave the update out."""
    return torch.where(loss.detach().isfinite(), 1.0, float("nan"))
