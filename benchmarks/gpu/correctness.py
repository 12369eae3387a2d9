"""The command `correctness`: the tests of tests/gpu, written one by one, and both orders of work against each other."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import Comparison
from benchmarks.gpu.record import LEFT_OUT, Record
from benchmarks.sizes import SIZES

TESTS = Path(__file__).parents[2] / "tests" / "gpu"
ORDERS, OUTCOMES = "Losses and gradients of our order against the authors'", "Tests"


def correctness(record: Record, size: str, device: str) -> None:
    """The comparison of the orders in float32 and bfloat16, then the tests as long as there is time."""
    names = ("sd3_toy", "longcat_toy", *(("tiny",) if size == "full" else ()))
    for name in names:
        for dtype in ("float32", "bfloat16"):
            record.attempt(f"{name}, {dtype}", lambda n=name, d=dtype: _orders(record, n, d, device))
    if not TESTS.is_dir():
        record.put(LEFT_OUT, "tests/gpu", reason="the folder is not there")
        return
    os.environ["CDM_GPU_TESTS_ON"] = device
    sys.path.insert(0, str(TESTS.parent))
    pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "--durations=0", str(TESTS)], plugins=[Outcomes(record)])


def _orders(record: Record, name: str, dtype: str, device: str) -> None:
    found = Comparison(replace(SIZES[name], compute_dtype=dtype, teacher_dtype=dtype, device=device)).check()
    for computed, differences in found.items():  # a size in bfloat16 is compared in float32 too
        weights = "" if computed == dtype else f", with a teacher in {dtype}"
        record.put(ORDERS, f"{name}, computed in {computed}{weights}", **differences)


class Outcomes:
    """A plugin of pytest that writes the outcome of each test as soon as there is one, and runs no test after the limit."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_runtest_setup(self, item: Any) -> None:
        """Leave out what has no time."""
        if self.record.left < 1:
            pytest.skip("no time is left")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write what a test has come to; of a failure the last line."""
        if report.when != "call" and report.outcome == "passed":
            return
        lines = (
            str(report.longreprtext if report.failed else getattr(report, "longrepr", "") or "").strip().splitlines()
        )
        errors = [line[1:].strip() for line in lines if line.startswith("E ")]
        said = (errors or lines[-1:] or [""])[0]
        self.record.put(
            OUTCOMES, report.nodeid.rpartition("/")[2], outcome=report.outcome, seconds=report.duration, said=said
        )
