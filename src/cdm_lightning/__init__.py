"""Distil diffusion and flow models to a few steps: Continuous-Time Distribution Matching on PyTorch Lightning."""


def __getattr__(name: str) -> str:
    """`__version__`, that of the installed package, which has it from pyproject.toml; read when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("cdm-lightning")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
