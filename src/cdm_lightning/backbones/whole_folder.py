"""Check that a pipeline folder is complete and intact: its parts, settings and weights.

Without this check, diffusers and transformers replace some missing files by defaults and raise no error. For example,
transformers makes an empty tokenizer if the vocabulary is missing.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

INDEX = "model_index.json"
AGAIN = "copy or download the pipeline again"
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
WHOLE = re.compile(r"(ids|index|indices|idx|mask|tracked|step|count)$")  # ends of the names of buffers of whole numbers
MOST = {"layers": 1000, "blocks": 1000, "train_timesteps": 10**6}  # part of a setting's name: the largest value
LONGEST_TEXT = 10**6  # tokens; transformers takes 10**30 if tokenizer_config.json does not say it
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def kind_of(class_name: str) -> str:
    """Return the kind of a pipeline part: "scheduler", "tokenizer", "processor" or "model".

    `class_name` is the name of the part's class, which shows the kind.
    """
    if "Scheduler" in class_name or class_name.endswith("Solver"):
        return "scheduler"
    if "Tokenizer" in class_name:
        return "tokenizer"
    return "processor" if class_name.endswith(("Processor", "FeatureExtractor", "ProcessorFast")) else "model"


def parts_of(index: Mapping[str, Any]) -> dict[str, str]:
    """Return {part: name of its class} for the parts that a pipeline has.

    `index` is the content of the pipeline's model_index.json. Settings in `index`, such as "is_distilled": true, are
    left out. Parts stored as [null, null], which the pipeline does not have, are left out too.
    """
    entries = {part: entry for part, entry in index.items() if isinstance(entry, list) and not part.startswith("_")}
    return {part: entry[1] for part, entry in entries.items() if entry[1] is not None}


def require_settings(folder: Path, parts: Mapping[str, str]) -> None:
    """Raise `UserError` unless the pipeline folder `folder` has a valid subfolder for each part in `parts`.

    `parts` is {part: name of its class}. A valid subfolder has the part's name and contains the part's configuration
    file. Every JSON file in the subfolder can be read and passes `require_few_layers`.
    """
    for part, class_name in parts.items():
        place, needed = folder / part, SETTINGS[kind_of(class_name)]
        if not place.is_dir():
            raise UserError(f"{folder}: the part {part} is missing, but {INDEX} names it; {AGAIN}")
        if not any((place / file).is_file() for file in needed):
            raise UserError(f"{place}: the file {' or '.join(needed)} is missing; {AGAIN}")
        for file in sorted(place.glob("*.json")):
            require_few_layers(read_settings(file), file)
        if kind_of(class_name) == "scheduler" and "_class_name" not in read_settings(place / needed[0]):
            raise UserError(
                f"{place / needed[0]}: the entry _class_name is missing, so other entries may be, too; {AGAIN}"
            )


def require_few_layers(config: Mapping[str, Any], file: Path) -> None:
    """Raise `UserError` if `config` sets a number of layers, blocks or training timesteps above its limit in `MOST`.

    A model with such a number would take too long to build. Nested settings, such as those of an inner model, are
    checked too. The error names `file`, from which `config` was read.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            require_few_layers(value, file)
        most = next((most for part, most in MOST.items() if part in name), None)
        numbers = value if isinstance(value, list) else [value]
        large = [number for number in numbers if isinstance(number, int | float) and most and number > most]
        if large:
            raise UserError(
                f"{file}: {name}={large[0]!r:.80} must be at most {most}, since more would take too long to "
                f"build; {AGAIN}"
            )


def require_contents(folder: Path, parts: Mapping[str, str]) -> None:
    """Raise `UserError` unless each tokenizer in `parts` has a vocabulary and each model in `parts` has its weights.

    `parts` is {part: name of its class}. The files of a part are in the subfolder of `folder` that has the part's name.
    """
    for part, class_name in parts.items():
        kind = kind_of(class_name)
        if kind == "model":
            require_weights(folder / part)
        elif kind == "tokenizer":
            require_vocabulary(folder / part)


def require_vocabulary(folder: Path) -> None:
    """Raise `UserError` unless the tokenizer in `folder` has a vocabulary.

    Also raises it if `model_max_length` in the tokenizer's tokenizer_config.json is set to a value that is not a finite
    number.
    """
    if not any(all(is_filled(folder / file) for file in files) for files in VOCABULARIES):
        known = ", ".join(" and ".join(files) for files in VOCABULARIES)
        raise UserError(f"{folder} has no vocabulary ({known}), so the tokenizer would be empty; {AGAIN}")
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        require_numbers(read_settings(settings), ("model_max_length",), settings)


def is_filled(file: Path) -> bool:
    """Return whether a file exists and is not empty."""
    return file.is_file() and file.stat().st_size > 0


def require_weights(folder: Path) -> None:
    """Raise `UserError` unless `folder`, the folder of a model, holds the model's weights as intact safetensors files.

    If the folder has a shard index, all files that the index names are required.
    """
    for file in weight_files(folder):
        require_tensors(file)


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of the safetensors files from which the weights of the model in `folder` are read.

    These are all files that a shard index in the folder (*.safetensors.index.json) names, and all files with a name in
    `WEIGHTS`. Other safetensors files, such as backups, are not returned. Raises `UserError` if no file is found, and
    the errors of `shards_of` for a wrong shard index.
    """
    indexes = [folder / f"{name}.index.json" for name in WEIGHTS if (folder / f"{name}.index.json").is_file()]
    files = [folder / shard for index in indexes for shard in shards_of(index)]
    files += [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not files:
        others = "; convert its .bin files, which can contain programs" if any(folder.glob("*.bin")) else ""
        raise UserError(f"{folder} has no {' or '.join(WEIGHTS)}{others or f'; {AGAIN}'}")
    return files


def shards_of(index: Path) -> list[str]:
    """Return the file names in a shard index (*.safetensors.index.json), sorted.

    Raises `UserError` if the index names no file, or a file outside its own folder.
    """
    where = read_settings(index).get("weight_map")
    names = where.values() if isinstance(where, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f'{index} must name a file for each tensor under "weight_map"; {AGAIN}')
    return sorted(set(names))


def require_tensors(file: Path) -> None:
    """Raise `UserError` unless the safetensors file `file` exists, is complete and holds floating-point weights.

    A complete file has the size that its header says. Whole numbers are allowed only in tensors whose names match
    `WHOLE`, such as position ids and counters. In a weight they are a mistake, and diffusers and transformers would
    convert them to floating point without a warning.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing, but the index in the same folder names it; {AGAIN}")
    try:
        with safe_open(file, "pt") as content:
            names = [name for name in list(content.keys()) if not WHOLE.search(name)]
            dtypes = {name: content.get_slice(name).get_dtype() for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); {AGAIN}") from error
    wrong = [name for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
    if wrong:
        raise UserError(
            f"{file}: the weight {wrong[0]} is stored as {dtypes[wrong[0]]}, but weights must be floating-point numbers; {AGAIN}"
        )


def require_known_tokens(tokenizer: Any, encoder: Any, folder: Path) -> None:
    """Raise `UserError` if the text encoder `encoder` lacks an embedding for a token of `tokenizer`.

    Also raises it if `tokenizer` has fewer than two tokens that are not special tokens. The error names `folder`, the
    tokenizer's folder.
    """
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary.keys() - set(tokenizer.all_special_tokens)) < 2:
        raise UserError(f"{folder}: the tokenizer has no words in its vocabulary; {AGAIN}")
    rows, largest = encoder.get_input_embeddings().num_embeddings, max(vocabulary.values())
    if not 1 < tokenizer.model_max_length < LONGEST_TEXT and "CLIP" in type(encoder).__name__:
        raise UserError(
            f"{folder}: model_max_length is missing in tokenizer_config.json, or is no length of a text; {AGAIN}"
        )
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer has token ids up to {largest}, but its text encoder has only {rows} embeddings; {AGAIN}"
        )


def require_numbers(config: Mapping[str, Any], names: Iterable[str], file: Path) -> None:
    """Raise `UserError` if a setting in `config` whose name is in `names` is not a finite number.

    Settings that are missing or null are allowed. The error names `file`, from which `config` was read.
    """
    for name in names:
        value = config.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and abs(value) < float("inf")):
            raise UserError(f"{file}: {name} must be a number, not {value!r}; {AGAIN}")


def require_sizes(sizes: Mapping[str, Any], file: Path) -> None:
    """Raise `UserError` unless each value in `sizes` is a whole number of at least 1.

    `sizes` is {name of a setting: value}. The error names the setting and `file`, the configuration file of the
    setting.
    """
    wrong = [name for name, size in sizes.items() if not isinstance(size, int) or isinstance(size, bool) or size < 1]
    if wrong:
        raise UserError(f"{file}: {wrong[0]}={sizes[wrong[0]]!r} must be a whole number of at least 1; {AGAIN}")


def constructor_defaults(network: type[Any]) -> dict[str, Any]:
    """Return {argument: default} for the arguments of the constructor of `network` that have a default."""
    parameters = inspect.signature(network.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def sizes_in(config: Mapping[str, Any], network: type[Any]) -> dict[str, Any]:
    """Return {name: value} of the settings in `config` that must be at least 1, such as widths.

    A setting is returned if its default in the constructor of `network` is a positive whole number. Numbers of layers
    are not returned, because they may be 0.
    """
    sizes = {name for name, value in constructor_defaults(network).items() if type(value) is int and value > 0}
    return {name: value for name, value in config.items() if name in sizes and "layers" not in name}


def pairs_of(parts: Sequence[str]) -> list[tuple[str, str]]:
    """Return each pair of part names (tokenizer, text encoder) that `parts` contains.

    Examples of such pairs are ("tokenizer", "text_encoder") and ("tokenizer_2", "text_encoder_2").
    """
    pairs = [(part, part.replace("tokenizer", "text_encoder")) for part in parts if part.startswith("tokenizer")]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder in parts]
