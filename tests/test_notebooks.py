"""The notebooks run as plain Python, in a shortened form, and are stored without outputs."""

import json
from pathlib import Path

import matplotlib
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SHORTER = {  # what is replaced in each notebook's code
    "01_cdm_in_two_dimensions": {
        "ITERATIONS = 400": "ITERATIONS = 4",
        "SAMPLES = 256, 2048": "SAMPLES = 32, 64",
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
def test_notebook_is_stored_without_outputs(name):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(name))


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHORTER)
