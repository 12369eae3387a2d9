"""Check the content of prompt files before the prompts are read.

A file that is to be read as one prompt on each line must not have the content of another format, such as JSON or CSV.
In a table, each quoted cell must end with a quotation mark.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

from cdm_lightning.data.lines import BYTE_ORDER_MARK, LONGEST_LINE, opened
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

DELIMITERS = {
    "\t": "rename it to *.tsv",
    ",": "rename it to *.csv",
    ";": "separate its columns by commas and rename it to *.csv",
    "|": "separate its columns by commas and rename it to *.csv",
}
HEAD = 1 << 16  # characters at the start of a file by which its content is recognised
CHECKED_LINES = 20
TO_TEXT = "save it as plain text with one prompt on each line"
TO_LIST = f"rename it to *.json if it is a list of prompts, or {TO_TEXT}"
MARKS = {  # the first characters of other formats
    "{\\rtf": "RTF",
    "%PDF-": "PDF",
    "%!PS": "PostScript",
    "%YAML": "YAML",
    "\\documentclass": "LaTeX",
    "WEBVTT": "WebVTT",
    "PK\x03\x04": "a ZIP archive",
    "PAR1": "parquet",
    "ARROW1": "Arrow",
    "SQLite format 3": "SQLite",
}
TEXT_IN_JSON = r'"(?:[^"\\]|\\.)*"'
JSON_START = re.compile(  # of a JSON value that is longer than the head of the file, or damaged
    rf"\[\s*(?:{TEXT_IN_JSON}\s*,\s*[\"\[{{]|\{{\s*{TEXT_IN_JSON}\s*:|\[\s*\")|\{{\s*{TEXT_IN_JSON}\s*:"
)
MARKUP_START = re.compile(r"<(?:!doctype\b|!--|\?xml\b|([a-z][\w:.-]*)[^<>]*/?>)", re.IGNORECASE)
YAML_START = re.compile(r"---\s*\n|[\w-]+:[ \t]*\n[ \t]*- |- (prompt|caption|text)s?:[ \t]")
COLUMN = re.compile(r"\w[\w.-]{0,40}")
OF_PROMPTS = ("prompt", "prompts", "caption", "captions")
NAMES_OF_COLUMNS = (  # a table's first line names one of them
    *OF_PROMPTS,
    *("text", "texts", "title", "description", "sentence"),
    *("id", "index", "image", "image_id", "image_path", "file", "file_name", "filename", "path", "url", "key"),
    *("name", "label", "category", "class", "split", "source", "language", "lang", "negative_prompt"),
)


def require_plain_text(file: Path) -> None:
    """Raise `UserError` if the start of a text file shows another format, such as JSON, RTF, HTML, XML, YAML or CSV.

    A plain text may still begin with a bracket, a brace or a tag. JSON is recognised by the beginning of a JSON list or
    object, HTML and XML by a declaration or a tag with its end tag, a table by its column names or tabs, and other
    formats by their first characters. A file that cannot be read raises no error here, but when its lines are read.
    """
    try:
        with opened(file) as text:
            head = text.read(HEAD).lstrip(BYTE_ORDER_MARK + " \t\r\n")
    except OSError:
        return
    if found := _json(head) or _marked(head) or _table(head):
        what, cure = found
        raise UserError(f"{file}: this text file {what}; {cure}")


def _json(head: str) -> tuple[str, str] | None:
    if not head.startswith(("[", "{")):
        return None
    value, rest = _first_value(head)
    if isinstance(value, dict) and ("\n" not in head[: len(head) - len(rest)]) and rest[:1] in ("", "\n", "\r"):
        return "has a JSON object on each line", "rename it to *.jsonl"
    if value and rest[:1] in ("", "\n", "\r"):
        return "is a JSON list" if isinstance(value, list) else "is a JSON object", TO_LIST
    if value is None and JSON_START.match(head):
        return "begins as JSON does", TO_LIST
    return None


def _first_value(head: str) -> tuple[Any, str]:
    """Return the JSON value at the start of a text and the text after it, or (None, `head`) if no value is complete."""
    try:
        value, end = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return None, head
    return value, head[end:].lstrip(" \t")


def _marked(head: str) -> tuple[str, str] | None:
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return f"is {name}", TO_TEXT
    markup = MARKUP_START.match(head)
    if markup and (markup[1] is None or f"</{markup[1].lower()}" in head.lower()):
        return "is HTML or XML", TO_TEXT
    return ("is YAML", TO_TEXT) if YAML_START.match(head) else None


def _table(head: str) -> tuple[str, str] | None:
    lines = head.splitlines()[: CHECKED_LINES + 1]
    lines = [line for line in (lines if len(head) < HEAD else lines[:-1]) if line.strip()]
    if len(lines) < 2:
        return None
    for delimiter, cure in DELIMITERS.items():
        rows = list(csv.reader(lines, delimiter=delimiter))
        names, counts = [name.lower() for name in rows[0]], {len(row) for row in rows}
        if min(counts) < 2:
            continue
        is_header = all(map(COLUMN.fullmatch, names)) and any(name in NAMES_OF_COLUMNS for name in names)
        is_even = len(counts) == 1 or any(name in OF_PROMPTS for name in names)
        if is_even and (is_header or delimiter == "\t"):
            return f"is a table with the columns {', '.join(names)[:80]}", cure
    if lines[0].strip().strip('"').lower() in OF_PROMPTS:
        return f"is a table with the column {lines[0].strip()}", "rename it to *.csv, or remove its first line"
    return None


def require_closed_quotes(file: Path, delimiter: str) -> None:
    """Raise `UserError` if a quoted cell of a table is not closed, or if text follows its closing quotation mark.

    Without the closing quotation mark, the rest of the file would be read as one cell. `delimiter` separates the
    columns of `file`. The rules are those of RFC 4180: quotation marks enclose a whole cell, so no text may follow them
    in the same cell, and a quotation mark inside the cell is written twice.
    """
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        with opened(file) as text:
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            number = 0
            try:
                for _ in rows:
                    number = rows.line_num
            except csv.Error as error:
                raise UserError(
                    f"{file}, line {number + 1}: a quotation mark is not closed, or text follows it in the same cell "
                    f"({first_line(error)}); close it, and write a quotation mark inside a quoted cell twice"
                ) from error
    except OSError as error:
        raise UserError(f"{file}: cannot read the prompt file ({error.strerror}); correct the path") from error
    finally:
        csv.field_size_limit(before)
