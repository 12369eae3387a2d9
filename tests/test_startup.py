"""What a command imports before it does anything: `--help` must not wait for torch."""

import json
import subprocess
import sys

COMMANDS = [
    "cdm_lightning.train",
    "cdm_lightning.sample",
    "cdm_lightning.export",
    "cdm_lightning.extract_lora",
    "cdm_lightning.cache_text",
    "cdm_lightning.pretrain",
    "benchmarks.step_time",
    "benchmarks.inference",
]
HEAVY = {"torch", "lightning", "diffusers", "transformers", "matplotlib", "torchvision", "numpy"}
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
