"""Silence messages of Lightning, torch and diffusers that are irrelevant to the users of this package."""

import logging
import os
import sys
import warnings

from cdm_lightning.terminal.output import mask_output

UNFIT_WARNINGS = (
    ".*does not have many workers.*",  # reading lines of text needs no workers
    ".*in eval mode at the start of training.*",  # the student's EMA is meant to be in eval mode
    ".*sync_dist=True.*",  # callbacks combine the measurements of all processes before they log them
    ".*LeafSpec.*is deprecated.*",  # it comes from Lightning's own code
)
NO_EXCEPTIONS = (
    "should be kept in float32: []"  # a diffusers warning about a cast contains this text if it names no layer
)


def quiet_libraries() -> None:
    """Hide irrelevant messages of Lightning, torch and diffusers, and mask secrets in everything that is printed.

    Call this before these libraries are imported. If the locale is not UTF-8, this function first starts the command
    again in Python's UTF-8 mode (see `speak_utf8`).
    """
    speak_utf8()
    mask_output()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for library in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(library).setLevel(logging.ERROR)  # they warn about torchao's format, which no model here uses
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_a_layer)
    for message in UNFIT_WARNINGS:
        warnings.filterwarnings("ignore", message)


def speak_utf8() -> None:
    """Start the same command again in Python's UTF-8 mode if the locale is not UTF-8 (for example LC_ALL=C).

    Without UTF-8, Python could not write an argument such as "é" to a file. A new start is needed because Python cannot
    change the mode of a running process.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def _names_a_layer(record: logging.LogRecord) -> bool:
    return NO_EXCEPTIONS not in record.getMessage()
