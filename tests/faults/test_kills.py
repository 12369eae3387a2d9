"""The short form of the kills: a run that is killed and stopped at moments from a fixed seed ends as the undisturbed one."""

import os
import random
from pathlib import Path

import pytest

from cdm_lightning.checkpoint.folder import checkpoints_in
from faults.kills import KINDS, LAYOUTS, Soak, first_difference

BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.mark.parametrize(
    ("layout", "disturbances"),
    [
        ("single", 4),
        pytest.param("single, exporting", 8, marks=pytest.mark.slow),
        pytest.param("ddp", 8, marks=pytest.mark.slow),
        pytest.param("fsdp2", 8, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_by_kills_and_signals(layout: str, disturbances: int, tmp_path: Path) -> None:
    soak = Soak(BY_NAME[layout], tmp_path / "soak", random.Random(0))
    results = soak.rounds(disturbances, KINDS)
    bad = [result for result in results if not result.good]
    assert len(results) == disturbances
    assert not bad, "\n".join(map(str, ["", *bad]))
    assert soak.events > 20
    _see_differences(soak.straight, tmp_path / "soak" / "round_1")


def _see_differences(straight: Path, other: Path) -> None:
    """The comparison is no formality: a lost report and a changed weight are found."""
    assert first_difference(straight, other) is None
    os.rename(other / "table.md", other / "table")
    assert first_difference(straight, other) == "../table.md is missing"
    os.rename(other / "table", other / "table.md")
    newest = checkpoints_in(other / "checkpoints")[-1]
    shard = next(newest.glob("shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "differs" in str(first_difference(straight, other))
