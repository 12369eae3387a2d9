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
from cdm_lightning.distributed.strategy import check_on_cpu
from cdm_lightning.errors import UserError
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.base import Objective, Role, RolledOutSample, TermLosses, Update
from cdm_lightning.training.ema import EMA
from cdm_lightning.training.networks import Networks
from cdm_lightning.training.optim import LearningRate, OptimizerRecipe
from cdm_lightning.training.roles import whole_names

PROMPTS = PromptList(["north", "south and east", "west", "anywhere"])


TARGETS = {"rank": 2, "targets": "blocks"}


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


def make_module(objective: Objective, **adapters: Adapter) -> CDMModule:
    recipe = OptimizerRecipe(partial(torch.optim.AdamW, weight_decay=0.1), LearningRate(1e-2, warmup=0))
    backbone = Toy2DBackbone(hidden=16, depth=1, fit_steps=20)
    optim = {"student": recipe, "head": recipe}
    schedule = RandomSchedule(UniformLength(1, 4))
    return CDMModule(backbone, objective, schedule, optim, lora=LoRAPlan(**adapters), ema=EMA())


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

    with pytest.raises(UserError, match="all weights of the network 'head' are frozen"):
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


def test_adapters_that_are_not_used_are_not_in_the_fingerprint():
    adapter, other = Adapter(**TARGETS), Adapter(rank=3, targets="blocks")
    plain, used = make_module(Judged()), make_module(Judged(), student=adapter)
    assert make_module(Judged(), fake_score=other, teacher=other).fingerprint == plain.fingerprint
    assert make_module(Judged(), student=adapter, fake_score=other).fingerprint == used.fingerprint
    assert used.fingerprint == f"{plain.fingerprint}+lora(student=2:128:blocks)"
    plan = LoRAPlan(judge=other, student=adapter)
    assert plan.tag(["student", "judge"]) == "+lora(student=2:128:blocks, judge=3:128:blocks)"


@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize("adapted", [(), ("judge",), ("student",), ("student", "judge")])
def test_the_names_of_whole_networks_are_those_that_are_built(monkeypatch, is_base, adapted):
    backbone, roles = Toy2DBackbone(hidden=16, depth=1, fit_steps=1), (Role("judge"), Role("head", build=half_frozen))
    monkeypatch.setattr(Toy2DBackbone, "teacher_is_base", is_base)
    lora = LoRAPlan(**{role: Adapter(**TARGETS) for role in adapted})
    assert whole_names(roles, lora, backbone) == tuple(Networks(backbone, roles, lora=lora).whole)


def test_what_is_no_whole_network_cannot_rest_in_host_memory():
    module = make_module(Judged(), student=Adapter(**TARGETS))
    assert module.whole_names == ("teacher",)
    for name in ("student", "student_ema", "head"):
        with pytest.raises(
            UserError, match=f"on_cpu names {name}, which is an adapter, .* or a head .*; it may list teacher$"
        ):
            check_on_cpu(["teacher", name], module.network_names, module.whole_names)
    with pytest.raises(
        UserError, match=r"on_cpu names pupil, which is not a network of this run; it may list teacher$"
    ):
        check_on_cpu(["pupil"], module.network_names, module.whole_names)


@pytest.mark.parametrize("period", [0, -1, 1.5])
def test_a_student_period_that_is_no_count_is_refused(period):
    with pytest.raises(UserError, match=rf"Judged has student_period={period}; return a whole number of at least 1"):
        make_module(Judged(period=period))
