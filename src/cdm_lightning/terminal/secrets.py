"""The masking of secrets in everything that is written or printed: configurations, commands, messages and tracebacks.

A text is taken for a secret for one of four reasons:

- its key, as in `hub_token`, `--password` or `?api_key=`
- its place, as in `https://USER:PASSWORD@host` or `Authorization: Bearer ...`
- its shape, such as `hf_...` or `AKIA...`
- it is the value of an environment variable that has such a key
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import quote

MASK = "***"
SHORTEST_SECRET = 6  # characters; shorter values are switches and counts
LONG_SECRET = 16  # characters; a value of at least this length is masked within words too
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
SECRET_WORDS = frozenset({
    *("token", "secret", "secrets", "password", "passwords", "passwd", "passphrase", "passcode", "credential", "credentials"),
    *("creds", "auth", "authorization", "authentication", "bearer", "signature", "cookie", "cookies", "apikey", "apikeys"),
    *("authkey", "accesskey", "secretkey", "privatekey", "jwt"),
})  # fmt: skip
LAST_WORDS = frozenset({"pass", "pwd", "pat", "cred", "sas"})  # secret only as the last word of a key
SECRET_ENDS = ("token", "password", "passwd", "secret", "apikey", "passphrase", "credentials")  # hftoken, dbpassword
TOKEN_OF_TEXT = frozenset({  # words beside "token" that make it a piece of text
    *("pad", "eos", "bos", "unk", "mask", "cls", "sep", "special", "begin", "end", "start", "stop", "image", "vision", "video"),
    *("audio", "text", "prompt", "first", "last", "next", "per", "count", "counts", "length", "lengths", "limit", "ids", "id"),
    *("type", "types", "dropout", "size", "sizes", "number", "num", "max", "min", "mean", "embedding", "embeddings", "dim"),
    *("budget", "index", "position", "positions", "replacement", "padding", "refiner", "mixing", "mixer", "merging", "merge"),
    *("norm", "rate", "second"),
})  # fmt: skip
KEY_OF_DATA = frozenset({  # words before "key" that make it a name of something in data, or a word of a sentence
    *("text", "image", "prompt", "caption", "label", "monitor", "metric", "sort", "primary", "foreign", "state", "cache"),
    *("index", "column", "field", "feature", "batch", "group", "dict", "sample", "the", "a", "no", "any", "each", "its"),
    *("which", "another", "unknown", "same", "this", "of", "parameter", "missing", "unexpected", "head", "attention", "full"),
    "public",
})  # fmt: skip
SWITCHES = frozenset({"true", "false", "none", "null", "yes", "no", "on", "off", "auto", "default", "required"})
IN_ADDRESSES = frozenset({"key", "sig", "code", "hmac"})  # more keys of `?KEY=VALUE`

NESTED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
VALUE = rf"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|{NESTED}|\[[^\[\]]*\]|[^\s"',;&{{}}\[\]()<>|]+)"""
SHAPES = re.compile(
    r"""
    -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    | (?<![A-Za-z0-9])(?:
      (?:hf|api_org|gh[opusr]|github_pat|npm|gsk|nvapi|pplx|r8|figd|dckr_[op]at|shp[as][at]s?|[rps]k|whsec|gl[a-z]{1,5}t|glagent
        |xai|tvly|lin_api|ntn|do[op]_v1|sntry[su]|wandb_v1|pypi|rubygems|cfut|ya29|GOCSPX|jina|e2b|sbp|vck|fw|co)[-_.]
      (?=[A-Za-z0-9_.-]{0,80}(?:[A-Za-z0-9]{16}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{8}))  # a long run, or a shorter one with digits
      [A-Za-z0-9_.-]{16,}
      | xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9-]{10,} | xapp-[A-Za-z0-9-]{10,}
      | (?:AKIA|ASIA|AROA|AIDA|ABIA|ACCA|AGPA|ANPA)[A-Z0-9]{12,}
      | AIza[A-Za-z0-9_-]{30,}
      | eyJ[A-Za-z0-9_=-]{8,}\.[A-Za-z0-9_=-]{4,}(?:\.[A-Za-z0-9_.+/=-]*)?
      | SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}
      | hv[sbr]\.[A-Za-z0-9_-]{16,}
      | AGE-SECRET-KEY-1[A-Z0-9]{20,}
      | ATATT3[A-Za-z0-9_=-]{16,}
      | EAA[A-Za-z0-9]{30,}
      | \d{8,10}:[A-Za-z0-9_-]{35}
    )(?![A-Za-z0-9])
    """,
    re.VERBOSE | re.DOTALL,
)
IN_ADDRESS = re.compile(r"(?<=://)(?:[^\s/?#'\"]{1,500}|[^\s/@:'\"]{0,500}:(?!\d+/)[^\s@'\"]{1,500})(?=@)")
LOGIN = re.compile(r"(?<![\w/@:.-])[\w.+-]{1,100}:[^\s:/@'\"]{4,500}(?=@[\w-]+(?:\.[\w-]+|:\d))")
SCHEME = re.compile(
    r"\b(Bearer|Basic|Token|Negotiate|ApiKey)(\s+)(?=[^\s]*[0-9A-Z_.=/+-])[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE
)
PARAMETER = re.compile(r"([?&;#])([\w.%-]+)=([^\s&;#'\"<>]+)")
FLAG = re.compile(rf"(?<!\S)(--?[A-Za-z][\w.-]*)(\s+)(?!-)({VALUE})")
NAMED = re.compile(rf"""(?<![\w?&;#])([A-Za-z_][\w.@/-]{{0,160}})(["']?\s*=\s*|["']\s*:\s*|:\s+)({VALUE})""")


@cache
def is_secret_key(name: str) -> bool:
    """Return whether a key, such as the name of an option, says that its value is secret.

    `hub_token`, `apiKey` and `DB_PASSWD` are such keys; `tokenizer`, `max_tokens`, `pad_token` and `keyword` are not.
    """
    words = [word.lower() for word in WORDS.findall(name)]
    for place, word in enumerate(words):
        near = {*words[max(0, place - 1) : place], *words[place + 1 : place + 2]}
        if word == "token":
            if not near & TOKEN_OF_TEXT:
                return True
        elif word in ("key", "keys"):
            if place and place == len(words) - 1 and words[place - 1] not in KEY_OF_DATA:
                return True
        elif word in SECRET_WORDS or word.endswith(SECRET_ENDS) or (word in LAST_WORDS and place == len(words) - 1):
            return True
    return False


def masked(value: Any, key: str = "", is_secret: bool = False) -> Any:
    """Return a copy of nested dicts and lists in which each secret is replaced by ***.

    Secrets are the values below a secret key (`is_secret_key`), and those that `masked_text` finds in a text. `key` is the key
    of `value`. `is_secret` says that a key above it is secret.
    """
    is_secret = is_secret or is_secret_key(key)
    if isinstance(value, Mapping):
        return {
            masked_text(name) if isinstance(name, str) else name: masked(child, str(name), is_secret)
            for name, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(child, key, is_secret or (key.endswith("tokens") and _is_random(child))) for child in value]
    if isinstance(value, bool) or value is None:
        return value
    if is_secret and (isinstance(value, str) or len(str(value)) >= SHORTEST_SECRET):  # a token can be all digits
        return MASK if value != "" else value
    return masked_text(value) if isinstance(value, str) else value


def masked_command(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments in which each secret is replaced by ***.

    Secrets are the values of secret keys, as in `KEY=VALUE` or `--KEY VALUE`, and those that `masked_text` finds.
    """
    found, follows = [], False
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if follows and not argument.startswith("-"):
            found.append(MASK)
        elif sign and is_secret_key(name):
            found.append(f"{masked_text(name)}={MASK}" if value else argument)
        else:
            found.append(masked_text(argument))
        follows = not sign and argument.startswith("-") and is_secret_key(argument)
    return found


def masked_text(text: str) -> str:
    """Return a text in which each secret is replaced by ***.

    Harmless words such as `tokenizer` and `max_tokens=77` stay.
    """
    if len(text) < SHORTEST_SECRET:
        return text
    if known := _of_environment():
        text = known.sub(MASK, text)
    text = SHAPES.sub(MASK, text)
    if "@" in text:
        text = LOGIN.sub(MASK, IN_ADDRESS.sub(lambda found: found[0] if found[0] == "git" else MASK, text))
    text = SCHEME.sub(rf"\1\2{MASK}", text)
    text = PARAMETER.sub(_masked_parameter, text)
    text = FLAG.sub(_masked_named, text)
    return NAMED.sub(_masked_named, text)


def _masked_parameter(found: re.Match[str]) -> str:
    is_secret = is_secret_key(found[2]) or found[2].lower() in IN_ADDRESSES
    return f"{found[1]}{found[2]}={MASK}" if is_secret else found[0]


def _masked_named(found: re.Match[str]) -> str:
    """Return a found `KEY=VALUE`, `"KEY": VALUE` or `--KEY VALUE` with its value masked if the key is secret.

    In a sentence, as in `KEY: VALUE`, the value is masked only if it looks random.
    """
    name, sign, value = found[1], found[2], found[3]
    inner = value.strip("\"'")
    if not is_secret_key(name) and value[0] in "{[\"'":  # a secret may be inside
        return f"{name}{sign}{value[0]}{NAMED.sub(_masked_named, value[1:-1])}{value[-1]}"
    if not is_secret_key(name):  # as in "RuntimeError: password=..."
        return f"{name}{sign}{NAMED.sub(_masked_named, value)}"
    if inner.lower() in SWITCHES or inner == MASK or inner.startswith("${"):
        return found[0]
    if sign.strip() == ":" and not _is_random(inner) and not re.search(r"pass|secret", name, re.IGNORECASE):
        return found[0]
    if re.fullmatch(r"[\d.]{1,5}|", inner):
        return found[0]
    quote_mark = value[0] if value[0] in "\"'" else ""
    return f"{name}{sign}{quote_mark}{MASK}{quote_mark}"


def _is_random(value: Any) -> bool:
    """Return whether a text looks like a secret and not like a word: it has digits, capitals or signs, and is not short."""
    return (
        isinstance(value, str)
        and len(value) >= SHORTEST_SECRET
        and not re.fullmatch(r"[A-Z]?[a-z ,.<|>-]+|[\d.]+", value)
    )


def _of_environment() -> re.Pattern[str] | None:
    """Return a pattern that matches the secrets in environment variables, or None if there are none."""
    return _pattern(tuple(sorted({value for name, value in os.environ.items() if _holds_secret(name, value)})))


def _holds_secret(name: str, value: str) -> bool:
    is_path = value.startswith(("/", "~", "./")) and "/" in value[1:]  # a file that holds a secret, and home folders
    return len(value) >= SHORTEST_SECRET and not is_path and value.lower() not in SWITCHES and is_secret_key(name)


@cache
def _pattern(values: tuple[str, ...]) -> re.Pattern[str] | None:
    forms = {
        form
        for value in values
        for form in (value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], repr(value)[1:-1])
        if len(form) >= SHORTEST_SECRET
    }
    if not forms:
        return None
    ordered = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(
        "|".join(
            re.escape(form) if len(form) >= LONG_SECRET else rf"(?<!\w){re.escape(form)}(?!\w)" for form in ordered
        )
    )
