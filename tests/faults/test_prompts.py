"""Faults of prompt files: texts that nobody can read, formats that are taken for lines, files that change under the run."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from cdm_lightning.data.dataset import PromptDataset
from cdm_lightning.data.images import CaptionedFolder
from cdm_lightning.data.lines import LineFiles
from cdm_lightning.data.prompts import PromptFile, PromptList
from cdm_lightning.errors import UserError
from cdm_lightning.sample import check_prompts


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path, **options):
    file = PromptFile(path, cache_folder=path.parent / "cache", **options)
    return [file[i] for i in range(len(file))]


HALVES = [r"a face \ud83d", r"\udc00", r"in the middle \ud800 of it", r"\udfff\ud800 turned round"]


@pytest.mark.parametrize("half", HALVES)
def test_half_a_character_is_found_at_the_scan_with_its_line(tmp_path, half):
    lines = write(tmp_path, "a.jsonl", f'{{"prompt": "fine"}}\n\n{{"prompt": "{half}"}}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 3: the prompt contains half a character \(\\u\w{4}\)"):
        PromptFile(lines)
    listed = write(tmp_path, "a.json", f'["fine", "{half}"]')
    with pytest.raises(UserError, match=r"a.json, entry 2: the prompt contains half a character"):
        PromptFile(listed, cache_folder=tmp_path / "cache")
    with pytest.raises(UserError, match="prompt 2 in the list of prompts: the prompt contains half a character"):
        PromptList(["fine", json.loads(f'"{half}"')])
    write(tmp_path, "metadata.jsonl", f'{{"file_name": "a.json", "text": "{half}"}}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: the prompt contains half a character"):
        CaptionedFolder(tmp_path, (32, 32))


def test_a_whole_character_written_as_two_halves_is_a_prompt(tmp_path):
    assert texts(write(tmp_path, "a.jsonl", '{"prompt": "a face \\ud83d\\ude00"}\n')) == ["a face 😀"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_every_line_end_of_a_text_file_ends_a_prompt(tmp_path, end):
    path = write(tmp_path, "a.txt", end.join(["größe", "二", "", "three"]) + end)
    file = PromptFile(path)
    assert [file[i] for i in range(len(file))] == ["größe", "二", "three"]
    assert file.source.place(int(file.positions[2])).endswith("a.txt, line 4")


def test_line_ends_of_json_objects_are_those_that_no_json_text_can_hold(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "one\u2028and\x85a half"}\r{"prompt": "two"}\r\n{"prompt": "three"}')
    assert texts(path) == ["one\u2028and\x85a half", "two", "three"]


def test_a_line_without_end_is_refused_without_reading_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("cdm_lightning.data.lines.LONGEST_LINE", 1000)
    with pytest.raises(UserError, match=r"a.txt, line 2: the line has over 1,000 characters"):
        PromptFile(write(tmp_path, "a.txt", "fine\n" + "x" * 1000))


@pytest.mark.parametrize(
    "content",
    ["one\ntwo\n".encode("utf-16-le"), "one\ntwo\n".encode("utf-32-be"), b"a\0b\n", b"fine\n\0\0\0\0x\n"],
    ids=["utf16", "utf32", "one", "hole"],
)
def test_nul_characters_are_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"line \d: the prompt contains a NUL character; if the file is UTF-16"):
        PromptFile(write(tmp_path, "a.txt", content))
    with pytest.raises(UserError, match="line 1: the prompt contains a NUL"):
        PromptFile(write(tmp_path, "a.jsonl", '{"prompt": "a\\u0000b"}'))


BLANKS = [
    "\u200b",
    "\u2060 \u200d",
    "\ufeff\ufeff",
    "\u00ad",
    "\u3000",
    "\u3164",
    "\u2800",
    "\u200e\u202a",
    "\x07\x1b",
    "\u0301",
]


def test_prompts_of_nothing_visible_do_not_count(tmp_path):
    file = PromptFile(write(tmp_path, "a.txt", "\n".join(["one", *BLANKS, "a\u200bb", "\u0301e", "👩\u200d🚀"])))
    assert [file[i] for i in range(len(file))] == ["one", "a\u200bb", "\u0301e", "👩\u200d🚀"]
    assert file.counts.blank == len(BLANKS)


@pytest.mark.parametrize("blank", BLANKS)
def test_a_given_prompt_of_nothing_visible_is_refused(blank):
    """In a list or on the command line it is no line that can be left out; the empty prompt has a meaning."""
    with pytest.raises(UserError, match=r"prompt 2 .*: the prompt has no visible character"):
        PromptList(["a cat", blank])
    with pytest.raises(UserError, match="prompt 1: the prompt has no visible character"):
        check_prompts([blank])
    check_prompts(["", "a"])
    assert len(PromptList(["", "a"])) == 2


def test_known_formats_are_read_as_what_they_are(tmp_path):
    wanted = ["a cat, a dog", 'two\nlines and "marks"', "grün"]
    head, rows = "id,prompt,NA\n", '1,"a cat, a dog",x\n2,"two\nlines and ""marks""",NA\n3,grün,\n'
    assert texts(write(tmp_path, "a.csv", head + rows)) == wanted
    assert texts(write(tmp_path, "a.CSV", head + rows)) == wanted
    assert texts(write(tmp_path, "a.tsv", 'prompt\tn\n"a cat, a dog"\t1\ngrün\t2\n')) == [wanted[0], wanted[2]]
    assert texts(write(tmp_path, "a.json", json.dumps(wanted))) == wanted
    objects = [{"caption": text, "n": 1} for text in wanted]
    assert texts(write(tmp_path, "b.json", json.dumps(objects, indent=1)), field="caption") == wanted
    lines = "\n".join(map(json.dumps, objects))
    for name in ("c.json", "c.jsonl", "c.ndjson", "c.JSONL"):
        assert texts(write(tmp_path, name, lines), field="caption") == wanted
    pyarrow.parquet.write_table(pyarrow.table({"prompt": wanted}), tmp_path / "a.PARQUET")
    assert texts(tmp_path / "a.PARQUET") == wanted
    folder = tmp_path / "tables"
    folder.mkdir()
    write(folder, "a.csv", head + rows)
    assert len(PromptFile(folder, cache_folder=tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,n\nx,1\n", "no column 'prompt'; set field to one of its columns: text, n"),
        ("a.csv", b"prompt\ngr\xfcn\n", "cannot be read as a table"),
        ("a.json", '{"prompt": ["a"]}', 'not a JSON object with a string under "prompt"'),
        ("a.json", "[1]", "entry 1: the entry must be a string, or an object"),
        ("a.json", '["cut', "cannot be read as JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not a JSON object"),
        ("a.txt", '{"prompt": "a cat"}\n', "has a JSON object on each line; rename it to"),
        ("a.txt", '["north", "east"]\n', "is a JSON list; rename it to *.json"),
        ("a.txt", '[\n  "north",\n  "east"', "begins as JSON does"),
        ("a.txt", '{\n "prompts": ["north"]\n}\n', "is a JSON object"),
        ("a.txt", "{\\rtf1\\ansi a cat}\n", "is RTF; save it as plain text"),
        ("a.txt", "<!DOCTYPE html>\n<p>a cat\n", "is HTML or XML"),
        ("a.txt", "<ul class='x'>\n<li>a cat</li></ul>\n", "is HTML or XML"),
        ("a.txt", "%PDF-1.4\n", "is PDF"),
        ("a", "---\nprompts:\n- a cat\n", "is YAML"),
        ("a.txt", "id,prompt\n1,a cat\n2,a dog, big\n", "is a table with the columns id, prompt; rename it to *.csv"),
        ("a.txt", "1\ta cat\n2\ta dog\n", "rename it to *.tsv"),
        ("a.txt", '"prompt"\na cat\n', "is a table with the column"),
        ("a.csv", 'prompt\na cat\n"a dog\na bird\n', "line 3: a quotation mark is not closed"),
        ("a.csv", 'n,prompt\n1,"a dog\n2,"a bird"\n', "line 2: a quotation mark is not closed, or text follows it"),
        ("a.tsv", 'prompt\tn\n"a dog\t1\n', "line 2: a quotation mark is not closed"),
        ("a.csv", "prompt,prompt\na,b\n", "several columns have the name 'prompt'"),
        ("a.yaml", "- a cat\n", ".yaml files cannot be read as prompts"),
        ("a.html", "<p>a cat", ".html files cannot be read as prompts"),
        ("a.txt.gz", b"\x1f\x8b", ".gz files cannot be read as prompts"),
        ("a.xlsx", b"PK", ".xlsx files cannot be read as prompts"),
    ],
)
def test_other_contents_are_refused_in_one_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        PromptFile(path, cache_folder=tmp_path / "cache")
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "[a cat] in the rain\n[a dog]\n",
        '["STOP"] on a sign\n',
        "{a|b} cat\n",
        "<cat-toy> on a beach\n",
        "<3\na cat\n",
        "portrait, oil painting, text\nlandscape, photo, night\n",
        "1girl,solo\ncat,dog\n",
        "- a cat\n- a dog\n",
        'a sign, "text"\n"STOP", red\n',
        "text\nname\n",
    ],
)
def test_prompts_that_look_like_another_format_are_read(tmp_path, content):
    assert texts(write(tmp_path, "a.txt", content)) == content.splitlines()


def test_a_repeated_column_of_parquet(tmp_path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns have the name 'prompt'; rename all but one"):
        PromptFile(tmp_path / "a.parquet", cache_folder=tmp_path / "cache")


def test_pipes_and_devices_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(UserError, match="it is not a regular file"):
            PromptFile(path)


def test_overlong_prompts_need_no_place_in_the_file(tmp_path, monkeypatch):
    """Each place reads the file from its start, so places for all over-long prompts took quadratic time."""
    places = []
    monkeypatch.setattr(LineFiles, "place", lambda self, position: places.append(position) or "here")
    file = PromptFile(write(tmp_path, "a.txt", "short\n" + ("x" * 20 + "\n") * 500), max_characters=10)
    assert file.counts.overlong == 500
    assert places == []
    with pytest.raises(UserError, match=r"^here: the prompt has 20 characters"):
        PromptFile(tmp_path / "a.txt", max_characters=10, overlong="refuse")
    assert len(places) == 1


def emptied(path):
    path.write_bytes(b"")


def shifted(path):
    path.write_bytes(b"x" + path.read_bytes())


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def exchanged(path):
    """The same size, another content, by a rename as editors and `rsync` do it."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[::-1])
    os.replace(other, path)


@pytest.mark.parametrize("change", [emptied, shifted, cut, exchanged, os.remove])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_changes_under_the_run_is_noticed(tmp_path, name, change):
    line = "prompt number {}\n" if name == "a.txt" else '{{"prompt": "prompt number {}"}}\n'
    path = write(tmp_path, name, "".join(line.format(i) for i in range(9)))
    file = PromptFile(path)
    assert file[8] == "prompt number 8"
    os.utime(path, ns=(0, 0))  # the clock of a file system may be coarse
    file = PromptFile(path)
    change(path)
    with pytest.raises(UserError) as error:
        file[4]
    assert str(path) in str(error.value)


def test_a_file_that_grows_while_it_is_scanned_is_refused(tmp_path):
    path = write(tmp_path, "a.txt", "one\ntwo\n")
    scan = LineFiles([path]).scan()
    assert next(scan)[1] == "one"
    with path.open("a") as file:
        file.write("three\n")
    with pytest.raises(UserError, match="has changed"):
        list(scan)


def test_a_cut_copy_of_a_table_is_noticed(tmp_path):
    path = write(tmp_path, "a.csv", "prompt\n" + "".join(f"prompt {i}\n" for i in range(2000)))
    file = PromptFile(path, cache_folder=tmp_path / "cache")
    assert file[1999] == "prompt 1999"
    cut(file.source.path)
    with pytest.raises(UserError, match="has changed"):
        file[5]


def test_data_sets_hold_no_prompt_that_cannot_be_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["one", "\u200b", "a\0b"]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="row 3: the prompt contains a NUL"):
        PromptDataset(tmp_path / "set")
