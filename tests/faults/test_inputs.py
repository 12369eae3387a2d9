"""The short form of the bad inputs: some of each kind, from a fixed seed; and that the harness sees what it looks for."""

import stat
from pathlib import Path

import pytest

from faults import engine, report
from faults.__main__ import parser
from faults.arguments import output_cases
from faults.bases import make_stock
from faults.breaking import fifo
from faults.cases import Case
from faults.plans import SHARES, all_cases, plan

SHORT = {  # cases of each kind
    "options": 14,
    "names": 3,
    "good inputs": 3,
    "prompts": 9,
    "model folders": 7,
    "run folders": 9,
    "LoRA files": 3,
    "arguments": 6,
    "outputs": 4,
    "secrets": 3,
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good models and runs, which cases copy from."""
    return make_stock(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow  # until the faults that it finds are fixed
@pytest.mark.parametrize("kind", SHORT)
def test_bad_inputs_are_refused_in_one_line_and_nothing_is_lost(kind: str, stock: Path, tmp_path: Path) -> None:
    cases = [case for case in plan(SHORT[kind], seed=0, kinds=(kind,)) if not case.fresh]
    results = engine.run_all(cases, tmp_path, stock)
    bad = [result for result in results if not result.good]
    assert not bad, "\n".join(map(str, ["", *bad]))
    assert not [result for result in results if result.outcome == engine.LEFT_OUT]
    assert report.lost(results) == 0


def case(fault: str, *more: str, **options) -> Case:
    """A command that commits a fault."""
    return Case("faulty", fault, "faults.faulty", [fault, *more], **options)


FAULTY = {
    "traceback": case("traceback"),
    "hang": case("hang", seconds=1.0),
    "foreign code": case("foreign code"),
    "lost": case("lost"),
    "outside": case("outside"),
    "leaked": case("leaked", "sesame", secrets=["sesame"]),
    "not one line": case("not one line"),
    "late": case("late"),
    "ended": case("ended"),
    "accepted": case("nothing", expects="refused"),
    "refused wrongly": case("refused", expects="runs"),
}


@pytest.mark.parametrize("fault", engine.FAULTS)
def test_the_harness_finds_each_fault(fault: str, tmp_path: Path) -> None:
    result = engine.run(FAULTY[fault], tmp_path / "box", tmp_path)
    assert result.faults == [fault]
    assert result.outcome == "failed"


def test_the_harness_finds_no_fault_in_what_is_right(tmp_path: Path) -> None:
    good = {"ran": case("nothing", expects="runs"), "refused": case("refused", expects="refused")}
    for outcome, tried in good.items():
        result = engine.run(tried, tmp_path / "box", tmp_path)
        assert (result.outcome, result.faults) == (outcome, [])
    assert not (tmp_path / "box").exists()


def test_a_pipe_that_a_command_has_replaced_is_lost(tmp_path: Path) -> None:
    replaced = case("replaced", prepare=lambda work, stock: fifo(work / "pipe"), keeps=["pipe"])
    assert "lost" in engine.run(replaced, tmp_path / "box", tmp_path).faults


def test_no_case_names_a_real_device_as_its_output(tmp_path: Path) -> None:
    """As root, a command that is wrong would replace it."""
    for tried in output_cases():
        assert not [text for text in tried.arguments if "/dev/" in text]
        if tried.prepare is not None:
            work = tmp_path / str(id(tried))
            work.mkdir()
            tried.prepare(work, tmp_path)
            assert all(path.resolve().is_relative_to(tmp_path) for path in work.rglob("*"))
            assert all(stat.S_IFMT(path.lstat().st_mode) for path in work.rglob("*"))


def test_the_long_form_has_500_different_cases_of_all_kinds() -> None:
    chosen = plan(500)
    assert len({tried.key for tried in chosen}) == 500
    assert {tried.kind for tried in chosen} == set(SHARES) == {tried.kind for tried in all_cases()}
    assert [tried.key for tried in plan(500)] == [tried.key for tried in chosen]


def test_results_go_to_an_ignored_folder_by_default() -> None:
    assert parser().parse_args([]).publish is False
    assert parser().parse_args(["--publish"]).publish is True
    assert report.evidence.folder_of(False, "faults") == report.ROOT / "outputs" / "faults"


def test_the_table_counts_each_kind() -> None:
    results = [
        engine.Result("a", "options", "", "refused"),
        engine.Result("b", "options", "", "failed", ["lost", "traceback"]),
        engine.Result("c", "prompts", "", "saved"),
    ]
    head, _, options, prompts, whole = (line.split(" | ") for line in report.table(results).splitlines())
    counts = dict(zip(head, options))
    assert counts["tried"] == "2"
    assert counts["refused"] == counts["lost"] == counts["traceback"] == "1"
    assert dict(zip(head, prompts))["saved"] == "1"
    assert dict(zip(head, whole))["tried"] == "3"
    assert report.lost(results) == 1
