"""What a command imports before it does anything: `--help` must not wait for torch."""

import json
import os
import subprocess
import sys

import pytest

from cdm_lightning.config import asset_path

COMMANDS = [
    "cdm_lightning.train",
    "cdm_lightning.sample",
    "cdm_lightning.evaluate",
    "cdm_lightning.export",
    "cdm_lightning.extract_lora",
    "cdm_lightning.cache_text",
    "cdm_lightning.pretrain",
    "benchmarks.step_time",
    "benchmarks.inference",
]
HEAVY = {"torch", "lightning", "diffusers", "transformers", "matplotlib", "torchvision", "numpy"}
LEVEL = "TORCH_CPP_LOG_LEVEL"
PROGRAM = """
import contextlib, io, json, runpy, sys
said = {}
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(command, run_name="__main__")
    said[command] = out.getvalue(), sorted(name for name in sys.modules if "." not in name)
print(json.dumps(said))
"""


def test_help_of_each_command_imports_neither_torch_nor_lightning():
    run = subprocess.run([sys.executable, "-c", PROGRAM, *COMMANDS], capture_output=True, text=True, check=True)
    said = json.loads(run.stdout)
    assert list(said) == COMMANDS
    for command, (text, modules) in said.items():
        assert "usage:" in text or "powered by Hydra" in text, f"{command} --help says nothing"
        assert not HEAVY & set(modules), f"{command} --help imports {HEAVY & set(modules)}"


def test_a_command_says_nothing_of_its_libraries(tmp_path):
    """Only what a user can use: the picture's path."""
    picture = tmp_path / "grid.png"
    options = ["--model", asset_path("tiny_sd3"), "--prompt", "a red circle", "--output", str(picture)]
    command = [sys.executable, "-m", "cdm_lightning.sample", *options]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (f"picture: {picture}\n", "")


@pytest.mark.parametrize(("given", "expected"), [(None, "ERROR"), ("INFO", "INFO")])
def test_torch_does_not_print_its_stack_when_another_process_ends(given, expected):
    """Torch reads the level when it is imported, so it is set before; a level of the user's stays."""
    variables = {name: value for name, value in os.environ.items() if name != LEVEL} | ({LEVEL: given} if given else {})
    code = f"import cdm_lightning, os, sys; assert 'torch' not in sys.modules; print(os.environ['{LEVEL}'])"
    printed = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == expected
