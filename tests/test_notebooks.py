"""The notebooks run as plain Python, in a shortened form. They are stored with the outputs of one run from top to bottom."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SHORTER = {  # what is replaced in each notebook's code
    "01_cdm_in_two_dimensions": {
        "ITERATIONS = 1000": "ITERATIONS = 4",
        "SAMPLES = 128, 4096": "SAMPLES = 32, 64",
        "Toy2DBackbone()": "Toy2DBackbone(fit_steps=5)",
    },
}


def code_cells(name: str) -> list[dict]:
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", SHORTER)
def test_notebook_runs(name, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: matplotlib.pyplot.close("all"))
    code = "\n".join("".join(cell["source"]) for cell in code_cells(name))
    for full, short in SHORTER[name].items():
        assert full in code
        code = code.replace(full, short)
    exec(compile(code, name, "exec"), {"__name__": "notebook"})


@pytest.mark.parametrize("name", SHORTER)
def test_outputs_are_those_of_one_run_and_small(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"display_data", "stream"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000


def test_the_plane_s_text_says_what_its_table_shows():
    """The sentences of the notebook about its own figures hold for the figures that are stored with it."""
    name = "01_cdm_in_two_dimensions"
    printed = "".join(
        "".join(output.get("text", "")) for cell in code_cells(name) for output in cell["outputs"]
    ).splitlines()
    table = re.compile(r"(steps|start|published|level-aware) [ \d.]+$")
    rows = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in printed if table.match(line)}
    start, published, level_aware = (
        dict(zip(rows["steps"], rows[name])) for name in ("start", "published", "level-aware")
    )
    assert list(start) == [1, 2, 3, 4, 6, 8, 16]
    assert all(level_aware[steps] < published[steps] for steps in start)
    assert [published[steps] for steps in (4, 6, 8, 16)] == sorted(published[steps] for steps in (4, 6, 8, 16))
    assert all(start[steps] < min(published[steps], level_aware[steps]) for steps in (6, 8, 16))
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    told = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    quoted = [f"{row[steps]:.1f}" for row in (start, published, level_aware) for steps in (1, 4, 8)]
    assert [figure for figure in quoted if figure not in told] == []


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHORTER)
