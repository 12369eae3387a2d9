"""The short form of the bad inputs: some of each kind, from a fixed seed; and that the harness sees what it looks for."""

from pathlib import Path

import pytest

from faults import engine, report
from faults.bases import make_stock
from faults.plans import plan

SHORT = {  # cases of each kind
    "options": 24,
    "names": 3,
    "good inputs": 3,
    "prompts": 10,
    "model folders": 12,
    "run folders": 14,
    "LoRA files": 5,
    "arguments": 8,
    "outputs": 5,
    "secrets": 4,
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good models and runs, which cases copy from."""
    return make_stock(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow  # until the faults that it finds are mended
@pytest.mark.parametrize("kind", SHORT)
def test_bad_inputs_are_refused_in_one_line_and_nothing_is_lost(kind: str, stock: Path, tmp_path: Path) -> None:
    cases = [case for case in plan(SHORT[kind], seed=0, kinds=(kind,)) if not case.fresh]
    results = engine.run_all(cases, tmp_path, stock)
    bad = [result for result in results if not result.good]
    assert not bad, "\n".join(map(str, ["", *bad]))
    assert report.lost(results) == 0
