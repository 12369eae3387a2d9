"""A run that is killed again and again, and what was lost by it."""

import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from killable import POINTS, die_at, start

from cdm_lightning.checkpoint.folder import checkpoints_in, iteration_of
from cdm_lightning.checkpoint.stored import read_checkpoint


@dataclass
class Losses:
    """Faults that hit, by kind; starts that went on from a checkpoint; bytes of finished checkpoints that went bad."""

    faults: Counter = field(default_factory=Counter)
    survived: int = 0
    bytes_lost: int = 0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return (
            f"{self.faults.total()} faults injected ({kinds}), {self.survived} survived, {self.bytes_lost} bytes of "
            "finished checkpoints lost"
        )


def soak(overrides: Sequence[str], place: Path, kills: int, seed: int, world_size: int = 1) -> Losses:
    """Start the run, kill it by SIGKILL `kills` times at random moments, let it end, and count the losses."""
    rng, losses, newest = random.Random(seed), Losses(), 0
    while losses.faults.total() < kills:
        kind = rng.choice(("any moment", *POINTS))
        victim = rng.randrange(world_size) if kind in ("any moment", "step", "shard") else 0
        if kind == "any moment":
            run = start(overrides, place, world_size).wait_for_training()
            run.processes[victim].join(rng.uniform(0, 0.6))
            if run.processes[victim].is_alive():
                run.kill(signal.SIGKILL, victim)
        else:
            run = start(overrides, place, world_size, die_at, (kind, rng.randint(1, 3), victim))
        codes = run.wait()
        assert codes[victim] in (-signal.SIGKILL, 0), run.output
        newest = look(place / "checkpoints", newest, losses)
        if codes[victim] == 0:
            raise AssertionError(f"the run ended after {losses}: make it longer")
        losses.faults[kind] += 1
        losses.survived += 1
    last = start(overrides, place, world_size)
    assert last.wait() == [0] * world_size, last.output
    return losses


def look(folder: Path, newest: int, losses: Losses) -> int:
    """Verify all finished checkpoints after a kill; the newest one's iteration, which is never lower than before."""
    found = 0
    for path in checkpoints_in(folder):
        if read_checkpoint(path).find_fault():
            losses.bytes_lost += sum(file.stat().st_size for file in path.iterdir())
        else:
            found = iteration_of(path)
    assert found >= newest
    return found
