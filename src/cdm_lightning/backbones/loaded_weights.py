"""Load one model of a pipeline, and check that none of its weights is missing, unexpected or not finite.

diffusers and transformers fill missing weights with random numbers, and they drop weights that the configuration has no
place for. The libraries only warn about either; here both are errors.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_log

from cdm_lightning.backbones.pipeline_folder import loading
from cdm_lightning.backbones.whole_folder import AGAIN
from cdm_lightning.errors import UserError


def model_class(library: str, name: str) -> type[Any] | None:
    """Return the class `name` of diffusers or transformers if it is a model, and None for any other part of a pipeline."""
    found = getattr(diffusers if library == "diffusers" else transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, diffusers.ModelMixin | transformers.PreTrainedModel)
    return found if is_model else None


def load_model(kind: type[Any], folder: Path, dtype: torch.dtype) -> Any:
    """Load the model of the class `kind` that `folder` contains, on the CPU in `dtype`.

    Raises `UserError` if the files in `folder` lack a weight, have a weight that config.json has no place for, or have
    a value that is not finite.
    """
    with loading(folder), without_report():
        model, report = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    require_names(model, report["missing_keys"], report["unexpected_keys"], folder)
    for name, tensor in model.state_dict().items():
        require_finite(tensor, name, folder)
    return model


@contextmanager
def without_report(log: ModuleType = transformers_log) -> Generator[None]:
    """Print only errors of a library in the `with` block, whose logging module is `log`.

    transformers would print a table of missing and unexpected weights: `require_names` says it in one line.
    """
    shown = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(shown)


def require_names(model: nn.Module, missing: Iterable[str], unexpected: Iterable[str], folder: Path) -> None:
    """Raise `UserError` if the files of `model` lack a weight, or contain a weight that `model` has no place for.

    `missing` are the names of the weights that the files lack, and `unexpected` those of the stored weights that
    `model` lacks. An unexpected weight is allowed if it is part of a top-level module that `model` does not have, such
    as a language head. A stored value of a buffer, which older versions of the libraries wrote, is also allowed. The
    message names `folder`, which contains the files.
    """
    if absent := sorted(missing):
        raise UserError(f"{folder}: the weight {absent[0]} is missing; {AGAIN}")
    children = {name for name, _ in model.named_children()}
    inner = f"{getattr(model, 'base_model_prefix', '') or ''}."
    buffers = tuple(name for name, _ in model.named_buffers())
    for name in sorted(unexpected):
        within = name if inner == "." else name.removeprefix(inner)
        if {name.partition(".")[0], within.partition(".")[0]} & children and not name.endswith(buffers):
            raise UserError(
                f"{folder}: the weight {name} has no place in the model that config.json describes, so config.json and the "
                f"weights are of different models; {AGAIN}"
            )


def require_finite(tensor: Tensor, name: str, where: Path | str) -> None:
    """Raise `UserError` if a floating-point tensor has NaN or infinity. The check needs one pass and no extra memory.

    `name` is the tensor's name and `where` its folder or file, for the message.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit numbers have few functions
    if not all(bound.isfinite() for bound in torch.aminmax(values.detach())):  # a NaN gives NaN
        raise UserError(f"{where}: the weight {name} has values that are not finite (NaN or infinity); {AGAIN}")
