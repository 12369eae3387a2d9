"""The names of a run's networks, known before they are built, and checks of an objective's roles (networks by name)."""

from collections.abc import Iterable

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.errors import UserError
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.objectives.base import Objective, Role
from cdm_lightning.training.networks import Networks


def network_names(roles: Iterable[Role], average: bool = True) -> tuple[str, ...]:
    """Return the names of all networks of a run whose objective has these roles: the keys of `Networks.by_role`.

    Without `average`, the run has no EMA, and "student_ema" is not among them.
    """
    return ("student", *(role.name for role in roles), *(["student_ema"] if average else []), "teacher")


def whole_names(roles: Iterable[Role], lora: LoRAPlan, backbone: Backbone, average: bool = True) -> tuple[str, ...]:
    """Return the names of the networks that are neither adapters, nor the base under them, nor heads.

    They are the keys that `Networks.whole` will have, in the order of `network_names`.
    """
    roles = list(roles)
    built = [role.name for role in roles if role.build is not None]
    pretrained = [name for name in network_names(roles, average) if name not in built]
    adapted = lora.among(name for name in pretrained if name != "teacher")
    on_base = {*adapted, *(["teacher"] if adapted and backbone.teacher_is_base else [])}
    return tuple(name for name in pretrained if name not in on_base)


def check_roles(objective: Objective, lora: LoRAPlan, backbone: Backbone) -> None:
    """Raise UserError if the objective's roles, `student_period`, updates or merges are invalid or do not fit the adapters.

    For example, two networks can be averaged only if both are whole or both have equal LoRA settings.
    """
    names = network_names(objective.roles)
    for name in names[1:-2]:
        if names.count(name) > 1 or hasattr(Networks, name) or name.startswith("_") or name == "rollout":
            raise UserError(
                f"objective: {type(objective).__name__} calls a role {name!r}, which is taken by the module or begins "
                "with _; choose another name"
            )
    lora.check(backbone.lora_targets)
    built = [role.name for role in objective.roles if role.build is not None]
    if adapted := lora.among(built):
        raise UserError(
            f"lora.{next(iter(adapted))}: the objective builds this network itself, so it cannot be an adapter; set it to null"
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
                f"their lora settings differ: set objective.{update.merge.option}=0, or make lora.{update.role} and "
                f"lora.{update.merge.source} equal"
            )
