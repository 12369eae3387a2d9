"""What the project promises beside its code: one version, one gate, and published figures that nothing replaces unasked."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_pyproject_and_costs_no_import_of_torch() -> None:
    program = "import sys, cdm_lightning; print(cdm_lightning.__version__, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert run.stdout.split() == [said, "False"], "if the version is an older one: run `make setup`"
