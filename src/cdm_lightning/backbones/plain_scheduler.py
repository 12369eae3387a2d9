"""The scheduler of an exported pipeline: it uses the sigmas of training even if the pipeline passes it no sigmas.

Without explicit sigmas, diffusers' `FlowMatchEulerDiscreteScheduler` applies the shift twice: it shifts the two end points, spaces
the sigmas evenly between them, and shifts all of them (diffusers issue 13243). For example, 4 steps at shift 3 have the sigmas
1, .858, .602, .009. `FlowMapEulerDiscreteScheduler` takes the same Euler steps at the shifted values of 1, 1 - 1/n, ...,
1/n. These are the sigmas of training, for every n.
"""

from collections.abc import Sequence
from typing import Any, cast

from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from cdm_lightning.core.schedules import uniform_sigmas
from cdm_lightning.errors import UserError

KEPT = "training_scheduler"  # the folder of the training scheduler in an export whose call uses another scheduler
OF_TRAINING = (
    KEPT,
    "scheduler/unbaked",
)  # older versions exported to the second folder, which diffusers cannot load with a `variant`
TOLERANCE = 1e-6  # largest error of a sigma, for float32 rounding
BEYOND_SHIFT = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def require_known_shift(
    scheduler: FlowMatchEulerDiscreteScheduler, name: str, family: str, allowed: Sequence[str] = ()
) -> None:
    """Raise `UserError` if a scheduler sets options that change its sigmas, other than a static shift and those in `allowed`.

    `name` is the pipeline's name and `family` the family's name in the message.
    """
    extra = [key for key in BEYOND_SHIFT if scheduler.config.get(key) and key not in allowed]
    if extra:
        known = " and ".join(["a static shift", *allowed])
        raise UserError(
            f"the scheduler of {name} sets {', '.join(extra)}, but {family} supports only {known}; restore "
            "scheduler/scheduler_config.json from the original pipeline"
        )


def from_config(config: dict[str, Any], **changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """Return a `FlowMatchEulerDiscreteScheduler` with the configuration `config`, in which `changes` replace values."""
    return cast(FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config(config, **changes))


def plain_scheduler(scheduler: FlowMatchEulerDiscreteScheduler, nfe: int) -> FlowMapEulerDiscreteScheduler:
    """Return a scheduler that takes n steps at the sigmas 1, 1 - 1/n, ..., 1/n, shifted by the shift of `scheduler`.

    Its method `set_timesteps(n)` needs no explicit sigmas, for any n. As a check, its sigmas for n = `nfe` are compared
    with those of `scheduler`. Raises `UserError` if they differ, as they may in another version of diffusers. Also
    raises `UserError` if `nfe` is below 1.
    """
    if nfe < 1:
        raise UserError(f"nfe={nfe} must be at least 1, because it is the number of steps")
    config: Any = scheduler.config  # a FrozenDict: its keys are attributes
    # by name: `from_config` would replace arguments that were given by position with their defaults
    plain = FlowMapEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.shift)
    sigmas: Any = uniform_sigmas(nfe).numpy()  # the parameter is declared as a list but used as an array
    scheduler.set_timesteps(sigmas=sigmas)
    plain.set_timesteps(nfe)
    error = (plain.sigmas.double() - scheduler.sigmas.double()).abs().max()
    if not error < TOLERANCE:
        raise UserError(
            f"the installed diffusers computes sigmas that differ from those of training by up to {error:.1e}; install "
            "diffusers 0.42 and export again"
        )
    return plain


def of_training(config: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler | None:
    """Return the scheduler of training, rebuilt from `config`, the configuration of an exported scheduler.

    Returns None if the exported scheduler was not made by `plain_scheduler`.
    """
    if config.get("_class_name") != FlowMapEulerDiscreteScheduler.__name__:
        return None
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config["num_train_timesteps"], shift=config["shift"])
