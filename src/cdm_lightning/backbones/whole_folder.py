"""The check of a pipeline's folder by what its own files name: the parts of its index, their settings, their weights.

The libraries would fill gaps in silence: transformers makes an empty tokenizer where the vocabulary is missing.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

INDEX = "model_index.json"
AGAIN = "copy the folder again"
SETTINGS = {  # the file that a part of each kind is built from; some kinds have several names for it
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json", "tokenizer.json"),
    "processor": ("preprocessor_config.json", "processor_config.json"),
    "model": ("config.json",),
}
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def kind_of(class_name: str) -> str:
    """Return the kind of a part by the name of its class: "scheduler", "tokenizer", "processor" or "model"."""
    if "Scheduler" in class_name or class_name.endswith("Solver"):
        return "scheduler"
    if "Tokenizer" in class_name:
        return "tokenizer"
    return "processor" if class_name.endswith(("Processor", "FeatureExtractor", "ProcessorFast")) else "model"


def parts_of(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class of each part that an index names.

    Entries that are settings of the pipeline, such as "is_distilled": true, are no parts, and neither are parts that are
    left out ([null, null]).
    """
    entries = {part: entry for part, entry in index.items() if isinstance(entry, list) and not part.startswith("_")}
    return {part: entry[1] for part, entry in entries.items() if entry[1] is not None}


def require_settings(folder: Path, parts: Mapping[str, str]) -> None:
    """UserError unless the folder of each part, by its class, holds the settings of its kind, and all are JSON objects."""
    for part, class_name in parts.items():
        place, needed = folder / part, SETTINGS[kind_of(class_name)]
        if not place.is_dir():
            raise UserError(f"{folder} lacks {part}, which its {INDEX} names; {AGAIN}")
        if not any((place / file).is_file() for file in needed):
            raise UserError(f"{place} lacks {' or '.join(needed)}; {AGAIN}")
        for file in sorted(place.glob("*.json")):
            read_settings(file)


def require_contents(folder: Path, parts: Mapping[str, str]) -> None:
    """UserError unless each tokenizer has its vocabulary, and each model all the weights that its files name."""
    for part, class_name in parts.items():
        kind = kind_of(class_name)
        if kind == "model":
            require_weights(folder / part)
        elif kind == "tokenizer":
            require_vocabulary(folder / part)


def require_vocabulary(folder: Path) -> None:
    """UserError unless the folder of a tokenizer holds a vocabulary."""
    if not any(all(is_filled(folder / file) for file in files) for files in VOCABULARIES):
        known = ", ".join(" and ".join(files) for files in VOCABULARIES)
        raise UserError(f"{folder} holds no vocabulary ({known}), so the tokenizer would be empty; {AGAIN}")
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        require_numbers(read_settings(settings), ("model_max_length",), settings)


def is_filled(file: Path) -> bool:
    """Return whether a file exists and is not empty."""
    return file.is_file() and file.stat().st_size > 0


def require_weights(folder: Path) -> None:
    """UserError unless the folder of a model holds safetensors files that can be opened, all that its index names."""
    indexes = [folder / f"{name}.index.json" for name in WEIGHTS if (folder / f"{name}.index.json").is_file()]
    files = [folder / shard for index in indexes for shard in shards_of(index)]
    files += [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not files:
        others = ", but .bin files, which can hold programs: convert them" if any(folder.glob("*.bin")) else ""
        raise UserError(f"{folder} holds no {' or '.join(WEIGHTS)}{others or f'; {AGAIN}'}")
    for file in files:
        require_tensors(file)


def shards_of(index: Path) -> list[str]:
    """Return the names of the files that an index of weights names; UserError for an index that names none."""
    where = read_settings(index).get("weight_map")
    names = where.values() if isinstance(where, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f'{index} must name a file for each tensor under "weight_map"; {AGAIN}')
    return sorted(set(names))


def require_tensors(file: Path) -> None:
    """UserError unless a safetensors file exists and has the size that its own head says."""
    if not file.is_file():
        raise UserError(f"{file} is missing, though the index beside it names it; {AGAIN}")
    try:
        with safe_open(file, "pt") as content:
            content.keys()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); {AGAIN}") from error


def require_known_tokens(tokenizer: Any, encoder: Any, folder: Path) -> None:
    """UserError unless a tokenizer has words, and its encoder an embedding for each of their numbers and places."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary.keys() - set(tokenizer.all_special_tokens)) < 2:
        raise UserError(f"{folder}: the tokenizer knows no words; {AGAIN}")
    rows, largest = encoder.get_input_embeddings().num_embeddings, max(vocabulary.values())
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer gives numbers up to {largest}, but its text encoder knows {rows}; {AGAIN}"
        )


def require_numbers(config: Mapping[str, Any], names: Iterable[str], file: Path) -> None:
    """UserError unless the named settings that `config` has are finite numbers."""
    for name in names:
        value = config.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and abs(value) < float("inf")):
            raise UserError(f"{file}: {name} must be a number, not {value!r}; {AGAIN}")


def require_sizes(sizes: Mapping[str, Any], file: Path) -> None:
    """UserError unless all these sizes, which follow from a file of settings, are whole numbers of at least 1."""
    wrong = [name for name, size in sizes.items() if not isinstance(size, int) or isinstance(size, bool) or size < 1]
    if wrong:
        raise UserError(f"{file}: {wrong[0]} would be {sizes[wrong[0]]!r}, not a whole number of at least 1; {AGAIN}")


def pairs_of(parts: Sequence[str]) -> list[tuple[str, str]]:
    """Return (tokenizer, text encoder) for the tokenizers among the parts whose encoder is there, as pipelines name them."""
    pairs = [(part, part.replace("tokenizer", "text_encoder")) for part in parts if part.startswith("tokenizer")]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder in parts]
