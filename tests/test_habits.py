"""What the project promises beside its code: one version, one gate, and published figures that nothing replaces unasked."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import cdm_lightning
from benchmarks import evidence

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
WRITES_NOTHING = {"plan_check", "gpu.plans"}  # commands that only print
WRITERS = {
    "open",
    "write_text",
    "write_bytes",
    "mkdir",
    "touch",
    "copy",
    "copyfile",
    "copytree",
    "move",
    "dump",
    "save",
}
PUBLISHERS = {"folder_of", "write", "write_results", "table"}  # what takes `publish` by position


def text(name: str) -> str:
    """The text of a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_that_of_pyproject_and_costs_no_import_of_torch() -> None:
    program = "import sys, cdm_lightning; print(cdm_lightning.__version__, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    assert run.stdout.split() == [said, "False"], "if the version is an older one: run `make setup`"


def test_the_changelog_s_newest_version_is_the_package_s() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", text("CHANGELOG.md"), re.MULTILINE)
    released = [(version, rest) for version, rest in headings if version != "Unreleased"]
    assert released[0][0] == cdm_lightning.__version__
    for version, rest in released:
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", rest), f"{version} has no date"


def test_each_release_says_which_runs_it_resumes() -> None:
    releases = re.split(r"^## \[(?=\d)", text("CHANGELOG.md"), flags=re.MULTILINE)[1:]
    assert all("**Which runs stay resumable:** " in release for release in releases)


def test_the_hooks_are_the_checks_of_the_gate_and_need_no_network() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)
    assert recipe is not None
    checks = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == checks
    for hook in repository["hooks"]:
        assert hook["language"] == "system"  # anything else makes an environment of its own, from the network
        assert hook["always_run"]
        assert not hook["pass_filenames"]


def commands() -> list[str]:
    """The benchmarks that can be run."""
    with_main = [file for file in BENCHMARKS if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]
    return [".".join(file.relative_to(ROOT / "benchmarks").with_suffix("").parts) for file in with_main]


def test_results_go_to_an_ignored_folder_by_default() -> None:
    assert evidence.folder_of(False) == ROOT / "outputs" / "benchmarks"
    assert evidence.folder_of(True) == ROOT / "benchmarks" / "results"
    assert "outputs/" in text(".gitignore").splitlines()


@pytest.mark.parametrize("name", [name for name in commands() if name not in WRITES_NOTHING])
def test_a_benchmark_publishes_on_demand_only(name: str) -> None:
    parser = importlib.import_module(f"benchmarks.{name}").parser()
    needed = {"tiny_sd3": ["student"], "gpu.__main__": ["step"]}.get(name, [])
    assert parser.parse_args(needed).publish is False
    assert parser.parse_args([*needed, "--publish"]).publish is True


@pytest.mark.parametrize("file", [file for file in BENCHMARKS if file.stem != "evidence"], ids=lambda file: file.stem)
def test_no_other_file_of_the_benchmarks_writes_results(file: Path) -> None:
    """None opens a file for writing or names the published folder; all results go through benchmarks/evidence.py."""
    assert not ways_to_write(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("path.write_text('')", "write_text"),
        ("open('x', 'w')", "open"),
        ("shutil.copy(a, b)", "copy"),
        ("folder = Path(__file__).parent / 'results'", "results"),
        ("folder = 'benchmarks/results'", "benchmarks/results"),
        ("folder = evidence.folder_of(True)", "folder_of(True)"),
        ("write_results('a', 'b', {}, {}, True)", "write_results(True)"),
        ("gpu_tables.run(candidates, publish=True)", "run(True)"),
        ("write_results('a', 'b', {}, {}, options.publish)", None),
    ],
)
def test_the_rule_sees_a_way_around(line: str, found: str | None) -> None:
    assert ways_to_write(ast.parse(line)) == ([] if found is None else [found])


def ways_to_write(tree: ast.AST) -> list[str]:
    """Calls that write files or publish without being asked, and constants that name the published folder."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in WRITERS:
                found.append(name)
            asked = [keyword.value for keyword in node.keywords if keyword.arg == "publish"]
            if any(map(is_true, asked + (node.args if name in PUBLISHERS else []))):
                found.append(f"{name}(True)")
        elif isinstance(node, ast.Constant) and re.fullmatch(r"(\S*/)?results/?", str(node.value)):
            found.append(str(node.value))
    return found


def is_true(node: ast.AST) -> bool:
    """Whether this is the constant True."""
    return isinstance(node, ast.Constant) and node.value is True
