"""`evaluate --scores`: scores of another environment become figures with intervals, and mistakes in them one line."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from cdm_lightning.config import asset_path
from cdm_lightning.errors import UserError
from cdm_lightning.evaluate import evaluate, parser
from cdm_lightning.evaluation import given_scores, measuring, protocol
from cdm_lightning.evaluation.given_scores import Images, read_scores
from cdm_lightning.evaluation.store import file_name
from cdm_lightning.run.model_words import read_prompts

MODEL = [[str(asset_path("tiny_sd3")), "name=t", "steps=1,2"]]
NAMES = ["t 1 step", "t 2 steps"]
SHAPES = read_prompts("shapes_heldout", 3)
FEW = Images(NAMES, SHAPES, seed=0)


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.rglob("manifest.jsonl")) for line in path.open()]


def score_of(entry: dict) -> float:
    return math.sin(7 * entry["prompt_index"]) + entry["model"].endswith("2 steps")


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_become_figures_with_intervals_and_nothing_is_measured_again(tmp_path, monkeypatch):
    def run(**more):
        return evaluate(MODEL, "shapes_heldout", tmp_path / "out", count=32, resamples=100, save_images=True, **more)

    before = run()
    entries = manifest(tmp_path / "out/images")
    assert len(entries) == 64
    assert len({entry["images"] for entry in entries}) == 2
    mine = write(tmp_path / "mine.csv", [{"file": entry["file"], "mine": score_of(entry)} for entry in entries])
    rows = [{**entry, "other": 2.0, "third": -score_of(entry)} for entry in reversed(entries)]
    two = write(tmp_path / "two.jsonl", rows)
    monkeypatch.setattr(measuring, "generate", lambda *_: pytest.fail("a finished sampler was measured again"))
    after = run(scores=[mine, two])

    for old, new in zip(before.ladder.rows, after.ladder.rows, strict=True):
        assert {name: new[name] for name in old} == old
    one, other = after.ladder.rows
    expected = [math.sin(7 * i) for i in range(32)]
    assert one["mine"] == pytest.approx(sum(expected) / 32, abs=1e-12)
    assert other["mine"] - one["mine"] == pytest.approx(1)
    assert (one["other"], one["third"]) == pytest.approx((2.0, -one["mine"]))
    own, gap = after.comparison.figures[NAMES[1]]["mine"], after.comparison.differences[NAMES[1]]["mine"]
    spread = 1.96 * float(torch.tensor(expected).std()) / math.sqrt(32)
    assert (own.high - own.low) / 2 == pytest.approx(spread, rel=0.25)
    assert (gap.low, gap.high) == pytest.approx((1, 1))  # paired: the prompts' own differences drop out

    settings = json.loads((tmp_path / "out/metrics.json").read_text())["settings"]
    assert settings["metrics"] == ["colour", "mine", "other", "third"]
    assert [entry["columns"] for entry in settings["scores"]] == [["mine"], ["other", "third"]]
    with (tmp_path / "out/scores.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[40]["mine"]) == pytest.approx(score_of({"prompt_index": 8, "model": NAMES[1]}))
    page = (tmp_path / "out/report.html").read_text()
    assert "mine" in page
    assert f"--scores {mine} {two}" in page
    mine.write_text(mine.read_text() + "\n")
    changed = run(scores=[mine])
    assert changed.ladder.settings["scores"][0]["hash"] != settings["scores"][0]["hash"]
    assert "mine" not in run().ladder.rows[0]


def test_scores_of_other_images_are_refused_before_any_image(tmp_path, monkeypatch):
    def run(**more):
        return evaluate(MODEL, SHAPES, tmp_path / "out", resamples=20, save_images=True, **more)

    run()
    entries = manifest(tmp_path / "out/images")
    file = write(tmp_path / "a.jsonl", [{**entry, "mine": 1.0} for entry in entries])
    run(scores=[file])
    monkeypatch.setattr(measuring, "generate", lambda *_: pytest.fail("an image was made"))
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: the scores are of other images of 't 1 step'"):
        run(scores=[file], dtype="bfloat16")


def full(**more) -> list[dict]:
    """Rows for all images of `FEW`."""
    return [{"model": name, "prompt_index": i, "mine": 0.5, **more} for name in NAMES for i in range(3)]


def changed(row: int, **changes) -> list[dict]:
    rows = full()
    rows[row] |= changes
    return rows


IMAGE = f"{file_name(NAMES[0])}/000001.png"
MISTAKES = {
    "another sampler": (
        changed(1, model="u 1 step"),
        r"line 2: there is no sampler 'u 1 step', but 't 1 step', 't 2 steps'",
    ),
    "a prompt too many": (changed(1, prompt_index=3), "line 2: there is no prompt 3, but only 3 prompts"),
    "a missing prompt": (full()[:-1], "mine has no score of 't 2 steps' for prompt 2"),
    "a missing sampler": (full()[:3], "mine has no score of 't 2 steps' for prompt 0"),
    "a row twice": ([*full(), full()[4]], r"line 7: mine has a score of 't 2 steps' for prompt 1 already"),
    "NaN": (changed(2, mine=math.nan), "line 3: mine is 'nan', but must be a finite number"),
    "infinity": (changed(2, mine=-math.inf), "line 3: mine is '-inf'"),
    "huge": (changed(2, mine=1e31), "line 3: mine is '1e[+]31'"),
    "no number": (changed(2, mine="good"), "line 3: mine is 'good'"),
    "true": (changed(2, mine=True), "line 3: mine is 'True'"),
    "a list": (changed(2, mine=[1]), r"line 3: mine is '\[1\]'"),
    "a gap": (changed(2, mine=None), "line 3: mine is 'None'"),
    "no image": ([{"mine": 1.0}], "line 1: it needs file, or model and prompt_index"),
    "no prompt": ([{"model": NAMES[0], "mine": 1.0}], "line 1: it needs file, or model and prompt_index"),
    "a wrong index": (changed(0, prompt_index=-1), "line 1: prompt_index is '-1'"),
    "half an index": (changed(0, prompt_index=0.5), "line 1: prompt_index is '0.5'"),
    "another prompt": (changed(0, prompt="a cat"), "line 1: the score is for 'a cat', but prompt 0 is "),
    "another seed": (changed(0, seed=1), "line 1: seed is '1', but this evaluation has --seed 0"),
    "another file": (changed(0, file=IMAGE), "line 1: file is of another image than model and prompt_index"),
    "an unknown file": (
        [{"file": "x/000001.png", "mine": 1}],
        "line 1: the file 'x/000001.png' is in no manifest.jsonl",
    ),
    "no scores": (
        [{"model": NAMES[0], "prompt_index": 0}],
        "line 1: there is no column with scores beside file, model",
    ),
    "a metric's name": (full(colour=1), "line 1: the column 'colour' has the name of a figure of this evaluation"),
    "a figure's name": (full(colour_contrast=1), "line 1: the column 'colour_contrast' has the name of a figure"),
    "a column of the results": (full(network_calls=1), "line 1: the column 'network_calls' has the name of a figure"),
    "a formula": (full(**{"=1+1": 1}), "line 1: the column '=1[+]1' must have a name of"),
    "an escape": (full(**{"\x1b[2J": 1}), r"line 1: the column '\\x1b\[2J' must have a name of"),
    "other columns": (changed(3, more=1), "line 4: it must have the columns of the rows before it, unlike 'more'"),
    "many columns": (full(**{f"a{i}": 1 for i in range(64)}), "line 1: there are more than 64 columns"),
    "nothing": ([], "has no rows"),
    "two marks": ([*changed(0, images="a")[:1], *full(images="b")[1:3]], "line 2: images differs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_file_and_line(mistake, tmp_path):
    rows, expected = MISTAKES[mistake]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=f"a\\.jsonl.*{expected}") as refused:
        read_scores([file], FEW, ["colour"])
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.csv",
            b"model,prompt_index,mine\nt 1 step,0\n",
            "line 2: it has 2 cells, but the first line names 3 columns",
        ),
        ("a.csv", b"file,mine,mine\n", "line 1: the column 'mine' is there twice"),
        ("a.csv", b'file,mine\n"a\n', "line 2: it is not CSV"),
        ("a.csv", b"file,mine\n" + b"x" * 200_000, "line 2: it is not CSV"),
        ("a.csv", b"file,mine\n\n\xff,1\n", "line 3: it is not UTF-8"),
        ("a.csv", b"", "has no rows"),
        ("a.jsonl", b"\n{\n", "line 2: it is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: it is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: it must be an object"),
        ("a.txt", b"", r"must be a \.csv or \.jsonl file"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as refused:
        read_scores([tmp_path / name], FEW, [])
    assert "\n" not in str(refused.value)


def test_files_that_are_missing_or_too_large_or_no_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        read_scores([tmp_path / "a.csv"], FEW, [])
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_scores([tmp_path / "b.csv"], FEW, [])
    monkeypatch.setattr(given_scores, "MOST_BYTES", 10)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read .*pass a file of at most 256 MB"):
        read_scores([write(tmp_path / "a.jsonl", full())], FEW, [])


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_column_may_be_spread_over_files_and_a_file_may_name_images_in_any_way(ending, tmp_path):
    rows = full()
    by_name = [{"file": f"/elsewhere/{file_name(row['model'])}/{row['prompt_index']:06d}.png"} for row in rows]
    for number, row in enumerate(by_name):
        row["mine"] = number / 10
    files = [write(tmp_path / f"{name}{ending}", part) for name, part in (("a", by_name[:4]), ("b", by_name[4:]))]
    found = read_scores(files, FEW, [])
    assert found.values == {"mine": {NAMES[0]: [0.0, 0.1, 0.2], NAMES[1]: [0.3, 0.4, 0.5]}}
    with pytest.raises(UserError, match=r"line \d: mine has a score of 't 1 step' for prompt 0 already"):
        read_scores([files[0], *files], FEW, [])


def test_a_csv_of_a_spreadsheet_is_read(tmp_path):
    odd = "a “cat”, and\na\u2028dog"
    images = Images(["t"], ["", odd], seed=3)
    text = f'\ufeffmodel, prompt_index,prompt,seed,mine\r\nt,0,,3,1.5\r\n\r\nt,1,"{odd}",3,-2e-3\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert read_scores([tmp_path / "a.csv"], images, []).values == {"mine": {"t": [1.5, -0.002]}}


def test_the_command_refuses_before_any_work(tmp_path, capsys, monkeypatch):
    from cdm_lightning.evaluate import main

    monkeypatch.setattr(protocol.Evaluation, "run", lambda *_: pytest.fail("it was evaluated"))
    file = write(tmp_path / "a.jsonl", changed(1, model="u"))
    words = ["--model", *MODEL[0], "--prompts", "shapes_heldout", "--count", "3", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--scores", str(file)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {file}, line 2: there is no sampler 'u'")
    assert not (tmp_path / "out").exists()
    assert parser().parse_args([*words, "--scores", "a.csv", "b.csv", "--scores", "c.csv"]).scores == [
        "a.csv",
        "b.csv",
        "c.csv",
    ]


def test_scores_are_independent_of_the_order_of_the_images() -> None:
    from cdm_lightning.metrics.suite import Collected, MetricSuite

    found = given_scores.GivenScores({"mine": {"a": [0.0, 1.0, 2.0]}})
    collected = Collected(["x", "y", "z"], [2, 0, 1])
    suite = found.join(MetricSuite(), {"a": collected})
    assert collected.scores["mine"][0].tolist() == [2.0, 0.0, 1.0]
    assert collected.of("mine").scores.tolist() == [0.0, 1.0, 2.0]
    assert suite.figures({"a": collected}) == {"a": {"mine": 1.0}}
