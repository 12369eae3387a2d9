"""The scheduler of an exported folder, with which a plain call of any number of steps runs the student's own sigmas.

Without explicit sigmas, `FlowMatchEulerDiscreteScheduler` does not space its steps by 1/n: it stores the shifted end points,
spaces the steps evenly between them and shifts again (diffusers issue 13243). For example, 4 steps at shift 3 run the sigmas
1, .858, .602, .009. `FlowMapEulerDiscreteScheduler`, also of diffusers, takes the same Euler steps at the shifted values of
1, 1 - 1/n, ..., 1/n, which are the student's, for every n.
"""

from collections.abc import Sequence
from typing import Any, cast

from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from cdm_lightning.core.schedules import uniform_sigmas
from cdm_lightning.errors import UserError

KEPT = "training_scheduler"  # where an exported folder keeps the scheduler of training if its call cannot use it
OF_TRAINING = (
    KEPT,
    "scheduler/unbaked",
)  # the second: exports of older versions, which diffusers cannot load with a `variant`
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
    """UserError if the scheduler of the pipeline `name` uses options other than a static shift and those in `allowed`."""
    extra = [key for key in BEYOND_SHIFT if scheduler.config.get(key) and key not in allowed]
    if extra:
        known = " and ".join(["a static shift", *allowed])
        raise UserError(
            f"the scheduler of {name} sets {', '.join(extra)}, but {family} is trained with {known} only; restore "
            "scheduler/scheduler_config.json from the original pipeline"
        )


def from_config(config: dict[str, Any], **changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler of this configuration with some values changed."""
    return cast(FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config(config, **changes))


def plain_scheduler(scheduler: FlowMatchEulerDiscreteScheduler, nfe: int) -> FlowMapEulerDiscreteScheduler:
    """Return a scheduler that runs the shifted uniform sigmas of `scheduler`, without being given sigmas, for every step count.

    UserError if the installed diffusers runs others in `nfe` steps.
    """
    if nfe < 1:
        raise UserError(f"nfe={nfe} is less than one network call; pass 1 or more")
    config: Any = scheduler.config  # a FrozenDict: its keys are attributes
    # by name: `from_config` would replace arguments that were given by position with their defaults
    plain = FlowMapEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.shift)
    sigmas: Any = uniform_sigmas(nfe).numpy()  # the parameter is declared as a list but used as an array
    scheduler.set_timesteps(sigmas=sigmas)
    plain.set_timesteps(nfe)
    error = (plain.sigmas.double() - scheduler.sigmas.double()).abs().max()
    if not error < TOLERANCE:
        raise UserError(
            f"the scheduler of the installed diffusers spaces its steps differently (by {error:.1e}); export with "
            "diffusers 0.42"
        )
    return plain


def of_training(config: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler | None:
    """Return the scheduler of training for the configuration of one that `plain_scheduler` made; None for any other."""
    if config.get("_class_name") != FlowMapEulerDiscreteScheduler.__name__:
        return None
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config["num_train_timesteps"], shift=config["shift"])
