"""The callback that measures the health of a run during training, and says in plain words what is wrong."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

from cdm_lightning.core.flow import GuidedField
from cdm_lightning.core.rng import StepRandom, evaluation_noise
from cdm_lightning.core.rollout import sample
from cdm_lightning.core.schedules import inference_sigmas
from cdm_lightning.core.transfer import Fetched
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.distributed.sharding import average_figures
from cdm_lightning.ends.optional import may_fail
from cdm_lightning.errors import UserError
from cdm_lightning.files import append_text
from cdm_lightning.kinds import Count, Guidance, Pictures, Several, Steps
from cdm_lightning.metrics.colour import ColourStatistics
from cdm_lightning.training.attention import attention_by
from cdm_lightning.training.health import against, image_figures, rms, score_figures, some_weights, squares
from cdm_lightning.training.verdicts import WINDOW, Kind, Reading, findings, verdict, window_mean

if TYPE_CHECKING:
    from cdm_lightning.data.batches import PromptBatch
    from cdm_lightning.module import CDMModule
    from cdm_lightning.objectives.base import VelocityFields

FILE = "health.jsonl"
KEPT = 1000  # readings that verdicts look back on


class HealthMonitor(L.Callback):
    """Measure the health of the run every `every` student updates, and log window means as `health/NAME`.

    Each process makes `per_prompt` images of each of `num_prompts` validation prompts, by the student in `steps` steps. The
    noise is always the same, so figures differ between measurements only because the networks do. The teacher makes its
    images once, in `teacher_steps` steps with `guidance_scale`. `replay` is the number of measurements after which
    samples are used again as earlier samples of the student. `patch` is the side of a patch in pixels. docs/health.md
    describes the figures.

    The figures of all processes are averaged. They are read, logged and judged every `trainer.log_every_n_steps`
    iterations. When the verdict changes, a line is printed; all readings and verdicts are appended to health.jsonl in
    the run's folder. `stop_on` lists the kinds of findings that stop the run (see `training.verdicts.Kind`). Checkpoints
    hold the readings; the samples for the replay are collected again after a resume. Training's random numbers do not change.
    """

    def __init__(
        self,
        every: Count = 25,
        num_prompts: Pictures = 2,
        per_prompt: Several = 4,
        steps: Steps = 4,
        teacher_steps: Steps = 20,
        guidance_scale: Guidance = 1.0,
        replay: Count = 4,
        patch: Several = 16,
        stop_on: Sequence[Kind] = (),
    ) -> None:
        self.every, self.num_prompts, self.per_prompt, self.steps = every, num_prompts, per_prompt, steps
        self.teacher_steps, self.guidance_scale, self.replay = teacher_steps, guidance_scale, replay
        self.stop_on, self.colour = tuple(stop_on), ColourStatistics(patch)
        self.updates, self.readings, self.said, self.skipped = 0, list[Reading](), "", 0
        self.told: list[str] = []  # the kinds of the last findings, or "healthy"
        self._forget()

    def _forget(self) -> None:
        self._before: list[Tensor] | None = None
        self._earlier: list[Tensor] = []  # the student's samples of the last measurements
        self._teacher: dict[str, Tensor] = {}
        self._unread: list[tuple[int, list[str], Fetched]] = []
        self._texts: list[str] = []
        self._numbers: list[int] = []  # of the noise of each sample, different in each process

    # ---- Lightning's hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Choose the prompts of this process. Raises `UserError` if the run has no validation prompts."""
        self._forget()
        if not self.updates:  # steps that were skipped before this callback was added are not its to report
            self.skipped = sum(pl_module.updates.skipped_steps.values())
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule) or not data.val_prompts:
            raise UserError(
                "callbacks.health needs validation prompts, and data.val_prompts is 0; set it to at least 1"
            )
        first = trainer.global_rank * self.num_prompts
        places = [(first + number) % data.val_prompts for number in range(self.num_prompts)]
        self._texts = [data.val[place] for place in places for _ in range(self.per_prompt)]
        self._numbers = [first * self.per_prompt + number for number in range(len(self._texts))]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: "CDMModule", *_: object) -> None:
        """Copy some of the student's weights if the next update of the student is measured."""
        if (self.updates + 1) % self.every == 0:
            self._before = some_weights(pl_module.networks.student)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "CDMModule", outputs: object, batch: "PromptBatch", *_: object
    ) -> None:
        """Measure if it is due after this iteration, and log and judge every `trainer.log_every_n_steps` iterations."""
        if "student" in pl_module.updated_roles:
            self.updates += 1
            if self.updates % self.every == 0:
                self._measure(pl_module)
        # pyrefly: ignore[missing-attribute]  Lightning sets this attribute from another module
        if pl_module.iteration % trainer.log_every_n_steps == 0 and self._unread:
            self._read(trainer, pl_module)
            recent = self.readings[-WINDOW:]
            means = {name: window_mean(recent, name) for name in recent[-1].figures}
            pl_module.log_dict({f"health/{name}": value for name, value in means.items() if value is not None})

    def on_train_end(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Judge the last measurements, and print the last verdict."""
        self._read(trainer, pl_module)
        if trainer.is_global_zero and self.readings:
            print(f"health at the end: {self.said}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the count of student updates, the readings and the last verdict for a checkpoint."""
        unread = [_reading(*entry) for entry in self._unread]
        readings = [[reading.iteration, dict(reading.figures)] for reading in [*self.readings, *unread]]
        return {
            "updates": self.updates,
            "readings": readings,
            "said": self.said,
            "told": self.told,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.updates, self.skipped = state_dict["updates"], state_dict["skipped"]
        self.said, self.told = state_dict["said"], list(state_dict["told"])
        self.readings = [Reading(iteration, figures) for iteration, figures in state_dict["readings"]]

    # ---- measuring

    @torch.no_grad()
    def _measure(self, pl_module: "CDMModule") -> None:
        after, before = some_weights(pl_module.networks.student), self._before
        moved = squares(before, after) if before is not None else {}
        self._before = None
        device = pl_module.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), _Evaluating(pl_module), attention_by(pl_module.compute.attention):
            figures = self._figures(pl_module, pl_module.bind(self._texts))
        averaged = average_figures({**figures, **moved})
        if moved:
            change, weights = averaged.pop("change"), averaged.pop("weights")
            averaged["update_ratio"] = (change / weights.clamp(min=1e-12)).sqrt()
        values = torch.stack([value.to(device, torch.float32) for value in averaged.values()])
        self._unread.append((pl_module.iteration, list(averaged), Fetched(values)))

    def _figures(self, pl_module: "CDMModule", fields: "VelocityFields") -> dict[str, Tensor]:
        backbone, device = pl_module.backbone, pl_module.device
        start = evaluation_noise(pl_module.seed, self._numbers, backbone.latent_shape, device)
        if not self._teacher:
            guided = GuidedField(fields.teacher, fields.teacher_uncond, self.guidance_scale, backbone.guide)
            x0 = sample(guided, start, inference_sigmas(self.teacher_steps, backbone.shift_steps)).float()
            self._teacher = image_figures(x0, backbone.decode_latents(x0), self.per_prompt, self.colour)
        x0 = sample(fields.student, start, inference_sigmas(self.steps, backbone.shift_steps)).float()
        own = image_figures(x0, backbone.decode_latents(x0), self.per_prompt, self.colour)
        figures = {**against(own, self._teacher), "velocity_rms": rms(start - x0)}
        samples = {"fresh": x0} | ({"replay": self._earlier[0]} if len(self._earlier) == self.replay else {})
        self._earlier = [*self._earlier, x0][-self.replay :]
        if (role := pl_module.objective.score_role) is not None:
            rng = StepRandom(pl_module.seed, pl_module.iteration, self._numbers, device)
            noise = rng.normal("health.noise", backbone.latent_shape)
            even = (torch.arange(len(x0)) + 0.5) / len(x0)  # sigmas spread evenly over (0, 1), always the same
            sigma = rng.place(backbone.shift_sigmas(even))
            figures |= score_figures(fields.teacher, fields[role], samples, noise, sigma)
        return figures

    # ---- judging

    def _read(self, trainer: L.Trainer, pl_module: "CDMModule") -> None:
        """Read the measurements that were not read yet, judge each, and write them."""
        if not self._unread:
            return
        pl_module.updates.settle()
        skipped = sum(pl_module.updates.skipped_steps.values())
        new = [_reading(*entry) for entry in self._unread]
        new[-1] = Reading(new[-1].iteration, {**new[-1].figures, "skipped_steps": float(skipped - self.skipped)})
        self.skipped, self._unread = skipped, []
        for reading in new:
            self.readings = [*self.readings, reading][-KEPT:]
            found = findings(self.readings)
            text = verdict(self.readings, found)
            kinds = sorted(finding.kind for finding in found)
            told: list[str] = list(kinds) or [text.partition(" (")[0]]
            changed, self.told, self.said = told != self.told, told, text
            if trainer.is_global_zero:
                _write(trainer, reading, text, kinds)
                if changed:
                    print(f"health at iteration {reading.iteration}: {text}", file=sys.stderr, flush=True)
            if stopping := sorted(set(kinds) & set(self.stop_on)):
                trainer.should_stop = True
                if trainer.is_global_zero:
                    print(f"callbacks.health.stop_on ends the run: {stopping[0]}", file=sys.stderr, flush=True)


class _Evaluating:
    """A context in which student and fake score are in eval mode; afterwards each module has its former mode again."""

    def __init__(self, pl_module: "CDMModule") -> None:
        self._networks = list(pl_module.networks.trained.values())
        self._training: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> None:
        self._training = [(module, module.training) for network in self._networks for module in network.modules()]
        for network in self._networks:
            network.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._training:
            module.training = training


def _reading(iteration: int, names: Sequence[str], fetched: Fetched) -> Reading:
    return Reading(iteration, dict(zip(names, fetched.values.tolist(), strict=True)))


def _write(trainer: L.Trainer, reading: Reading, text: str, kinds: Sequence[str]) -> None:
    figures: Mapping[str, float | None] = {
        name: value if math.isfinite(value) else None for name, value in reading.figures.items()
    }
    line = {"iteration": reading.iteration, "verdict": text, "findings": list(kinds), "figures": figures}
    path = Path(trainer.default_root_dir) / FILE
    with may_fail(path):
        append_text(path, json.dumps(line) + "\n")
