"""The two orders of work on one set of networks: whether they compute the same, and what each costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.authors_order import AuthorsOrder, without_merge
from benchmarks.machine import flops_of, matrix_ceiling, peak_bytes, seconds_of
from benchmarks.set_up import Bare, attach, batch, build_module
from benchmarks.sizes import Size
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.training.gradient_checkpointing import Recomputation

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}  # relative, of losses and gradients: see `Comparison.check`
SAMPLES_IN_FLOAT32 = 2


@dataclass
class Recorder:
    """In an optimizer's place: keeps the gradients (on the CPU) and changes nothing."""

    optimizer: Optimizer
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    def step(self) -> None:
        """Keep the gradients, zeros for those that there are not."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.gradients = [
            torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad.detach().float().cpu().clone()
            for parameter in parameters
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer does it."""
        self.optimizer.zero_grad(set_to_none)


class Comparison:
    """The orders "ours", the real `CDMModule.training_step`, and "authors" on the networks of a size."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.module = build_module(size)
        self.module.timer.device = torch.device(size.device)
        self.optimizers = dict(zip(self.module.networks.trained, self.module.configure_optimizers(), strict=True))
        attach(self.module, optimizers=list(self.optimizers.values()))
        shared = size.device != "cpu"  # a second set of Adam states would not fit beside the networks of a large model
        self.authors = AuthorsOrder(self.module, self.optimizers if shared else self._plain_optimizers())
        self.calls = 0  # of a network, by one sample; one with gradient counts three times: backward is two more
        self._forwards = self._counting()
        self._compiled = {}
        if size.compile_backend is not None:
            self.module.networks.compile_blocks(self.module.backbone.block_types, size.compile_backend)
            blocks = (b for network in self.module.networks.whole.values() for b in network.modules())
            self._compiled = {b: b._compiled_call_impl for b in blocks if b._compiled_call_impl is not None}

    @property
    def objective(self) -> CDMObjective:
        """The module's."""
        return self.module.objective

    def run(self, order: str, iteration: int, samples: int | None = None) -> None:
        """One iteration of an order, on the size's batch or on so many samples."""
        prompts = batch(iteration, samples or self.size.batch, self.module.groups.of(iteration))
        self._put_blocks_as_they_are_in(order)
        if order == "authors":
            self.authors.iteration(prompts, iteration)
            return
        self.module.iteration = iteration
        self.module.training_step(prompts, 0)

    def _put_blocks_as_they_are_in(self, order: str) -> None:
        """Compiled in ours only, checkpointed as each order does it."""
        for block, compiled in self._compiled.items():
            block._compiled_call_impl = compiled if order == "ours" else None
        backbone, networks = self.module.backbone, self.module.networks
        whole = Recomputation(float(self.size.gradient_checkpointing))
        recomputation = whole if order == "authors" else self.module.compute.recomputation
        if whole.share or recomputation.share:
            for network in (network for role, network in networks.whole.items() if role in networks.trained):
                function = recomputation.function(network, backbone.block_types)
                backbone.enable_gradient_checkpointing(network, function)

    def check(self) -> dict[str, dict[str, float]]:
        """The relative differences of losses and gradients by dtype; RuntimeError if they are more than rounding.

        Always in float32; a size that computes in less is compared in that too, on its whole batch. There rounding itself is
        large: the student is moved along differences of predictions that are nearly equal before training.
        """
        dtype = self.size.compute_dtype
        found = {dtype: self._differences(self.size.batch)}
        if dtype != "float32":
            with self._in_float32():
                found["float32"] = self._differences(min(self.size.batch, SAMPLES_IN_FLOAT32))
        for name, differences in found.items():
            if not max(differences.values()) <= TOLERANCE[name]:
                raise RuntimeError(f"the two orders do not compute the same in {name}: {differences}")
        return found

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Inside the block both orders compute in float32 with blocks that are not compiled."""
        module, compiled = self.module, self._compiled
        dtype, teacher = module.compute_dtype, module.networks.teacher
        stored = next(teacher.parameters()).dtype
        module.compute_dtype, self._compiled = torch.float32, dict.fromkeys(compiled)
        teacher.float()
        try:
            yield
        finally:
            teacher.to(stored)  # what was rounded before loses nothing
            module.compute_dtype, self._compiled = dtype, compiled

    def _differences(self, samples: int) -> dict[str, float]:
        """Relative differences of losses and gradients in the last iteration of a student's turn, of so many samples.

        Nothing is changed by it: optimizers only record, nothing is merged, and the average of equals is equal.
        """
        turn, published = range(self.objective.student_every), self.objective
        self.module.objective = without_merge(published)
        recorded = {name: Recorder(optimizer) for name, optimizer in self.optimizers.items()}
        kept, self.authors.optimizers = self.authors.optimizers, recorded
        for iteration in turn:
            self.run("authors", iteration, samples)
        theirs = {name: recorder.gradients for name, recorder in recorded.items()}
        attach(self.module, Bare, list(recorded.values()))
        for iteration in turn:  # rollouts of all of them may be made in the first
            self.run("ours", iteration, samples)
        differences = {}
        for name, recorder in recorded.items():
            loss = self.module._figures[f"{name}/loss"]
            differences[f"{name}_loss"] = float(abs(loss / self.authors.losses[name] - 1))
            differences[f"{name}_gradient"] = relative(recorder.gradients, theirs[name])
        self.module.objective, self.authors.optimizers = published, kept
        self.module.ema_updates = self.authors.ema_updates = 0
        attach(self.module, optimizers=list(self.optimizers.values()))
        return differences

    def measure(self) -> dict[str, Any]:
        """Times, calls, FLOP/s and memory of both orders, and the ratios."""
        every, size = self.objective.student_every, self.size
        self.cycle("authors", 0)  # whatever is set up at first
        for number in range(size.cycles if self._compiled else 1):  # compilation depends on the numbers of rows
            self.cycle("ours", number)
        self.authors.seconds.clear()
        self.module.timer.seconds.clear()
        seconds, calls = {"authors": [], "ours": []}, {}
        ceiling = matrix_ceiling(size.device, self.module.compute_dtype)
        for number in range(size.cycles):
            orders = ("authors", "ours") if number % 2 else ("ours", "authors")
            for order in orders:
                before = self.calls
                seconds[order].append(seconds_of(partial(self.cycle, order, number), size.device) / every)
                calls[order] = calls.get(order, 0) + self.calls - before
        flops = self.forward_flops()
        phases = {"authors": self.authors.seconds, "ours": self.module.timer.seconds}
        iterations = size.cycles * every
        result: dict[str, Any] = {"ceiling": ceiling, "forward_flops": flops}
        for order, times in seconds.items():
            total = sum(times) * every
            result[order] = {
                "seconds": times,
                "samples_per_second": iterations * size.batch / total,
                "calls_per_sample": calls[order] / iterations / size.batch,
                "flops_per_second": calls[order] * flops / total,
                "phases": {name: value / iterations for name, value in phases[order].items()},
                "peak_bytes": self.static_bytes() + peak_bytes(partial(self.cycle, order, self.longest()), size.device),
            }
        ours = result["ours"]
        ours["phases"]["text"] = sum(seconds["ours"]) / size.cycles - sum(ours["phases"].values())  # and the average
        result["ratios"] = [a / b for a, b in zip(seconds["authors"], seconds["ours"])]
        result["speed_ratio"] = ours["samples_per_second"] / result["authors"]["samples_per_second"]
        result["memory_ratio"] = ours["peak_bytes"] / result["authors"]["peak_bytes"]
        return result

    def cycle(self, order: str, number: int) -> None:
        """As many iterations as it takes to update the student once."""
        for iteration in range(number * self.objective.student_every, (number + 1) * self.objective.student_every):
            self.run(order, iteration)

    def longest(self) -> int:
        """The cycle after those that were timed: memory is measured on it."""
        return self.size.cycles

    def static_bytes(self) -> int:
        """On a CPU, whose peak is counted from zero: networks, average, teacher and one pair of optimizers."""
        if self.size.device != "cpu":
            return 0
        networks = self.module.networks
        tensors = [*networks.parameters(), *networks.teacher.parameters()]
        tensors += [
            value for one in self.optimizers.values() for state in one.state.values() for value in state.values()
        ]
        return sum(tensor.nbytes for tensor in tensors)

    def forward_flops(self) -> int:
        """FLOPs of one call of the network by one sample."""
        backbone, network = self.module.backbone, self.module.networks.teacher
        x = torch.randn(1, *backbone.latent_shape, device=self.module.device)
        cond = backbone.encode_prompts(["a"])
        with torch.no_grad():
            return flops_of(lambda: self._forwards(network, x, torch.full((1,), 0.5, device=x.device), cond))

    def _plain_optimizers(self) -> dict[str, Optimizer]:
        """AdamW as torch makes it where it is told nothing; each update sets the recipe's learning rate."""
        trained = self.module.networks.trained
        return {role: AdamW(network.parameters(), weight_decay=1e-4) for role, network in trained.items()}

    def _counting(self) -> Callable[..., Tensor]:
        """Let the backbone count the samples of each call; its own function."""
        velocity = self.module.backbone.velocity

        def counted(network: Any, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            trained = torch.is_grad_enabled() and next(network.parameters()).requires_grad
            self.calls += len(x) * (3 if trained else 1)
            return velocity(network, x, sigma, cond)

        self.module.backbone.velocity = counted
        return velocity


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The norm of the difference of two lists of tensors in units of the second's norm."""
    difference = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return float((difference / sum(b.double().square().sum() for b in theirs)).sqrt())
