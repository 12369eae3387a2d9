"""What an objective says of its roles: what they freeze, how they start, which adapters and options they can have."""

from collections.abc import Iterator, Sequence
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from cdm_lightning.backbones.toy2d import Toy2DBackbone
from cdm_lightning.core.lengths import UniformLength
from cdm_lightning.core.schedules import RandomSchedule
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.prompts import PromptList
from cdm_lightning.errors import UserError
from cdm_lightning.module import CDMModule
from cdm_lightning.networks import Networks
from cdm_lightning.objectives.base import Objective, Role, RolledOutSample, TermLosses, Update
from cdm_lightning.optim import LearningRate, OptimizerRecipe

PROMPTS = PromptList(["north", "south and east", "west", "anywhere"])


def half_frozen(width: int) -> nn.Module:
    """A layer that does not learn, and one that does."""
    return nn.Sequential(nn.Linear(width, 4).requires_grad_(False), nn.Linear(4, 1))


class Judged(Objective):
    """A head on the student's features, and the student, learn in every iteration."""

    def __init__(self, roles: Sequence[Role] = (Role("head", build=half_frozen),), period: int | None = None) -> None:
        self._roles, self._period = tuple(roles), period

    @property
    def roles(self) -> tuple[Role, ...]:
        return self._roles

    @property
    def student_period(self) -> int | None:
        return self._period

    def updates(self, iteration: int) -> list[Update]:
        return [Update("head", self.losses), Update("student", self.losses)]

    def losses(self, sample: RolledOutSample) -> Iterator[TermLosses]:
        point = sample.point
        _, (features,) = sample.fields.student.with_features(point.x, point.sigma, [-1])
        yield TermLosses(sample.fields.heads["head"](features).square().mean())


def make_module(objective: Objective) -> CDMModule:
    recipe = OptimizerRecipe(partial(torch.optim.AdamW, weight_decay=0.1), LearningRate(1e-2, warmup=0))
    backbone = Toy2DBackbone(hidden=16, depth=1, fit_steps=20)
    return CDMModule(
        backbone, objective, RandomSchedule(UniformLength(1, 4)), {"student": recipe, "head": recipe, "other": recipe}
    )


def fit(module: CDMModule, iterations: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=iterations,
        max_epochs=-1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        limit_val_batches=0,
    )
    trainer.fit(module, PromptDataModule(PROMPTS, PROMPTS, batch_size=3, groups=module.groups.of))


def start_of(module: CDMModule) -> list[Tensor]:
    fit(module, 0)
    return [parameter.detach().clone() for parameter in module.networks.head.parameters()]


def test_what_a_role_froze_stays_as_it_was():
    start = start_of(make_module(Judged()))
    module = make_module(Judged())
    fit(module, 3)
    now = list(module.networks.head.parameters())
    assert [parameter.requires_grad for parameter in now] == [False, False, True, True]
    assert [torch.equal(a, b) for a, b in zip(start, now)] == [True, True, False, False]
    (group,) = module.optimizers_by_role["head"].param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in now[2:]]


def test_a_role_that_is_all_frozen_is_refused():
    def frozen(width: int) -> nn.Module:
        return nn.Linear(width, 1).requires_grad_(False)

    with pytest.raises(UserError, match="the network head has no weight to train"):
        fit(make_module(Judged([Role("head", build=frozen)])), 1)


def test_own_inputs_of_two_roles_start_apart_and_keep_what_is_frozen():
    def embedding(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(0, (-1, 1)), nn.Linear(1, width).requires_grad_(False), nn.Linear(width, width)
        )

    roles = [Role(name, inputs={"seen": embedding, "also": embedding}) for name in ("first", "second")]
    networks, again = (Networks(Toy2DBackbone(hidden=16, depth=1, fit_steps=1), roles) for _ in range(2))
    first, second = (network.own_inputs.embeddings for network in (networks.first, networks.second))
    starts = [own[name][2].weight for own in (first, second) for name in ("seen", "also")]
    assert not any(torch.equal(a, b) for n, a in enumerate(starts) for b in starts[:n])
    assert torch.equal(first["seen"][2].weight, again.first.own_inputs.embeddings["seen"][2].weight)
    assert not first["seen"][1].weight.requires_grad
    assert first["seen"][2].weight.requires_grad
