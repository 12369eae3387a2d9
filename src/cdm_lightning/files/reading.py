"""Functions that read regular files of a limited size and check file names."""

import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from cdm_lightning.errors import UserError

MOST_TEXT = 1 << 26  # bytes of a small file such as JSON; the files of a run and of a pipeline have a few kilobytes
LONGEST_NAME = 255  # bytes, in all common file systems


def open_regular(path: str | Path, most: int | None = None, follow: bool = True) -> BufferedReader:
    """Open a regular file of at most `most` bytes for reading in binary mode.

    Raises OSError if the file is larger or not a regular file. With `follow=False`, a link is refused too.
    """
    flags = (
        os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    )  # without O_NONBLOCK, opening a pipe waits for a writer
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(error.errno, "links are not allowed here", str(path)) from error
        raise
    try:
        _require(os.fstat(descriptor), path, most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: str | Path, most: int | None = None) -> Path:
    """Return `path` if it is a regular file of at most `most` bytes, or a link to one.

    Raises OSError otherwise.
    """
    _require(os.stat(path), path, most)
    return Path(path)


def _require(found: os.stat_result, path: str | Path, most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than {most:,}", str(path))


def read_text(path: str | Path, most: int = MOST_TEXT, follow: bool = True) -> str:
    """Return the text of a UTF-8 file of at most `most` bytes.

    Raises UnicodeDecodeError if the file is not UTF-8, and OSError in the cases of `open_regular`, which explains
    `follow`.
    """
    with open_regular(path, most, follow) as file:
        return file.read().decode("utf-8")


def irregular(folder: str | Path) -> Iterator[Path]:
    """Yield the paths in a folder and its subfolders that are neither files nor folders, such as pipes and broken links."""
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file() and not path.is_dir():
            yield path


def require_name(name: object, option: str) -> str:
    """Return `name` as a string if it can be the name of a file.

    `name` is a string or a number. As a string it must have 1 to 255 bytes, must not be "." or "..", and must not
    contain slashes, backslashes or control characters. Raises `UserError` otherwise; `option` is the option's name for
    the message.
    """
    text = str(name) if isinstance(name, (str, int, float)) and not isinstance(name, bool) else ""
    is_fit = text.strip() and text not in (".", "..") and text.isprintable() and not set(text) & {"/", "\\"}
    if not is_fit or len(os.fsencode(text)) > LONGEST_NAME:
        raise UserError(
            f"{option}={str(name)!r:.80} must be a name such as my_run: 1 to {LONGEST_NAME} bytes, no slash, backslash or control "
            "character, and not . or .."
        )
    return text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop.

    If the error has no text, return the name of its type.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
