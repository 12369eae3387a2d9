"""Which cases the short and the long form run, from a fixed seed."""

import random
from functools import cache

from faults.arguments import argument_cases, output_cases
from faults.cases import Case
from faults.folders import model_cases, run_cases
from faults.inputs import lora_cases, prompt_cases, secret_cases
from faults.options import chosen, option_cases

SHARES = {  # of the long form, in percent; what is left of a kind with few cases goes to the options
    "options": 30,
    "names": 2,
    "good inputs": 3,
    "prompts": 13,
    "model folders": 14,
    "run folders": 16,
    "LoRA files": 5,
    "arguments": 9,
    "outputs": 5,
    "secrets": 3,
}


@cache
def all_cases(seed: int = 0) -> tuple[Case, ...]:
    """All cases that there are; `seed` decides on the random ones."""
    rng = random.Random(seed)
    cases = (
        *option_cases(),
        *prompt_cases(),
        *model_cases(rng),
        *run_cases(rng),
        *lora_cases(),
        *argument_cases(),
        *output_cases(),
        *secret_cases(),
    )
    return tuple({case.key: case for case in cases}.values())


def plan(count: int, seed: int = 0, kinds: tuple[str, ...] = tuple(SHARES)) -> list[Case]:
    """So many cases of these kinds, in their shares."""
    rng, by_kind = random.Random(seed), {kind: [] for kind in SHARES}
    for case in all_cases(seed):
        by_kind[case.kind].append(case)
    whole = sum(SHARES[kind] for kind in kinds)
    found: list[Case] = []
    for kind in (*(kind for kind in kinds if kind != "options"), *(["options"] if "options" in kinds else [])):
        wanted = max(1, round(count * SHARES[kind] / whole)) if kind != "options" else count - len(found)
        found += chosen(by_kind[kind], wanted, rng)
    return found[:count]
