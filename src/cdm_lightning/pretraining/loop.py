"""The training loop of all stages of `cdm_lightning.pretrain`: AdamW, warm-up, linear decay to 0, gradient clipping, resuming."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Len
from torch import Tensor, nn

from cdm_lightning.core.rng import stream
from cdm_lightning.files import replacing
from cdm_lightning.kinds import (
    BatchSize,
    GradientNorm,
    Iteration,
    Iterations,
    NotNegative,
    Rate,
    Seed,
    Share,
    ShareBelowOne,
)


@dataclass(frozen=True)
class Recipe:
    """The settings of a stage's training: `iterations` optimizer steps on `batch_size` samples each.

    The optimizer is AdamW with `weight_decay` and `betas`, and gradients are clipped to the norm `max_grad_norm`. The
    learning rate rises to `lr` over the first `warmup` iterations. From iteration `decay_from * iterations` to the end
    of the training, the learning rate is multiplied by a factor that falls linearly from 1 to 0. After the last
    iteration, the trained weights are replaced by their EMA over the training, with decay `ema_decay`; with a decay of
    0 they stay as they are. All random draws of the training derive from `seed`.
    """

    iterations: Iterations
    batch_size: BatchSize = 32
    lr: Rate = 2e-3
    warmup: Iteration = 50
    decay_from: Share = 0.3
    weight_decay: NotNegative = 1e-3
    betas: Annotated[Sequence[ShareBelowOne], Len(2, 2)] = (0.9, 0.99)
    max_grad_norm: GradientNorm = 1.0
    ema_decay: ShareBelowOne = 0.0
    seed: Seed = 0

    def lr_at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 0."""
        start = self.decay_from * self.iterations
        decay = 1 - max(0.0, iteration - start) / max(1.0, self.iterations - start)
        return self.lr * min(1.0, (iteration + 1) / max(1, self.warmup)) * decay


def optimise(
    name: str,
    network: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    recipe: Recipe,
    *,
    folder: Path,
    train: Iterable[nn.Parameter] | None = None,
    log_every: int = 200,
    save_every: int = 1000,
) -> nn.Module:
    """Train `network` in place to minimise `loss`, replace the trained weights by their EMA, and return `network`.

    `loss(iteration, generator)` returns a 0-d loss. The generator's seed depends on `recipe.seed`, `name` and the
    iteration. `train` are the trained parameters (default: all). Every `save_every` iterations, the state is saved in
    `folder/{name}.pt`, from which the next call resumes. `folder/{name}_loss.csv` has means over `log_every` losses.
    """
    parameters = list(network.parameters() if train is None else train)
    optimizer = _adamw(parameters, recipe)
    ema = [p.detach().clone() for p in parameters]
    path, start, curve, running = folder / f"{name}.pt", 0, [], 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        start, ema = state["iteration"], state["ema"]
        curve, running = state.get("curve", []), state.get("running", 0.0)  # older states have neither
    began = time.perf_counter()
    for iteration in range(start, recipe.iterations):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(iteration)
        value = loss(iteration, stream(recipe.seed, name, iteration))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(recipe.ema_decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
        running += float(value.detach())
        done = iteration + 1
        if done % log_every == 0 or done == recipe.iterations:
            left = (time.perf_counter() - began) / (done - start) * (recipe.iterations - done)
            mean, running = running / (log_every if done % log_every == 0 else done % log_every), 0.0
            print(f"{name} {done}/{recipe.iterations} loss {mean:.4f}, {left / 60:.1f} min left", flush=True)
            curve.append([done, mean])
        if done % save_every == 0 or done == recipe.iterations:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "iteration": done}
            _save({**state, "ema": ema, "curve": curve, "running": running}, path)
    _copy(ema, parameters)
    return network


def _adamw(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    options = {"lr": recipe.lr, "betas": (recipe.betas[0], recipe.betas[1]), "weight_decay": recipe.weight_decay}
    return torch.optim.AdamW(parameters, **options, fused=True)


@torch.no_grad()
def _copy(values: list[Tensor], parameters: list[nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _save(state: dict, path: Path) -> None:
    """Write `state` to `path`, and its loss curve to a CSV file. If the process is killed meanwhile, the previous state remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)
    rows = [f"{iteration},{mean:.6f}\n" for iteration, mean in state["curve"]]
    path.with_name(f"{path.stem}_loss.csv").write_text("".join(["iteration,loss\n", *rows]), encoding="utf-8")
