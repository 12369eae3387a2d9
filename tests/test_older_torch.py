"""What depends on the version of torch or on how the package is installed."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.launcher.api as launcher
from torch.utils.flop_counter import flop_registry

import cdm_lightning
from cdm_lightning.distributed import launch
from cdm_lightning.planning import live

ROOT = Path(__file__).parents[1]
USE = """
import json, sys
from pathlib import Path
import cdm_lightning
from cdm_lightning.run.folder import Run
from cdm_lightning.run.record import package_version, PACKAGES
print(json.dumps([cdm_lightning.__version__, {name: package_version(name) for name in PACKAGES}]))
"""


def test_attention_counts_whatever_torch_has_formulas_for(monkeypatch):
    query = torch.empty(2, 3, 7, 8, requires_grad=True)
    one_product = 2 * 2 * 3 * 7 * 7 * 8
    operators = [
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{ending}") for ending in ("", "_backward")
    ]
    for operator in operators:  # as in torch 2.11
        monkeypatch.delitem(flop_registry, operator, raising=False)

    def counted() -> float:
        with live.LiveBytes() as seen:
            torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        return seen.flops

    assert counted() == 0
    live.count_attention()
    assert counted() == 7 * one_product  # two forward; five backward, of which one repeats the scores


def test_processes_are_started_by_a_torch_that_has_no_time_limit_for_their_end(monkeypatch, tmp_path):
    given: list[dict] = []

    def older(
        *, min_nodes, max_nodes, nproc_per_node, run_id, rdzv_backend, rdzv_endpoint, max_restarts, signals_to_handle
    ):
        given.append({"processes": nproc_per_node, "signals": signals_to_handle})

    monkeypatch.setattr(launcher, "LaunchConfig", older)
    monkeypatch.setattr(launcher, "elastic_launch", lambda settings, program: lambda *arguments: None)
    assert launch.run_processes(tmp_path, 3) == 0
    assert given == [{"processes": 3, "signals": "none"}]


def test_a_checkout_that_is_not_installed_knows_its_version(tmp_path):
    for folder in map(Path, sys.path):
        if folder.name == "site-packages":
            for entry in folder.iterdir():
                if "cdm" not in entry.name:
                    (tmp_path / entry.name).symlink_to(entry)
    command = [sys.executable, "-S", "-c", USE]
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    own, packages = json.loads(done.stdout)
    assert own == packages["cdm-lightning"] == cdm_lightning.__version__
    assert packages["torch"].startswith(torch.__version__.split("+")[0])
