"""A configuration of the stock scheduler with which a plain n-step call runs the student's sigmas.

Without explicit sigmas, `FlowMatchEulerDiscreteScheduler` does not space its steps by 1/n: it stores the shifted end
points, spaces the steps evenly between them and shifts again (diffusers issue 13243). For example, 4 steps at shift 3 run
the sigmas 1, .858, .602, .009.
Its `shift` s and `shift_terminal` can be chosen so that n steps run k u / (1 + (k - 1) u) at u = 1, 1 - 1/n, ..., 1/n,
the schedule of a student of shift k. With m = s / (T + s - 1) the lowest stored sigma, equating both forms gives
    shift_terminal = k / (n + k - 1)        (s - 1) / s (1 - m) = q,  q = (k - 1)(n - 1) / (n k)
and the latter is q s^2 - (T - 1)(1 - q) s + (T - 1) = 0 for T training timesteps.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

from diffusers import FlowMatchEulerDiscreteScheduler

from cdm_lightning.core.schedules import uniform_sigmas
from cdm_lightning.errors import UserError

UNBAKED = "scheduler/unbaked"  # where an exported folder keeps the scheduler of training
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


def bake(scheduler: FlowMatchEulerDiscreteScheduler, nfe: int) -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler that runs the shifted uniform sigmas of `scheduler` when called with `nfe` steps and no sigmas."""
    if nfe < 1:
        raise UserError(f"nfe={nfe} is less than one network call; pass 1 or more")
    config: Any = scheduler.config  # a FrozenDict: its keys are attributes
    if nfe == 1:  # one step from 1 to 0, whatever the shift
        baked = from_config(config)
    else:
        shift, terminal = baked_shift(nfe, config.shift, config.num_train_timesteps)
        baked = from_config(config, shift=shift, shift_terminal=terminal)
    sigmas: Any = uniform_sigmas(nfe).numpy()  # the parameter is declared as a list but used as an array
    scheduler.set_timesteps(sigmas=sigmas)
    baked.set_timesteps(nfe)
    error = (baked.sigmas - scheduler.sigmas).abs().max()
    if not error < TOLERANCE:
        raise UserError(
            f"the scheduler of the installed diffusers spaces its steps differently (by {error:.1e}); export with "
            "diffusers 0.42"
        )
    return baked


def baked_shift(nfe: int, shift: float, timesteps: int) -> tuple[float, float]:
    """Return (shift, shift_terminal) for `nfe` >= 2 steps of a student of `shift`; UserError if there is no solution."""
    q = (shift - 1) * (nfe - 1) / (nfe * shift)
    b, c = (timesteps - 1) * (1 - q), timesteps - 1
    discriminant = b * b - 4 * q * c
    if discriminant < 0:
        raise UserError(
            f"{nfe} steps at shift {shift} cannot be baked into a stock scheduler, no schedule of which has these sigmas; "
            "export for fewer steps, with --nfe (export_nfe in callbacks.ladder)"
        )
    return 2 * c / (b + math.sqrt(discriminant)), shift / (nfe + shift - 1)
