"""Every command that the README, CONTRIBUTING.md and docs/ show is executed or taken apart here."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import gpu_tables, step_time, study
from benchmarks.gpu import __main__ as gpu
from cdm_lightning import evaluate, export, extract_lora, plan, sample
from cdm_lightning.config import asset_path, compose
from cdm_lightning.run.model_words import read_setting

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^|`)((?:make|python -m) [^`\n]+)", re.MULTILINE)
COMMANDS = sorted({match.strip() for page in PAGES for match in COMMAND.findall(page.read_text(encoding="utf-8"))})


def test_the_first_screen_shows_the_two_commands() -> None:
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20]
    assert any(line.startswith("make demo") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    module, arguments = words[2], words[3:]
    match module:
        case "cdm_lightning.train" | "cdm_lightning.pretrain":
            assert_composes(module.removeprefix("cdm_lightning."), arguments, tmp_path)
        case "cdm_lightning.plan":
            own, overrides = plan.split(arguments)
            assert "gpus" in own
            assert_composes("train", overrides, tmp_path)
        case "benchmarks.plan_check":
            assert_composes("train", arguments, tmp_path)
        case "cdm_lightning.cache_text":
            assert_composes("train", arguments, tmp_path)
        case "cdm_lightning.export":
            export.parser().parse_args(arguments)
        case "cdm_lightning.extract_lora":
            extract_lora.parser().parse_args(arguments)
        case "cdm_lightning.sample":
            sample.parser().parse_args(arguments)
        case "cdm_lightning.evaluate":
            for model in evaluate.parser().parse_args(arguments).model:
                assert all(read_setting(model[0], word) for word in model[1:])
        case "benchmarks.tiny_sd3":
            assert arguments[0] in ("teacher", "student")
        case "benchmarks.study":
            study.parser().parse_args(arguments)
        case "benchmarks.step_time":
            step_time.parser().parse_args(arguments)
        case "benchmarks.gpu":
            gpu.parser().parse_args(arguments)
        case "benchmarks.gpu_tables":
            gpu_tables.parser().parse_args(arguments)
        case _:
            pytest.fail(f"the README shows {module}, which no test knows")


def assert_composes(config_name: str, arguments: list[str], folder: Path) -> None:
    """Each job of the command, sweeps taken apart, composes to a configuration without unknown keys."""
    overrides = [word for word in arguments if not word.startswith("-") and word not in ("job", "...")]
    jobs: list[list[str]] = [[]]
    for override in overrides:
        key, _, values = override.partition("=")
        jobs = [
            [*job, f"{key}={value}"]
            for job in jobs
            for value in (values.split(",") if values[:1] not in "[{" else [values])
        ]
    place = "output_dir" if config_name == "train" else "output"
    for job in jobs:
        compose([*job, f"{place}={folder}"], config_name)


def test_the_rows_of_the_table_are_overrides_that_compose(tmp_path: Path) -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| you want | add |")[1].split("\n\n")[0]
    cells = [line.split("|")[2] for line in table.splitlines()[2:]]
    seen = 0
    for cell in cells:
        for code in re.findall(r"`([^`]+)`", cell):
            words = [word for word in shlex.split(code) if not word.startswith("--") and word != "job"]
            base = [] if any(word.startswith("experiment=") for word in words) else ["experiment=sd3_cdm"]
            if words:
                compose([*base, *words, f"output_dir={tmp_path}"])
                seen += 1
    assert seen >= 7


def test_the_python_example_runs_on_the_bundled_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_student").symlink_to(asset_path("tiny_sd3"))
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert blocks


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "SECURITY.md", ROOT / "benchmarks/README.md"], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        assert place.exists(), target
        assert not anchor or anchor in headings(place), target


def test_the_index_has_all_pages_and_readme_links_it() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"]
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_method_is_linked_before_its_first_word() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = [text.index(word) for word in ("student", "teacher", "fake score", "rollout", "anchor", "guidance")]
    assert text.index("docs/method.md") < min(words)
