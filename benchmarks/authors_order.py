"""The authors' order of work as a plain loop on the same networks, for comparison: the same mathematics, nothing shared.

Rollouts run to their end, the text encoders in every iteration; the student is called once for each of its three terms, the
teacher and the fake score once for each prediction; gradient norms, merge and average go parameter by parameter. What it
computes on the same random numbers equals `CDMModule.training_step` to float rounding, which the benchmark checks.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cdm_lightning.backbones.base import BoundField
from cdm_lightning.core.ema import warmed_up_decay
from cdm_lightning.core.flow import interpolate, predict_x0
from cdm_lightning.core.losses import directed_loss, flow_matching_loss
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint, simulate
from cdm_lightning.data.batches import PromptBatch
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.cdm import CDMObjective


@dataclass
class AuthorsOrder:
    """Iterations on the networks and settings of `module`, with optimizers of its own."""

    module: CDMModule
    optimizers: dict[str, Optimizer]
    ema_decay: float = 0.999
    ema_updates: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def iteration(self, batch: PromptBatch, number: int) -> None:
        """Iteration `number`, from text to average."""
        module, networks, objective = self.module, self.module.networks, self.module.objective
        rng = StepRandom(module.seed, number, batch.indices.tolist(), module.device)
        with self._phase("text"):
            fields = self._bind(batch.prompts)
        with self._phase("rollout"):
            point = self._full_rollout(fields["student"], rng)
        with self._phase("fake_score"):
            self._update("fake_score", self._fake_score_loss(fields["fake_score"], point, rng), number)
            for target, source in zip(networks.fake_score.parameters(), networks.student.parameters(), strict=True):
                target.data.mul_(1 - objective.fake_score_merge).add_(source.data, alpha=objective.fake_score_merge)
        if number % objective.student_every == objective.student_every - 1:
            with self._phase("student"):
                self._update("student", self._student_loss(fields, point, rng), number)
                decay = warmed_up_decay(self.ema_updates, self.ema_decay)
                for target, source in zip(networks.student_ema.parameters(), networks.student.parameters()):
                    target.data.mul_(decay).add_(source.data, alpha=1 - decay)
                self.ema_updates += 1

    def _bind(self, prompts: Sequence[str]) -> dict[str, BoundField]:
        backbone, networks = self.module.backbone, self.module.networks
        if backbone.text_memory is None:
            text, no_text = backbone.encode_prompts(prompts), backbone.encode_prompts([""] * len(prompts))
        else:
            text, no_text = backbone._encode(list(prompts)), backbone._encode([""] * len(prompts))
        chosen = {
            "student": (networks.student, text),
            "fake_score": (networks.fake_score, text),
            "teacher": (networks.teacher, text),
            "teacher_uncond": (networks.teacher, no_text),
        }
        dtype = self.module.compute_dtype
        return {name: BoundField(backbone, network, cond, dtype) for name, (network, cond) in chosen.items()}

    def _full_rollout(self, student: BoundField, rng: StepRandom) -> TrajectoryPoint:
        sigmas = self.module.schedule.sample(rng, self.module.backbone.shift_steps)
        noise = rng.normal("rollout.noise", self.module.backbone.latent_shape)
        return simulate(student, noise, sigmas).at(rng.index("rollout.anchor", sigmas.shape[1] - 1))

    def _fake_score_loss(self, fake_score: BoundField, point: TrajectoryPoint, rng: StepRandom) -> Tensor:
        levels, shift = self.module.objective.fake_score_levels, self.module.backbone.shift_sigmas
        sigma = levels.sample(rng, "fake_score.sigma", point.sigma, shift)
        noise = rng.normal("fake_score.noise", point.x0.shape[1:])
        return flow_matching_loss(fake_score(interpolate(point.x0, noise, sigma), sigma), point.x0, noise)

    def _student_loss(self, fields: dict[str, BoundField], point: TrajectoryPoint, rng: StepRandom) -> Tensor:
        objective, shift = self.module.objective, self.module.backbone.shift_sigmas
        total = 0.0
        for term in ("ca", "dm", "cdm"):
            seen, x = point.sigma, point.x
            if term == "cdm":
                seen = objective.target_levels.sample(rng, "cdm.target", point.sigma, shift)
                x = point.move_to(seen)
            x0 = predict_x0(fields["student"], x, seen)
            sigma = getattr(objective, f"{term}_levels").sample(rng, f"{term}.sigma", seen, shift)
            noised = interpolate(x0.detach(), rng.normal(f"{term}.noise", x0.shape[1:]), sigma)
            with torch.no_grad():
                teacher = predict_x0(fields["teacher"], noised, sigma)
                other = predict_x0(fields["teacher_uncond" if term == "ca" else "fake_score"], noised, sigma)
                delta = (objective.guidance_scale if term == "ca" else 1.0) * (teacher - other)
            total = total + directed_loss(x0, delta, teacher, objective.norm_floor)
        return total

    def _update(self, name: str, loss: Tensor, number: int) -> None:
        recipe, optimizer = self.module.updates.recipes[name], self.optimizers[name]
        recipe.set_learning_rate(optimizer, number)
        loss.backward()
        parameters = getattr(self.module.networks, name).parameters()
        norm = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm, foreach=False)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        self.losses[name] = loss.detach()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def without_merge(objective: CDMObjective) -> CDMObjective:
    """The objective with a fake score that is not averaged with the student."""
    return replace(objective, fake_score_merge=0.0)
