"""The networks of a distillation: student, its average, teacher, and those that the objective names."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from cdm_lightning.backbones.base import Backbone, BoundField, Conditioning
from cdm_lightning.backbones.own_inputs import attach_inputs
from cdm_lightning.core.rng import stream
from cdm_lightning.errors import UserError
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.objectives.base import Objective, Role, VelocityFields
from cdm_lightning.recomputation import Guard, Recomputation

if TYPE_CHECKING:
    from cdm_lightning.lora.shared import SharedBase  # imports peft, which takes seconds


class Networks(nn.Module):
    """`student` and a network for each of the `roles` (trained, float32), `student_ema` and `teacher` (frozen).

    All start from the same pretrained weights, but for roles that their objective builds itself. Roles with an adapter in
    `lora` share one frozen base and hold the adapter's parameters alone; `seed` decides how adapters and built networks
    start. Where there is such a base, the teacher is that base with all adapters off.

    The teacher is kept out of the module tree: it never changes, so it is in no checkpoint and in no optimizer; the
    backbone builds it anew, always the same. `place` moves it along.

    `recomputation` says which activations the backward pass computes anew (default: none).
    With `empty`, whole networks stay on the meta device where the backbone can fill them later, shard by shard.
    """

    teacher: nn.Module
    _shared: "SharedBase | None"
    _base_view: nn.Module | None
    _own_teacher: nn.Module | None

    def __init__(
        self,
        backbone: Backbone,
        roles: Sequence[Role] = (),
        recomputation: Recomputation | None = None,
        lora: LoRAPlan | None = None,
        seed: int = 0,
        empty: bool = False,
    ) -> None:
        super().__init__()
        self._empty, self._backbone = empty, backbone
        self._recomputation = recomputation or Recomputation()
        lora = lora or LoRAPlan()
        pretrained = [role for role in roles if role.build is None]
        shared = self._shared_base(lora, ["student", *(role.name for role in pretrained), "student_ema"], seed)
        self.student = shared.view("student") if shared and lora.of("student") else self._trainable()
        for role in roles:
            self.add_module(role.name, self._of_role(role, lora, shared, seed))
        self.student_ema = shared.view("student_ema") if shared and lora.of("student") else self._copy_of_student()
        self.student_ema.requires_grad_(False).eval()
        for name in ("student", *(role.name for role in pretrained)):
            if lora.of(name) is None:
                self._checkpoint(getattr(self, name))
        self.trained_roles = ("student", *(role.name for role in roles))
        self.built_roles = tuple(role.name for role in roles if role.build is not None)
        own_teacher = None if shared and backbone.teacher_is_base else self._build(teacher=True)
        self._keep_unregistered(shared=shared, own_teacher=own_teacher)
        self.view_base()

    # ---- the start

    def _shared_base(self, lora: LoRAPlan, roles: Sequence[str], seed: int) -> "SharedBase | None":
        adapters = lora.among(roles)
        if not adapters:
            return None
        from cdm_lightning.lora.shared import SharedBase  # imports peft

        shared = SharedBase(self._backbone.build_base(), adapters, self._backbone.lora_targets, seed)
        self._checkpoint(shared.network, shared.with_its_adapter)
        return shared

    def _of_role(self, role: Role, lora: LoRAPlan, shared: "SharedBase | None", seed: int) -> nn.Module:
        if role.build is not None:
            return self._seeded({role.name: role.build}, self._backbone.feature_width, seed)[role.name].train()
        if shared and lora.of(role.name):
            network = shared.view(role.name)
        else:
            network = self._trainable() if shared and lora.of("student") else self._copy_of_student()
        if role.inputs:
            makers = {f"{role.name}.{name}": make for name, make in role.inputs.items()}
            modules = self._seeded(makers, self._backbone.time_embedding_width, seed)
            own = dict(zip(role.inputs, modules.values(), strict=True))
            attach_inputs(network, self._backbone.time_module(network), own)
        return network

    def _seeded(self, makers: Mapping, width: int, seed: int) -> dict[str, nn.Module]:
        """What the makers make for a width, float32; random starts depend on `seed` and name alone, in all processes.

        What a maker froze stays frozen.
        """
        made = {}
        with torch.random.fork_rng(devices=[]):
            for name, make in makers.items():
                torch.manual_seed(stream(seed, f"start of {name}").initial_seed())
                made[name] = make(width).float()
        return made

    def _trainable(self) -> nn.Module:
        return self._build(teacher=False).float().requires_grad_(True)

    def _copy_of_student(self) -> nn.Module:
        return copy.deepcopy(self.student)

    def _build(self, teacher: bool) -> nn.Module:
        made = self._backbone.build_empty(teacher) if self._empty else None
        if made is not None:
            return made
        return self._backbone.build_teacher() if teacher else self._backbone.build_network()

    def _checkpoint(self, network: nn.Module, guard: Guard | None = None) -> None:
        if self._recomputation.share:
            function = self._recomputation.function(network, self._backbone.block_types, guard)
            self._backbone.enable_gradient_checkpointing(network, function)

    # ---- views

    def view_base(self) -> None:
        """Rebuild the teacher: a view of the shared base with all adapters off, or its own frozen network."""
        base_view = self._shared.base_view() if self._shared else None
        teacher = cast(nn.Module, self._own_teacher or base_view)  # one of them there is
        self._keep_unregistered(base_view=base_view, teacher=teacher.requires_grad_(False).eval())

    def _keep_unregistered(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name if name == "teacher" else f"_{name}", value)

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The trained networks by role, the student first."""
        return {role: getattr(self, role) for role in self.trained_roles}

    @property
    def by_role(self) -> dict[str, nn.Module]:
        """All networks by role, also those that are not trained."""
        return {**self.trained, "student_ema": self.student_ema, "teacher": self.teacher}

    @property
    def base(self) -> nn.Module | None:
        """The frozen network under the adapters, if there are any."""
        return self._shared.network if self._shared else None

    @property
    def whole(self) -> dict[str, nn.Module]:
        """The pretrained networks that share no weight with another, by role: all but adapters and the teacher's base."""
        from cdm_lightning.lora.views import RoleView

        pretrained = {role: network for role, network in self.by_role.items() if role not in self.built_roles}
        return {role: network for role, network in pretrained.items() if not isinstance(network, RoleView)}

    @property
    def unregistered(self) -> list[nn.Module]:
        """Networks that are no submodules: the teacher, and before it a view of the base of adapters if there is one."""
        return [network for network in (self._base_view, self.teacher) if network is not None]

    # ---- the device

    def compile_blocks(self, block_types: tuple[type[nn.Module], ...], backend: str) -> None:
        """Compile the blocks of every network, each once."""
        for network in [*self.whole.values(), *([self.base] if self.base is not None else [])]:
            compile_blocks(network, block_types, backend)

    def place(self, device: torch.device) -> None:
        """Move the teacher, and a shared base, to `device`; the other networks are moved as parts of the module."""
        for network in self.unregistered:
            network.to(device)

    def train(self, mode: bool = True) -> "Networks":
        """Set the mode of the trained networks; the average stays in eval mode, as does the teacher."""
        super().train(mode)
        self.student_ema.eval()
        return self


def network_names(roles: Iterable[Role]) -> tuple[str, ...]:
    """The names of the networks that an objective with these roles has, in the order of `Networks.by_role`."""
    return ("student", *(role.name for role in roles), "student_ema", "teacher")


def whole_names(roles: Iterable[Role], lora: LoRAPlan, backbone: Backbone) -> tuple[str, ...]:
    """The names that `Networks.whole` will have, in the order of `network_names`."""
    roles = list(roles)
    built = [role.name for role in roles if role.build is not None]
    pretrained = [name for name in network_names(roles) if name not in built]
    adapted = lora.among(name for name in pretrained if name != "teacher")
    on_base = {*adapted, *(["teacher"] if adapted and backbone.teacher_is_base else [])}
    return tuple(name for name in pretrained if name not in on_base)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Its parameters but for those that are frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def bind_networks(
    networks: Networks, backbone: Backbone, text: Conditioning, no_text: Conditioning, compute_dtype: torch.dtype
) -> VelocityFields:
    """The networks as velocity fields of B prompts with the conditioning `text`, and of as many empty ones: `no_text`."""

    def field(network: nn.Module, cond: Conditioning = text) -> BoundField:
        return BoundField(backbone, network, cond, compute_dtype)

    trained = networks.trained
    return VelocityFields(
        student=field(networks.student),
        teacher=field(networks.teacher),
        teacher_uncond=field(networks.teacher, no_text),
        by_role={
            role: field(network)
            for role, network in {**trained, "student_ema": networks.student_ema}.items()
            if role not in networks.built_roles
        },
        heads={role: trained[role] for role in networks.built_roles},
    )


def check_roles(objective: Objective, lora: LoRAPlan, backbone: Backbone) -> None:
    """UserError for roles that cannot be named or trained so, for adapters and merges that do not fit them."""
    names = network_names(objective.roles)
    for name in names[1:-2]:
        if names.count(name) > 1 or hasattr(Networks, name) or name.startswith("_") or name == "rollout":
            raise UserError(
                f"objective: {type(objective).__name__} calls a role {name!r}, which is taken; use another name"
            )
    lora.check(backbone.lora_targets)
    built = [role.name for role in objective.roles if role.build is not None]
    if adapted := lora.among(built):
        raise UserError(
            f"lora.{next(iter(adapted))}: the objective builds this network itself, so it cannot be an adapter"
        )
    period = objective.student_period
    if period is not None and (not isinstance(period, int) or period < 1):
        raise UserError(
            f"objective: {type(objective).__name__} says student_period={period}; it must be a whole number from 1 on, or None"
        )
    for update in (update for updates in objective.typical_cycle() for update in updates):
        for role in (update.role, *([update.merge.source] if update.merge is not None else [])):
            if role not in names[:-2]:
                raise UserError(
                    f"objective: {type(objective).__name__} updates or merges {role!r}, which it does not train; it trains "
                    f"{', '.join(names[:-2])}"
                )
        if update.merge is not None and lora.of(update.role) != lora.of(update.merge.source):
            raise UserError(
                f"objective.{update.merge.option} averages the parameters of {update.merge.source} and {update.role}, but "
                f"their lora settings differ: set objective.{update.merge.option}=0"
            )


def compile_blocks(network: nn.Module, block_types: tuple[type[nn.Module], ...], backend: str) -> None:
    """Compile every block by torch.compile, in place: names of weights stay, and all blocks of a kind share the code."""
    for block in network.modules():
        if isinstance(block, block_types):
            block.compile(backend=backend)
