"""`python -m benchmarks.waiting`: how long processes wait for one another, from the draws of rollouts alone.

Nothing is timed: a call takes as long as it has samples, but at least a gather of weights where the network is sharded. What
is compared are anchors drawn one by one and `module.spread_anchors`, by the very draws of a run.
"""

import argparse

import torch

from cdm_lightning.core.lengths import UniformLength
from cdm_lightning.core.rng import StepRandom

SHAPES = ((2, 16), (8, 2), (8, 4), (8, 16), (32, 16))  # processes, samples of each
OTHER_CALLS = 1 + 4 + 6.5  # of a sample in an iteration: at its anchor, the fake score's update, half of the student's
GATHER = 4 / 3  # of a call of one sample: 20 ms beside 15 ms, SD3-Medium at 1024 x 1024 pixels


def rollout_times(processes: int, samples: int, spread: bool, turns: int) -> tuple[float, float]:
    """Calls of one sample that the slowest process's rollouts take in an iteration: sharded, and each with a whole network.

    Both iterations of a student's turn walk together, as published. Sharded processes wait at each call of it, others at
    its end.
    """
    sharded = whole = 0.0
    for turn in range(turns):
        walking = torch.zeros(28, processes)
        for iteration in (2 * turn, 2 * turn + 1):
            rng = StepRandom(0, iteration, range(processes * samples), "cpu")
            length = UniformLength(1, 28).sample(rng.shared("schedule.length"))
            draw = rng.spread_index if spread else rng.index
            anchor = draw("rollout.anchor", length).view(processes, samples)
            walking += (anchor > torch.arange(28)[:, None, None]).sum(2)
        slowest = walking.max(dim=1).values
        sharded += float(slowest[slowest > 0].clamp(min=GATHER).sum())
        whole += float(walking.sum(0).max())
    return sharded / turns / 2, whole / turns / 2


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.waiting", description="How long processes wait for one another, by their draws."
    )
    made.add_argument("--turns", type=int, default=2000, metavar="N", help="student's turns that are drawn")
    return made


def main() -> None:
    """Print a row for each shape."""
    turns = parser().parse_args().turns
    print("| processes x samples | a shorter iteration by, sharded | whole networks (`ddp`) |\n| --- | --- | --- |")
    for processes, samples in SHAPES:
        other = OTHER_CALLS * samples
        alone, spread = (rollout_times(processes, samples, chosen, turns) for chosen in (False, True))
        saved = [1 - (b + other) / (a + other) for a, b in zip(alone, spread)]
        print(f"| {processes} x {samples} | {saved[0]:.1%} | {saved[1]:.1%} |")


if __name__ == "__main__":
    main()
