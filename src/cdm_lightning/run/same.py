"""Whether a run may be resumed with this configuration: it may differ in what does not decide the weights."""

from pathlib import Path
from typing import Any

from cdm_lightning.config import MOVED
from cdm_lightning.errors import UserError
from cdm_lightning.parallel import device_count

FREE_KEYS = (
    "run_name",
    "output_dir",
    "resume",
    "trainer",
    "strategy",
    "checkpoint",
    "callbacks",
    "logger",
    "module.samplers",
    "module.accumulate",  # these five change how the run is computed, not what comes out
    "module.gradient_checkpointing",
    "module.recompute_attention",
    "module.compile_backend",
    "module.rollouts_together",
    "data.num_workers",
    "data.val",
    "data.val_batch_size",
    "data.val_prompts",
    "text_cache",  # holds what the text encoders would give
)
FREE_ENDINGS = (".learning_rate.total", ".cache_folder")  # the first follows max_steps
BOUND_KEYS = ("callbacks.ema",)

# Options that versions before 2026-11-27 kept elsewhere: the old key, or the beginning of one, and where it is now.
ELSEWHERE = {old: (new, f"module.{new}") for old, new in MOVED.items()} | {
    "module.student_optim.": ("module.optim.student.",),
    "module.fake_score_optim.": ("module.optim.fake_score.",),
}
RENAMED = {"cdm_lightning.core.objective.CDMObjective": "cdm_lightning.objectives.cdm.CDMObjective"}
DROPPED = {"module.spread_anchors": False}  # options that are gone, with the value at which they did nothing


def require_same_configuration(saved: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """UserError if the run `saved` in `folder` differs from this configuration in what decides its weights.

    Compared is everything but `FREE_KEYS` (where the run lies, how long it goes on, what is logged and evaluated).
    The batch size may change if that of all processes together stays. `max_steps` is free: a longer run continues a
    shorter one, and a decaying learning rate follows the new end from there on. An option that the run's version did not
    have yet is no difference while it is off (false or null).
    """
    before, now = modernised(flatten(saved)), flatten(config)
    for flat in (before, now):  # what counts is the batch of all processes
        if flat:
            processes = device_count(flat["trainer.devices"]) * flat["trainer.num_nodes"]
            flat["data.batch_size x processes"] = flat.pop("data.batch_size") * processes
    differing = sorted(
        key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and not is_free(key)
    )
    differing = [key for key in differing if key in before or now[key] is not False]
    differing = [key for key in differing if not is_copy(key, differing)]
    if before and differing:
        keys = ", ".join(differing[:5])
        raise UserError(f"{folder} holds a run of another configuration (it differs in {keys}); set another run_name")


def flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, child in node.items():
        flat |= flatten(child, f"{prefix}{name}.") if isinstance(child, dict) else {prefix + str(name): child}
    return flat


def is_free(key: str) -> bool:
    """Whether a run may go on with another value of this dotted key."""

    def under(roots: tuple[str, ...]) -> bool:
        return any(key == root or key.startswith(root + ".") for root in roots)

    return (under(FREE_KEYS) and not under(BOUND_KEYS)) or key.endswith(FREE_ENDINGS)


def is_copy(key: str, others: list[str]) -> bool:
    """Whether the key is the module's copy of an option that is named by itself: `module.objective.x` of `objective.x`."""
    return key.startswith("module.") and key.removeprefix("module.") in others


def modernised(flat: dict[str, Any]) -> dict[str, Any]:
    """A configuration of an older version, its options where they are now."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        if DROPPED.get(key, ...) == value:
            continue
        begins = next((old for old in ELSEWHERE if key == old or (old.endswith(".") and key.startswith(old))), None)
        value = RENAMED.get(value, value) if isinstance(value, str) else value
        found |= (
            {key: value} if begins is None else {new + key.removeprefix(begins): value for new in ELSEWHERE[begins]}
        )
    return found
