"""The words that a pipeline of toy size knows. Its text encoders were trained on a few dozen words, and others have no meaning."""

import re
from collections.abc import Iterable
from pathlib import Path

from cdm_lightning.backbones.settings_file import read_settings

TOKENIZERS = ("tokenizer_3", "tokenizer_2", "tokenizer")  # of a pipeline, the one with whole words first
FILE = "tokenizer.json"
LARGEST = 1 << 17  # bytes of such a tokenizer's file; real ones have megabytes
WORD = re.compile(r"[^\W\d_]+")


def known_words(folder: Path) -> set[str]:
    """Return the words that are single tokens of the small unigram tokenizer in a pipeline's folder.

    Returns an empty set for a tokenizer of usual size, which can express any word, and for other kinds of tokenizers.
    """
    for name in TOKENIZERS:
        path = folder / name / FILE
        if path.is_file() and path.stat().st_size <= LARGEST:
            model = read_settings(path).get("model")
            entries = model.get("vocab") if isinstance(model, dict) else None
            if isinstance(entries, list):
                pieces = [
                    entry[0] for entry in entries if isinstance(entry, list) and entry and isinstance(entry[0], str)
                ]
                return {piece[1:] for piece in pieces if piece.startswith("▁") and len(piece) > 1}
    return set()


def unknown_words(prompts: Iterable[str], known: set[str]) -> list[str]:
    """Return the words of the prompts that are not `known`, in alphabetical order; [] if `known` is empty."""
    used = {word.lower() for prompt in prompts for word in WORD.findall(prompt)}
    return sorted(used - known) if known else []
