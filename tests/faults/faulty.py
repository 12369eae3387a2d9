"""A command that commits the fault that it is asked for, so that tests see whether the harness finds it."""

import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Commit `sys.argv[1]`."""
    fault = sys.argv[1]
    home = Path(os.environ["HOME"])
    if fault == "traceback":
        raise ValueError("a bug")
    if fault == "hang":
        time.sleep(1000)
    if fault == "foreign code":
        Path("pwned").touch()
    if fault == "lost":
        (home / "notes.txt").write_text("not mine any more")
    if fault == "replaced":
        os.replace(home / ".cache.tmp", "pipe")
    if fault == "outside":
        (home.parent / "beside").touch()
    if fault == "leaked":
        print(sys.argv[2])
    if fault == "not one line":
        print("error: more", file=sys.stderr)
    if fault == "late":
        (home.parent / "trained").touch()
    if fault == "ended":
        os._exit(3)
    if fault in ("not one line", "late", "refused"):
        print("error: no", file=sys.stderr)
        sys.exit(2)
    print("ran")
