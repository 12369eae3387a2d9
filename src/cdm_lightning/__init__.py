"""Distil diffusion and flow models to a few steps: Continuous-Time Distribution Matching on PyTorch Lightning."""

import os

# Read when torch is imported. If another process of a run ends, torch would otherwise print the frames of its C++ stack
# as a warning, beside the error that this package reports in one line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def __getattr__(name: str) -> str:
    """Return `__version__`, which is looked up when it is first read.

    It is the version of the installed package, or the version in pyproject.toml of a checkout that is not installed.
    """
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cdm-lightning")
    except PackageNotFoundError:
        return _version_of_checkout()


def _version_of_checkout() -> str:
    import tomllib
    from pathlib import Path

    file = Path(__file__).parents[2] / "pyproject.toml"
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, KeyError, ValueError):
        return "unknown"
