"""The networks of a run: the student, its EMA, the teacher, and the networks that the objective trains in addition."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from cdm_lightning.backbones.base import Backbone, BoundField, Conditioning
from cdm_lightning.backbones.own_inputs import attach_inputs
from cdm_lightning.core.rng import stream
from cdm_lightning.errors import UserError
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.objectives.base import Role, VelocityFields
from cdm_lightning.training.compilation import compile_blocks
from cdm_lightning.training.float8 import Float8Field, use_float8
from cdm_lightning.training.gradient_checkpointing import Guard, Recomputation

if TYPE_CHECKING:
    from cdm_lightning.lora.shared import SharedBase  # imports peft, which takes seconds


class Networks(nn.Module):
    """All networks of a run: `student`, `student_ema`, `teacher`, and one attribute for each of the `roles`.

    `roles` are the networks that the objective trains besides the student. They and the student are trained in float32.
    The EMA and the teacher are frozen. Heads are roles that the objective builds itself (see `Role.build`); all other
    networks start from the same pretrained weights.

    `lora` says which roles are LoRAs. These roles share one frozen base network, and their own modules hold only the
    parameters of their adapters. If the base equals the teacher (see `Backbone.teacher_is_base`), the teacher is the
    base with all adapters off.

    The teacher and the base are no submodules, so checkpoints and optimizers do not contain them. `place` moves them to
    the device.

    `recomputation` says which activations the backward pass recomputes (default: none). `seed` is the seed of the
    random weights of adapters, heads and the embeddings of additional inputs (see `Role.inputs`). With `average=False`,
    there is no `student_ema`. With `empty=True`, networks without adapters stay on the meta device if the backbone can
    fill shards, so that each process can fill its own shards later. Raises UserError for LoRA targets that the network
    does not have.
    """

    teacher: nn.Module
    student_ema: nn.Module | None
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
        average: bool = True,
    ) -> None:
        super().__init__()
        self._empty, self._backbone = empty, backbone
        self._recomputation = recomputation or Recomputation()
        lora = lora or LoRAPlan()
        pretrained = [role for role in roles if role.build is None]
        averages = ["student_ema"] if average else []
        shared = self._shared_base(lora, ["student", *(role.name for role in pretrained), *averages], seed)
        self.student = shared.view("student") if shared and lora.of("student") else self._trainable()
        for role in roles:
            self.add_module(role.name, self._of_role(role, lora, shared, seed))
        self.student_ema = self._average(lora, shared) if average else None
        for name in ("student", *(role.name for role in pretrained)):
            if lora.of(name) is None:
                self._checkpoint(getattr(self, name))
        self.trained_roles = ("student", *(role.name for role in roles))
        self.built_roles = tuple(role.name for role in roles if role.build is not None)
        own_teacher = None if shared and backbone.teacher_is_base else self._build(teacher=True)
        self._keep_unregistered(shared=shared, own_teacher=own_teacher)
        self.view_base()

    # ---- construction

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

    def _average(self, lora: LoRAPlan, shared: "SharedBase | None") -> nn.Module:
        network = shared.view("student_ema") if shared and lora.of("student") else self._copy_of_student()
        return network.requires_grad_(False).eval()

    def _seeded(self, makers: Mapping, width: int, seed: int) -> dict[str, nn.Module]:
        """Call each function of `makers` with `width` and return its module in float32, by name.

        The random initialization depends on `seed` and the name only, so it is the same in all processes.
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
        """Set the attribute `teacher` to the teacher's own network, or to the shared base with all adapters off.

        The shared base is used if the teacher has no network of its own. Call this method again after the base has been
        sharded, because sharding replaces the parameters of the base.
        """
        base_view = self._shared.base_view() if self._shared else None
        teacher = cast(nn.Module, self._own_teacher or base_view)  # at least one of the two is not None
        self._keep_unregistered(base_view=base_view, teacher=teacher.requires_grad_(False).eval())

    def _keep_unregistered(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name if name == "teacher" else f"_{name}", value)

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The trained networks by role: the student first, then the roles of the objective in their order."""
        return {role: getattr(self, role) for role in self.trained_roles}

    @property
    def by_role(self) -> dict[str, nn.Module]:
        """All networks by role: the trained ones, "student_ema" if there is an EMA, and "teacher"."""
        return {**self.trained, **self.average, "teacher": self.teacher}

    @property
    def average(self) -> dict[str, nn.Module]:
        """The EMA of the student as {"student_ema": network}, or {} if there is no EMA."""
        return {} if self.student_ema is None else {"student_ema": self.student_ema}

    @property
    def base(self) -> nn.Module | None:
        """The frozen network that the LoRA adapters share, or None if there are no adapters."""
        return self._shared.network if self._shared else None

    @property
    def whole(self) -> dict[str, nn.Module]:
        """The networks that hold their own copy of all weights of the pretrained network, by role.

        LoRA adapters, their shared base (even if it is the teacher) and heads, which the objective builds itself, are left out.
        """
        from cdm_lightning.lora.views import RoleView

        pretrained = {role: network for role, network in self.by_role.items() if role not in self.built_roles}
        return {role: network for role, network in pretrained.items() if not isinstance(network, RoleView)}

    @property
    def unregistered(self) -> list[nn.Module]:
        """The networks that are no submodules: the base of the LoRA adapters, if there are any, followed by the teacher."""
        return [network for network in (self._base_view, self.teacher) if network is not None]

    # ---- the device

    def compile_blocks(self, block_types: tuple[type[nn.Module], ...], backend: str) -> None:
        """Compile the blocks of every network with torch.compile; the blocks of a shared base are compiled once.

        `block_types` are the classes of the blocks, and `backend` is the backend of torch.compile.
        """
        for network in [*self.whole.values(), *([self.base] if self.base is not None else [])]:
            compile_blocks(network, block_types, backend)

    def use_float8(self, block_types: tuple[type[nn.Module], ...], kind: str) -> None:
        """Let the linear layers in the blocks of every network compute in fp8 inside `with float8_products(True)`.

        `block_types` are the classes of the blocks, and `kind` is the value of the option compute.fp8 (see
        `training.float8`).
        """
        for network in [*self.whole.values(), *([self.base] if self.base is not None else [])]:
            use_float8(network, block_types, kind)

    def place(self, device: torch.device) -> None:
        """Move the teacher and the base of the adapters to `device`. Lightning moves the other networks, which are submodules."""
        for network in self.unregistered:
            network.to(device)

    def train(self, mode: bool = True) -> "Networks":
        """Set the trained networks to training mode (or eval mode). The EMA and the teacher stay in eval mode."""
        super().train(mode)
        for network in self.average.values():
            network.eval()
        return self


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the network that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def bind_networks(
    networks: Networks,
    backbone: Backbone,
    text: Conditioning,
    no_text: Conditioning,
    compute_dtype: torch.dtype,
    float8: bool = False,
) -> VelocityFields:
    """Return the networks as velocity fields for B prompts.

    `text` is the conditioning of the B prompts. `no_text` is the conditioning of B empty prompts, which the field
    `teacher_uncond` uses. The fields compute in `compute_dtype`, by autocast, and return float32. With `float8`, calls
    of the fields without a gradient compute in fp8; `Networks.use_float8` must have been called before.
    """

    def field(network: nn.Module, cond: Conditioning = text) -> BoundField:
        return (Float8Field if float8 else BoundField)(backbone, network, cond, compute_dtype)

    trained = networks.trained
    return VelocityFields(
        student=field(networks.student),
        teacher=field(networks.teacher),
        teacher_uncond=field(networks.teacher, no_text),
        by_role={
            role: field(network)
            for role, network in {**trained, **networks.average}.items()
            if role not in networks.built_roles
        },
        heads={role: trained[role] for role in networks.built_roles},
    )


def trained_parameters(networks: Networks) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters of each trained network, by role.

    Raises UserError if all weights of a network are frozen.
    """
    found = {role: trainable(network) for role, network in networks.trained.items()}
    if frozen := [role for role, parameters in found.items() if not parameters]:
        raise UserError(
            f"objective: all weights of the network {frozen[0]!r} are frozen; let some of them require "
            "gradients in Role.build"
        )
    return found
