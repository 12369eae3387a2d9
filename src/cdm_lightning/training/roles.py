"""The names of a run's networks (their *roles*), and checks of the roles that an objective trains, before anything is built."""

from collections.abc import Iterable

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.errors import UserError
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.objectives.base import Objective, Role
from cdm_lightning.training.networks import Networks


def network_names(roles: Iterable[Role], average: bool = True) -> tuple[str, ...]:
    """Return the names of all networks of a run, the keys of `Networks.by_role`.

    `roles` are the networks that the objective trains besides the student. "student_ema" is left out if `average` is False, that
    is, if the run has no EMA.
    """
    return ("student", *(role.name for role in roles), *(["student_ema"] if average else []), "teacher")


def whole_names(roles: Iterable[Role], lora: LoRAPlan, backbone: Backbone, average: bool = True) -> tuple[str, ...]:
    """Return the names of the networks that hold their own copy of the pretrained weights: the keys of `Networks.whole`.

    LoRA adapters, their shared base (even if it is the teacher) and heads, which the objective builds itself, are left out.
    `roles` are the networks that the objective trains besides the student. The order is that of `network_names`.
    """
    roles = list(roles)
    built = [role.name for role in roles if role.build is not None]
    pretrained = [name for name in network_names(roles, average) if name not in built]
    adapted = lora.among(name for name in pretrained if name != "teacher")
    on_base = {*adapted, *(["teacher"] if adapted and backbone.teacher_is_base else [])}
    return tuple(name for name in pretrained if name not in on_base)


def check_roles(objective: Objective, lora: LoRAPlan, backbone: Backbone) -> None:
    """Check an objective's roles, `student_period` and updates, and that they fit the LoRA settings.

    Raises UserError for the first mistake. For example, an update may average two networks (see `Update.merge`) only if
    the LoRA settings of these two networks are equal.
    """
    names = network_names(objective.roles)
    for name in names[1:-2]:
        if names.count(name) > 1 or hasattr(Networks, name) or name.startswith("_") or name == "rollout":
            raise UserError(
                f"objective: {type(objective).__name__} has a role {name!r}, but this name is already in use or begins "
                "with _; choose another name"
            )
    lora.check(backbone.lora_targets)
    built = [role.name for role in objective.roles if role.build is not None]
    if adapted := lora.among(built):
        raise UserError(
            f"lora.{next(iter(adapted))}: the objective builds this network itself, so it cannot be a LoRA; set "
            f"lora.{next(iter(adapted))}=null"
        )
    period = objective.student_period
    if period is not None and (not isinstance(period, int) or period < 1):
        raise UserError(
            f"objective: {type(objective).__name__} has student_period={period!r}; return a whole number of at least 1, or None"
        )
    for update in (update for updates in objective.typical_cycle() for update in updates):
        for role in (update.role, *([update.merge.source] if update.merge is not None else [])):
            if role not in names[:-2]:
                raise UserError(
                    f"objective: {type(objective).__name__} updates or merges {role!r}, but trains only "
                    f"{', '.join(names[:-2])}; add {role!r} to its roles, or use one of these names"
                )
        if update.merge is not None and lora.of(update.role) != lora.of(update.merge.source):
            raise UserError(
                f"lora.{update.role} and lora.{update.merge.source} differ, but objective.{update.merge.option} averages the "
                f"parameters of these two networks; make them equal, or set objective.{update.merge.option}=0"
            )
