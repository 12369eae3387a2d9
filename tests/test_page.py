"""report.html: its figures, its size, what it does with hostile texts, and what a reader without eyes or scripts gets."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cdm_lightning.evaluation import page_images
from cdm_lightning.evaluation.intervals import Comparison, Interval
from cdm_lightning.evaluation.ladder import LadderResult
from cdm_lightning.evaluation.measuring import SamplerResult, _Share, joined
from cdm_lightning.evaluation.page import MOST_BYTES, PAGE, Page, Setting, render, save_page
from cdm_lightning.evaluation.plots import HEIGHT, WIDTH, Line, Point, number, plot, round_numbers, sparse
from cdm_lightning.evaluation.store import load_measured, save_measured
from cdm_lightning.evaluation.thumbnails import SIDE, fit, opened, thumbnail
from cdm_lightning.metrics.suite import Collected
from cdm_lightning.run.model_words import command_words
from cdm_lightning.run.page import curves_of

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></script><!-- {{ 7 * 7 }} {% raw %}",
    "\u202eevil\u2066 right to left \u200f",
    "a\x1b[31m & b\x00",
    "x" * 3000,
]
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Read(HTMLParser):
    """The elements of a page with their attributes, in their order, and the texts of the headings and cells."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def sampler(prompts: list[str], size: int = 16, seed: int = 0, few: int = 64) -> SamplerResult:
    images = torch.rand(min(few, len(prompts)), 3, size, size, generator=torch.Generator().manual_seed(seed))
    collected = Collected(prompts, list(range(len(prompts))))
    return SamplerResult(images[:2], collected, 1.0, {}, [thumbnail(image) for image in images])


def example(prompts: list[str], names: tuple[str, ...] = ("a", "b"), size: int = 16) -> Page:
    """A page of two models: each at 1 and 4 steps, with and without guidance."""
    rows, settings, measured = [], {}, {}
    for model in names:
        for steps in (1, 4):
            for guidance in (1.0, 2.0):
                name = f"{model} {steps} steps, guidance {guidance}"
                settings[name] = Setting(model, steps, guidance)
                rows.append({"sampler": name, "fid": 1 / steps + guidance, "network_calls": steps * int(guidance)})
                measured[name] = sampler(prompts, size, len(measured))
    rows.append({"sampler": "real images", "fid": 0.25, "network_calls": 0})
    measured["real images"] = sampler(prompts, size, 99)
    intervals = {row["sampler"]: {"fid": Interval(row["fid"], row["fid"] - 0.1, row["fid"] + 0.2)} for row in rows}
    gaps = {rows[1]["sampler"]: {"fid": Interval(1.0, 0.5, 1.5)}, rows[2]["sampler"]: {"fid": Interval(-0.75, -1, 0.5)}}
    ladder = LadderResult(rows, [], {}, prompts[:2], {"count": len(prompts)}, measured)
    return Page(
        "a and b", ladder, settings, Comparison(intervals, gaps, []), rows[0]["sampler"], "run me", curves=CURVES
    )


CURVES = {"student/loss": [(float(i), 1 / (i + 1)) for i in range(1000)]}
PROMPTS = ["a red ring", "a blue cross", "a green circle"]


@pytest.fixture(scope="module")
def read() -> Read:
    return Read(render(example(PROMPTS)))


# ---- the content


def test_the_figures_of_the_rows_their_intervals_and_differences_are_in_tables(read):
    cells = [text for tag, text in read.texts if tag in ("td", "small")]
    assert {"2.000", "1.9 to 2.2", "1.250", "1.15 to 1.45", "0.250", "+1", "0.5 to 1.5", "-0.75", "-1 to 0.5"} <= set(
        cells
    )
    assert [text for tag, text in read.texts if tag == "td" and text == "+1"]
    clear = [attributes for attributes in read.all("td") if attributes.get("class") == "clear"]
    assert len(clear) == 1  # the other interval contains 0
    assert all(attributes.get("scope") in ("col", "row") for attributes in read.all("th"))
    assert len(read.all("caption")) == len(read.all("table")) == 2


def test_ladder_guidance_and_training_are_plotted(read):
    drawn = [attributes["aria-label"] for attributes in read.all("svg") if attributes.get("role") == "img"]
    assert [label.partition(";")[0] for label in drawn] == [
        "fid over network calls for an image",
        "fid over guidance scale",
        "student/loss over iteration",
    ]
    points = [text for tag, text in read.texts if tag == "title"][1:]
    assert points.count("a 4 steps, guidance 2.0: fid 2.250 (2.15 to 2.45)") == 2  # on the ladder, and over guidance
    assert "real images: fid 0.250 (0.15 to 0.45)" in points


def test_images_say_prompt_and_sampler_and_come_from_the_measurements(read):
    images = [attributes for attributes in read.all("img") if attributes.get("src")]
    assert len(images) == 3 * 9
    assert images[0]["alt"] == "a red ring - a 1 steps, guidance 1.0"
    content = base64.b64decode(images[0]["src"].partition(",")[2])
    assert content == sampler(PROMPTS).thumbnails[0]
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (16, 16)


def test_headings_are_in_order_and_ids_are_unique(read):
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {attributes["href"][1:] for attributes in read.all("a")} | {
        a["for"] for a in read.all("label") if "for" in a
    }
    named |= {attributes["aria-labelledby"] for _, attributes in read.elements if "aria-labelledby" in attributes}
    assert named <= set(ids)
    assert len(read.all("main")) == len(read.all("header")) == len(read.all("nav")) == len(read.all("footer")) == 1
    assert read.open == []


def test_a_page_without_intervals_guidance_and_curves_has_no_empty_sections():
    page = example(PROMPTS)
    rows = [row for row in page.ladder.rows if "guidance 1" in row["sampler"]]
    ladder = LadderResult(rows, [], {}, PROMPTS, {"count": 3}, {})
    read = Read(render(Page("x", ladder, page.settings)))
    assert [text for tag, text in read.texts if tag == "h2"] == [
        "Figures",
        "Figures over network calls",
        "What was run",
    ]
    assert not [text for tag, text in read.texts if "95 %" in text]


def test_figures_that_are_missing_or_not_finite_are_shown_and_not_drawn():
    page = example(PROMPTS)
    page.ladder.rows[0]["fid"] = float("nan")
    del page.ladder.rows[1]["fid"]
    read = Read(render(page))
    assert {"nan", "-"} <= {text for tag, text in read.texts if tag == "td"}
    assert "nan" not in " ".join(attributes.get("d", "") for attributes in read.all("path")).lower()


# ---- strangers' texts, and the network


def test_hostile_texts_stay_texts_and_no_address_leaves_the_file():
    page = example(HOSTILE, (HOSTILE[0], HOSTILE[1], "\u202eabc"))
    text = render(
        Page(HOSTILE[2], page.ladder, page.settings, page.comparison, HOSTILE[1], HOSTILE[0], [(HOSTILE[0], HOSTILE[1])],
             HOSTILE, {HOSTILE[0]: [(0.0, 1.0), (1.0, 2.0)]}, "\n".join(HOSTILE))
    )  # fmt: skip
    read = Read(text)
    assert len(read.all("script")) == len(read.all("style")) == 1
    assert not [
        name for _, attributes in read.elements for name in attributes if name.startswith("on") or name == "style"
    ]
    addresses = [
        value for _, attributes in read.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(value.startswith(("data:image/", "#")) or not value for value in addresses)
    assert "://" not in text
    assert not set(text) & set("\u202e\u2066\u200f\x1b\x00")
    assert "{{ 7 * 7 }}" in text  # as it was given, and no template
    assert "x" * 501 not in re.sub(r"<pre.*?</pre>|<ul>.*?</ul>", "", text, flags=re.DOTALL)


def test_the_policy_names_exactly_the_style_and_the_script():
    text = render(example(PROMPTS))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}" in policy
        assert not re.search(r"url\(|@import|import\(|fetch|http", content)


# ---- size


def test_noise_of_64_prompts_and_many_samplers_fits():
    """Noise is the hardest to compress: 64 prompts x 13 samplers of more than the kept size would take 80 MB."""
    prompts = [f"prompt {i} " + "word " * 80 for i in range(64)]
    page, big = example(prompts, tuple("abc")), sampler(prompts[:1], SIDE + 44)
    for result in page.ladder.measured.values():
        result.thumbnails[:] = big.thumbnails * 64
    text = render(page)
    assert len(text.encode()) <= MOST_BYTES < 5_000_000
    read = Read(text)
    images = [attributes for attributes in read.all("img") if attributes.get("src")]
    assert len(images) == 64 * 13
    assert "To keep this file small, they are reduced" in text
    side = max(opened(base64.b64decode(images[0]["src"].partition(",")[2])).size)
    assert f"at most {side} pixels" in text


def test_fewer_prompts_are_shown_if_nothing_else_helps(monkeypatch):
    monkeypatch.setattr(page_images, "MOST_IMAGES", 20)
    read = Read(render(example(PROMPTS)))
    assert len([attributes for attributes in read.all("img") if attributes.get("src")]) == 2 * 9  # of 9 samplers


def test_images_are_reduced_no_further_than_needed():
    contents = [thumbnail(torch.rand(3, 128, 128)) for _ in range(4)]
    whole = fit(contents, 10**6)
    assert whole.side is None
    assert [base64.b64decode(one.partition(",")[2]) for one in whole.addresses] == contents
    size = sum(map(len, whole.addresses))
    less = fit(contents, size // 2)
    assert size // 8 < sum(map(len, less.addresses)) <= size // 2
    assert fit(contents, 100) is None
    assert max(opened(thumbnail(torch.rand(3, 300, 600))).size) == SIDE
    exact = torch.randint(256, (3, 32, 32)) / 255
    pixels = torch.frombuffer(bytearray(opened(thumbnail(exact)).convert("RGB").tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.reshape(32, 32, 3).permute(2, 0, 1), (exact * 255).round().byte())


# ---- the kept images


def test_small_images_are_stored_and_older_measurements_stay_usable(tmp_path):
    result = sampler(PROMPTS)
    save_measured(tmp_path / "m", result, "key")
    assert load_measured(tmp_path / "m", "key", PROMPTS).thumbnails == result.thumbnails
    result.thumbnails.clear()
    save_measured(tmp_path / "old", result, "key")
    old = load_measured(tmp_path / "old", "key", PROMPTS)
    assert old.thumbnails == []
    ladder = LadderResult([{"sampler": "a"}], [], {}, PROMPTS, {}, {"a": old})
    (cards, *_) = page_images.choose(ladder, ["a"])
    assert [card.prompt for card in cards] == PROMPTS[:2]  # the shown ones


@pytest.mark.parametrize("damage", ["sizes", "content", "huge"])
def test_damaged_small_images_are_made_again(damage, tmp_path):
    save_measured(tmp_path / "m", sampler(PROMPTS), "key")
    tensors = load_file(tmp_path / "m")
    if damage == "sizes":
        tensors["thumbnail_sizes"][0] += 1
    elif damage == "content":
        tensors["thumbnails"][:64] = 0
    else:
        huge = io.BytesIO()
        Image.new("RGB", (SIDE + 1, 2)).save(huge, format="PNG")
        tensors["thumbnails"] = torch.frombuffer(bytearray(huge.getvalue()), dtype=torch.uint8)
        tensors["thumbnail_sizes"] = torch.tensor([len(huge.getvalue())])
    header = {"key": "key", "seconds": "1.0", "has_noise": "true", "counts": "{}"}
    save_file(tensors, tmp_path / "m", metadata=header)
    assert load_measured(tmp_path / "m", "key", PROMPTS) is None


def test_several_processes_keep_the_images_in_the_order_of_the_prompts():
    shares = [_Share(thumbnails=[[b"0", b"1"], [b"4"]]), _Share(thumbnails=[[b"2", b"3"]])]
    assert joined(shares, torch.rand(0, 3, 2, 2), 2).thumbnails == [b"0", b"1", b"2", b"3", b"4"]


def test_a_page_replaces_an_earlier_one(tmp_path):
    (tmp_path / PAGE).write_text("old")
    page = example(PROMPTS)
    assert save_page(page, tmp_path).read_text() == render(page)
    assert [path.name for path in tmp_path.iterdir()] == [PAGE]


# ---- plots


def test_points_lie_where_their_numbers_say():
    line = Line("a", 0, [Point(4, 3, "", 2, 4), Point(1, 1, ""), Point(2, float("nan"), "")])
    drawn = plot("t", "x", [line], is_log=True)
    first, last = drawn.lines[0].points
    assert first.x < last.x
    assert first.y > last.y  # upwards
    assert (last.high, last.low) == pytest.approx((2 * last.y - last.low, 2 * last.y - last.high), abs=0.2)
    marks = {label.text: label.place for label in drawn.beside}
    assert marks["1"] == first.y
    assert marks["3"] == last.y
    assert all(0 <= p.x <= WIDTH and 0 <= p.y <= HEIGHT for p in drawn.lines[0].points)
    assert [label.text for label in drawn.below] == ["1", "4"]
    assert plot("t", "x", [Line("a", 0, [Point(1, float("inf"), "")])]) is None


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.951, 1.0), (0, 0), (5, 5), (-3e-7, 2e-7), (1e6, 3e9), (0.1, 0.1000001), (0, 5e-324), (-1e99, 1e99)],
)
def test_round_numbers_span_the_values(low, high):
    found = round_numbers(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    assert len({number(value) for value in found}) == len(found) or high - low < 1e-5 * abs(high)
    assert [float(number(value)) for value in found] == pytest.approx(found, rel=1e-5)


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(float(i), float(i)) for i in range(1001)]
    found = sparse(points, 200)
    assert len(found) == 200
    assert (found[0], found[-1]) == (points[0], points[-1])


def test_curves_come_from_the_newest_log(tmp_path):
    for version, value in ((0, 1.0), (1, 2.0)):
        folder = tmp_path / f"logs/version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(
            f"step,val/x,student/loss,same\n1,,{value},3\n2,5,nan,3\n3,6,{value + 1},3\n"
        )
    assert curves_of(tmp_path) == {"student/loss": [(1.0, 2.0), (3.0, 3.0)], "val/x": [(2.0, 5.0), (3.0, 6.0)]}
    (tmp_path / "logs/version_1/metrics.csv").write_text("step,a\n1," + "x" * 200_000 + "\n")
    assert curves_of(tmp_path) == curves_of(tmp_path / "logs/nothing") == {}


# ---- the command


def test_the_command_has_the_words_of_the_call():
    given = {"models": [["m", "steps=1,2"], "n"], "prompts": "p.txt", "output": Path("out"), "metrics": ("colour",)}
    given |= {
        "options": ["metric.colour.sampler=a b"],
        "count": 5,
        "baseline": None,
        "save_images": True,
        "batch_size": 2,
    }
    words = command_words(given)
    assert words[:3] == ["python", "-m", "cdm_lightning.evaluate"]
    assert " ".join(words[3:]) == (
        "--prompts p.txt --output out --metric colour --set metric.colour.sampler=a b --count 5 --save-images "
        "--batch-size 2 --model m steps=1,2 --model n"
    )
    from cdm_lightning.evaluate import parser

    read = parser().parse_args(words[3:])
    assert (read.model, read.count, read.save_images) == ([["m", "steps=1,2"], ["n"]], 5, True)
    assert command_words(given | {"prompts": ["a", "b"]}) == []


# ---- a browser, where there is one

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_runs_the_script_without_errors(tmp_path):
    """The script marks the page and hides all but the chosen samplers' images; the console stays empty."""
    save_page(example(PROMPTS), tmp_path)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--v=0", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *options, f"file://{tmp_path / PAGE}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    read = Read(done.stdout)
    assert "js" in read.all("html")[0]["class"]
    shots = [attributes for attributes in read.all("figure") if "shot" in attributes.get("class", "").split()]
    assert len(shots) == 3 * 9
    hidden = [json.loads(shot["data-sampler"]) for shot in shots if "hidden" in shot]
    assert set(hidden) == {0, 1, 4, 5}  # 1 step: the slider starts at 4 steps, and real images stay
