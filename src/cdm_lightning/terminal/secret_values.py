"""Mask the values of secret keys in a text, as in `hub_token=VALUE`, `"password": [VALUE]` or YAML.

All keys in the text are looked for. If a key is secret, its whole value is masked; otherwise, further keys are looked
for in its value.
"""

import re
from typing import Any

from cdm_lightning.terminal.secret_keys import holds_login, holds_tokens, is_secret_key
from cdm_lightning.terminal.secret_shapes import MASK

SHORTEST_SECRET = 6  # characters; shorter values are switches and counts
SWITCHES = frozenset({"true", "false", "none", "null", "yes", "no", "on", "off", "auto", "default", "required"})
IN_ADDRESSES = frozenset({"key", "sig", "code", "hmac"})  # more keys of `?KEY=VALUE`
PAIRS = {"(": ")", "[": "]", "{": "}"}
ENDS_AFTER = " \t\r\n,;:)]}>\"'\\"  # what follows a quotation mark or bracket that ends a value
KEY = re.compile(
    r"""(?<![\w.@/%-])(?:
      (?P<option>--?[A-Za-z][\w.-]*+)(?P<gap>[ \t]+(?=\S)|["'],[ ]*(?=["'])|[ \t]*\\\n[ \t]*(?=\S))
    | (?P<name>[\w.@/%-]++)(?P<sign>(?:\\?["'])?\]?(?:[ \t]*(?:=>|:=|={1,2})[ \t]*|[ \t]*:(?![:/\\])[ \t]*|["']\s*:\s*))
    )""",
    re.VERBOSE,
)
A_FILE = re.compile(r"\.(?:py|ya?ml|jsonl?|txt|md|toml|csv|pt|safetensors|log|cfg|ini|sh|ipynb)$")
NEXT = re.compile(r"[,;|&]\s*[a-z_][a-z0-9_.]{2,}=(?![=\s]|\Z)")  # the next of several `KEY=VALUE`
NEXT_OF_ADDRESS = re.compile(r"(?:[&;]|&amp;)[\w.%-]+=|#")
STRING = re.compile(r"""[bBrRuUfF]{0,2}(?:"(?:\\.|[^"\\])*+"|'(?:\\.|[^'\\])*+')""", re.DOTALL)
IN_ANGLES = re.compile(r"<[^<>\n]*>")
STOP = re.compile(r"""[\s\\"'()\[\]{}<>,;&|#]""")
BLOCK = re.compile(r"[|>]?[+-]?\d?[ \t]*(?:#[^\n]*)?\r?\n")
A_LOGIN = re.compile(r"[\"']?[\w.@+-]{1,100}:(?!//|\d+\b|[\"'])\S{4}")
INNER_KEY = re.compile(r"[\"']?([\w.-]{1,100})[\"']?:[ \t]+")
REFERENCE = re.compile(r"\$\{[\w.:@/-]*\}")


def mask_named(text: str) -> str:
    """Return a text in which the values of secret keys are replaced by ***."""
    return _Values(text).masked()


def is_random(value: Any) -> bool:
    """Return whether a text looks like a secret and not like a word: it is not short, and has digits, capitals or symbols."""
    return (
        isinstance(value, str)
        and len(value) >= SHORTEST_SECRET
        and not re.fullmatch(r"[A-Z]?[a-z ,.<|>-]+|[\d.,:-]+", value)
    )


def is_login(value: Any) -> bool:
    """Return whether a text has the form USER:PASSWORD. Texts such as "1000:1000" and "http://..." do not have it."""
    return isinstance(value, str) and bool(re.fullmatch(r"[\w.@+-]+:(?!//|\d+$)\S{4,}", value))


class _Values:
    """The search for secret values in `text`.

    For each bracket that is never closed, the search reads to the end of the text. `steps` limits the total work.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 4 * len(text) + 10_000

    def masked(self) -> str:
        """Return `self.text` with *** in place of each secret value."""
        parts, done, place = [], 0, 0
        while found := KEY.search(self.text, place):
            place = found.end()
            end = self._secret_end(found)
            if end is None:
                continue
            value = self.text[place:end]
            if is_hidden(value):
                place = end
                continue
            parts += [self.text[done:place], self._mask_of(place, value)]
            done = place = end
        return "".join([*parts, self.text[done:]])

    def _mask_of(self, place: int, value: str) -> str:
        """Return *** to replace the value at `place`. It keeps the value's quotation marks, and the space after a YAML key."""
        if mark := re.match(r"[bBrRuUfF]{0,2}([\"'])(?=.*[\"']\Z)", value, re.DOTALL):
            return f"{mark[0]}{MASK}{mark[1]}"
        return f" {MASK}" if self.text[place - 1] == ":" and value[:1].isspace() else MASK

    def _secret_end(self, found: re.Match[str]) -> int | None:
        """Return the index at which the value of a found key ends, or None if the value is no secret."""
        text, start = self.text, found.end()
        name, sign = found["option"] or found["name"], found["gap"] or found["sign"] or ""
        in_address = found.start() > 0 and text[found.start() - 1] in "?&;#" and sign == "="
        if not is_secret_key(name):
            is_more = in_address and name.lower() in IN_ADDRESSES
            is_more = is_more or (holds_login(name) and A_LOGIN.match(text, start) is not None)
            end = self._end(start, in_address) if is_more or holds_tokens(name) else start
            return end if is_more or holds_secret_tokens(text[start:end]) else None
        if found["option"]:
            is_option = re.match(r"--?[a-z](?:[a-z-]*)(?![\w-])", text[start : start + 80])
            return None if is_option else self._end(start, False)
        if sign.strip() != ":":  # as in `KEY=VALUE` or `"KEY": VALUE`
            end = self._end(start, in_address)
            is_spaced = "=" in sign and sign != sign.strip()
            return self._to_line_end(found.start(), start, end) if is_spaced else end
        return self._end_in_sentence(found, name)

    def _end_in_sentence(self, found: re.Match[str], name: str) -> int | None:
        """Return the index at which VALUE ends in `KEY: VALUE`, or None if VALUE is an ordinary word of a sentence."""
        text, start = self.text, found.end()
        if BLOCK.match(text, start):
            return self._end_of_block(found)
        if A_FILE.search(name):
            return None
        for _ in range(3):
            inner = INNER_KEY.match(text, start)
            if not inner or is_random(inner[1]):
                break
            start = inner.end()  # as in "hub_token: value: VALUE"
        end = self._end(start, False)
        value = text[start:end]
        inside = value.strip("\"'")
        is_close = text[start - 1] == ":"  # as in {token:VALUE}, main.py:77 or module:function
        if is_close and not re.search("[A-Za-z]", value):
            return None
        if not is_random(inside) and (is_close or not re.search(r"pass|secret|phrase|mnemonic", name, re.IGNORECASE)):
            return None
        return end if is_hidden(value) else self._to_line_end(found.start(), start, end)

    def _to_line_end(self, key: int, start: int, end: int) -> int:
        """Return the end of the line if the value may have several words, and `end` otherwise.

        It may have several words if it has no quotes or brackets, if its key begins the line (as in YAML), and if the line has no
        further key.
        """
        if self.text[start : start + 1] in "\"'[{(<" or self._indent(key) is None:
            return end
        stop = self.text.find("\n", end)
        stop = len(self.text) if stop < 0 else stop
        return end if KEY.search(self.text, end, stop) else stop

    def _end_of_block(self, found: re.Match[str]) -> int | None:
        """Return the index at which the YAML block below `KEY:` ends, or None if nothing in the block looks secret."""
        text = self.text
        begins_line = self._indent(found.start()) is not None
        indent = self._indent(found.start()) or 0
        place = end = text.index("\n", found.end()) + 1
        lines = []
        while place < len(text):
            stop = text.find("\n", place)
            stop = len(text) if stop < 0 else stop
            content = text[place:stop].strip()
            depth = len(text[place:stop]) - len(text[place:stop].lstrip())
            is_item = begins_line and depth == indent and content.startswith("- ")
            if content and depth <= indent and not is_item:
                break
            if content:
                lines.append(content)
                end = stop
            place = stop + 1
        if lines:
            return end if begins_line or any(is_random(one.rpartition(" ")[2]) for one in lines) else None
        return None if KEY.match(text, place) else self._end_of_line_below(place)

    def _indent(self, key: int) -> int | None:
        """Return the number of spaces before a key that begins its line, or None if other text precedes the key."""
        before = self.text[max(0, key - 200) : key]
        found = re.search(r"(\n|\A)([ \t]*)(?:- )*[\"']?\Z", before)
        return len(found[2]) if found and (found[1] or key <= 200) else None

    def _end_of_line_below(self, place: int) -> int | None:
        """Return the end of the line at `place` if the line is one random-looking word, otherwise None.

        Such a word may be the answer to a prompt such as "Password:".
        """
        word = re.compile(r"(\S{6,500})[ \t\r]*(?:\n|\Z)").match(self.text, place)
        return word.end(1) if word and is_random(word[1]) else None

    def _end(self, start: int, in_address: bool) -> int:
        """Return the end of the value at `start`, which is a quoted string, a bracketed text, or the text up to a space."""
        text, place, awaited, is_whole = self.text, start, [], False
        if string := STRING.match(text, start) or IN_ANGLES.match(text, start):
            place, is_whole = string.end(), True
        following = NEXT_OF_ADDRESS if in_address else NEXT
        while place < len(text):
            sign = text[place]
            if sign == "\\" and text[place + 1 : place + 2] not in ("", "\n"):
                place += 2
            elif sign in PAIRS and (awaited or not is_whole):
                awaited.append(PAIRS[sign])
                place += 1
            elif awaited:
                if sign == awaited[-1]:
                    awaited.pop()
                    is_whole = not awaited and text[start] in PAIRS
                string = STRING.match(text, place) if sign in "\"'" and text[place - 1] in " \t\n[{(,:=" else None
                place = string.end() if string else place + 1
            elif (
                sign.isspace()
                or (is_whole and sign in ENDS_AFTER)
                or following.match(text, place)
                or (sign in "\"')]}>,;|" and text[place + 1 : place + 2] in ENDS_AFTER)
            ):
                break
            else:
                place += 1
            if awaited or not is_whole:
                stop = STOP.search(text, place)
                place = stop.start() if stop else len(text)
        return self._end_of_unclosed(start, place) if awaited else min(place, len(text))

    def _end_of_unclosed(self, start: int, place: int) -> int:
        """Return the end of a value whose bracket is never closed.

        The result is the end of the line, or of the word if the bracket is inside the value. If the text has too many such values,
        the result is the end of the text.
        """
        self.steps -= place - start
        if self.steps < 0:
            return len(self.text)
        found = re.compile(r"\n|\Z" if self.text[start] in PAIRS else r"\s|\Z").search(self.text, start)
        return found.start() if found else len(self.text)


def holds_secret_tokens(value: str) -> bool:
    """Return whether the value of a key such as `tokens` is an access token, or a list that contains one."""
    if value[:1] in PAIRS:
        return any(is_random(piece) for piece in re.split(r"[\s,\[\](){}\"']+", value))
    return is_random(value) and len(value) > 9 and bool(re.search("[A-Za-z]", value) and re.search(r"\d", value))


def is_hidden(value: str) -> bool:
    """Return whether a value reveals nothing: a switch such as "true", a small number, a reference `${...}`, or ***."""
    inside = value.strip("\"'")
    if inside.lower() in SWITCHES or inside == MASK or REFERENCE.fullmatch(inside):
        return True
    return re.fullmatch(r"[\d.]{1,5}|", inside) is not None
