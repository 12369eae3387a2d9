"""Recognize secret keys: the names of options, environment variables and other settings whose values are secret."""

import re
from functools import lru_cache

WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
SECRET_WORDS = frozenset({
    *("token", "secret", "secrets", "password", "passwords", "passwd", "passphrase", "passcode", "credential", "credentials"),
    *("creds", "auth", "authorization", "authentication", "bearer", "signature", "cookie", "cookies", "apikey", "apikeys"),
    *("authkey", "accesskey", "secretkey", "privatekey", "jwt", "passkey", "passkeys", "otp", "totp", "mnemonic", "userpwd"),
    *("webhook", "webhooks", "sessionid", "sessid", "phpsessid", "jsessionid", "csrf", "xsrf"),
})  # fmt: skip
LAST_WORDS = frozenset({"pwd", "pat", "cred", "sas", "dsn"})  # secret only as the last word of a key
SECRET_PAIRS = {  # secret as two words that follow each other: the second one, and what may be before it
    "phrase": frozenset({"seed", "recovery", "backup", "mnemonic", "pass"}),
    "id": frozenset({"session"}),
    "code": frozenset({"access", "auth", "recovery", "backup", "verification", "security", "login", "invite"}),
    "codes": frozenset({"access", "recovery", "backup"}),
    "private": frozenset({"ssh", "rsa", "gpg", "pgp", "wallet", "deploy"}),
    "string": frozenset({"connection"}),
}
for word in ("url", "uri"):  # the address of a service, which has a login in it
    SECRET_PAIRS[word] = frozenset(
        {"database", "db", "postgres", "postgresql", "mysql", "redis", "mongo", "mongodb", "broker"}
    )
SECRET_ENDS = ("token", "password", "passwd", "secret", "apikey", "passphrase", "credentials")  # hftoken, dbpassword
NO_PASSWORDS = frozenset({  # what is no password with -pass behind it, as in `bypass` and `first_pass`, unlike SSHPASS
    *("by", "com", "encom", "tres", "sur", "under", "over", "multi", "low", "high", "band", "all", "one", "two", "first"),
    *("second", "last", "single", "forward", "backward", "render", "sub", "in", "out"),
})  # fmt: skip
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
LOGINS = frozenset({"login", "user", "username", "account"})  # their values may be USER:PASSWORD


@lru_cache(maxsize=10_000)
def is_secret_key(name: str) -> bool:
    """Return whether a key, such as the name of an option, says that its value is secret.

    `hub_token`, `apiKey` and `DB_PASSWD` are such keys; `tokenizer`, `max_tokens`, `pad_token` and `keyword` are not.
    """
    words = [word.lower() for word in WORDS.findall(name)]
    for place, word in enumerate(words):
        before, is_last = words[place - 1] if place else "", place == len(words) - 1
        if word == "token":
            if not {before, *words[place + 1 : place + 2]} & TOKEN_OF_TEXT:
                return True
        elif word in ("key", "keys"):
            if place and is_last and before not in KEY_OF_DATA:
                return True
        elif word in SECRET_WORDS or word.endswith(SECRET_ENDS) or before in SECRET_PAIRS.get(word, ()):
            return True
        elif is_last and word.endswith("pass"):
            return (word.removesuffix("pass") or before) not in NO_PASSWORDS
        elif is_last and word in LAST_WORDS:
            return True
    return False


@lru_cache(maxsize=10_000)
def holds_tokens(name: str) -> bool:
    """Return whether a key is the name of a list that may hold access tokens, such as `hub.tokens`.

    A value in such a list is an access token if it looks random. A number or a word in the list is a token of a
    tokenizer, and no secret.
    """
    words = [word.lower() for word in WORDS.findall(name)][-2:]
    return words[-1:] == ["tokens"] and not set(words) & TOKEN_OF_TEXT


@lru_cache(maxsize=10_000)
def holds_login(name: str) -> bool:
    """Return whether a key, such as `login` or the option `-u`, may have a value of the form USER:PASSWORD."""
    words = [word.lower() for word in WORDS.findall(name)]
    return name == "-u" or bool(LOGINS.intersection(words[-1:]))
