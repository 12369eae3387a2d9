"""`python -m cdm_lightning.cache_text experiment=... text_cache.folder=DIR`: encode all prompts of a run into a cache.

The arguments are those of the training command. Training with the same `text_cache.folder` then needs no text encoder.
If the command runs again, for example after an interruption, it encodes only the prompts that the cache still lacks.
"""

import shutil
import sys
import time
from array import array
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig

from cdm_lightning.ends import signals

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()

from cdm_lightning.config import answer_questions, build, run_cli
from cdm_lightning.config.whole import check_config
from cdm_lightning.errors import UserError
from cdm_lightning.files import locked, sweep_folder
from cdm_lightning.files.leftovers import OWN
from cdm_lightning.terminal.progress import Progress

if TYPE_CHECKING:  # importing torch takes seconds: error messages should not wait for it
    from cdm_lightning.backbones.base import Backbone, Conditioning
    from cdm_lightning.data.prompts import Prompts
    from cdm_lightning.data.text_cache import StoredText, TextCacheSettings, Texts
    from cdm_lightning.data.text_shards import Manifest

LOCK = ".lock"
GIGABYTE = 1e9


@dataclass(frozen=True)
class Filled:
    """The result of `fill_cache`, for the cache in `folder`.

    `encoded` is the number of prompts that were added, and `total` is the number of prompts that the cache now holds.
    `bytes_per_prompt` is the size of an encoded prompt on the disk. `seconds_per_prompt` is the mean time to encode one of the
    added prompts.
    """

    folder: Path
    encoded: int
    total: int
    bytes_per_prompt: int
    seconds_per_prompt: float


def cache_text(config: DictConfig) -> Filled:
    """Encode all prompts of a run into the text cache in `text_cache.folder`.

    These are the prompts of training, validation and callbacks, and the empty prompt. Prints the result (`Filled`) in
    one line. Raises `UserError` for mistakes in `config`, and the errors of `fill_cache`.
    """
    check_config(config)
    settings = build(config, "text_cache")
    if settings.folder is None:
        raise UserError("text_cache.folder is not set; set text_cache.folder=DIR, the folder to write the cache into")
    backbone, data = build(config, "backbone"), build(config, "data")
    sets = {"training": data.train, "validation": data.val}
    sets |= {f"callback {number}": prompts for number, prompts in enumerate(callback_prompts(config.callbacks), 1)}
    data.prepare_data()
    filled = fill_cache(backbone, sets, settings, choose_device(config.trainer.get("accelerator", "auto")))
    print(
        f"text cache {filled.folder}: {filled.total:,} prompts, {filled.encoded:,} of them encoded now, "
        f"{1000 * filled.seconds_per_prompt:.3g} ms and {filled.bytes_per_prompt:,} bytes each"
    )
    return filled


def fill_cache(
    backbone: "Backbone", sets: "Mapping[str, Texts]", settings: "TextCacheSettings", device: str = "cpu"
) -> Filled:
    """Encode the empty prompt and all prompts in `sets` into the text cache in `settings.folder`.

    `sets` maps a name, such as "training", to prompts. `backbone` encodes the prompts on `device`. Prompts that are
    already in the cache are skipped. Raises `UserError` in these cases:
    - The cache was made with other text encoders than those of `backbone`, or in another dtype than `settings.dtype`.
    - A file of the cache is incomplete, or the disk is full.
    - The folder holds files but is not a text cache, is locked by another process, or cannot be written.
    - The conditioning of a prompt has another shape than the conditioning of the empty prompt.
    """
    import torch

    from cdm_lightning.data.text_cache import StoredText
    from cdm_lightning.data.text_shards import Manifest, read_manifest, require_fingerprint, write_manifest

    folder, fingerprint = Path(cast(str, settings.folder)), backbone.text_fingerprint
    with writing(folder):
        manifest = read_manifest(folder)
        if manifest is not None:
            require_fingerprint(folder, manifest, fingerprint)
            if manifest.dtype != settings.dtype:
                raise UserError(
                    f"{folder}: the cache stores {manifest.dtype} tensors, but text_cache.dtype={settings.dtype}; set "
                    f"text_cache.dtype={manifest.dtype}, or another text_cache.folder"
                )
        backbone.setup(torch.device(device))
        if manifest is None:
            manifest = Manifest.of(fingerprint, settings.dtype, backbone.encode_prompts([""]))
            write_manifest(folder, manifest)
        done = StoredText(folder, fingerprint)
        missing = MissingPrompts(done, sets)
        announce(folder, len(missing), manifest)
        start = time.perf_counter()
        encode_missing(backbone, missing, manifest, settings)
    seconds = (time.perf_counter() - start) / max(1, len(missing))
    return Filled(folder, len(missing), len(done) + len(missing), manifest.bytes_per_prompt, seconds)


class MissingPrompts:
    """The prompts that the text cache `done` lacks, each once: first the empty prompt, then prompts in `sets`.

    `sets` maps a name, such as "training", to prompts. To save memory, an object of this class keeps only the position
    of each missing prompt in `sets`. The text of the prompt is read from `sets` again when it is needed.
    """

    def __init__(self, done: "StoredText", sets: "Mapping[str, Texts]") -> None:
        from cdm_lightning.data.mixture import MixedPrompts
        from cdm_lightning.data.prompts import PromptList
        from cdm_lightning.data.selection import first_occurrences
        from cdm_lightning.data.text_shards import prompt_key

        sources = {"empty": PromptList([""]), **sets}  # used only for the number of prompts and for prompts by number
        self.prompts = MixedPrompts(cast("Mapping[str, Prompts]", sources))
        lacking, keys = array("q"), bytearray()
        for number in range(len(self.prompts)):
            prompt = self.prompts[number]
            if prompt not in done:
                lacking.append(number)
                keys += prompt_key(prompt)
        self.numbers = array("q", (lacking[place] for place in first_occurrences(keys)))

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, size: int) -> Iterator[list[str]]:
        """Yield the prompts in batches of at most `size`.

        The empty prompt is a batch of its own, because training without a text cache also encodes it alone.
        """
        batch: list[str] = []
        for number in self.numbers:
            batch.append(self.prompts[number])
            if len(batch) == size or number == 0:
                yield batch
                batch = []
        if batch:
            yield batch


def announce(folder: Path, count: int, manifest: "Manifest") -> None:
    """Print how many bytes `count` prompts will take in the text cache in `folder`.

    `manifest` says how many bytes one prompt takes. Raises `UserError` if the disk has less free space.
    """
    size, free = count * manifest.bytes_per_prompt, shutil.disk_usage(folder).free
    said = f"{count:,} prompts of {manifest.bytes_per_prompt:,} bytes, {size / GIGABYTE:.3g} GB"
    if size > free:
        raise UserError(
            f"{folder}: {said} to write, but the disk has {free / GIGABYTE:.3g} GB left; delete other files"
        )
    print(f"to encode: {said}", file=sys.stderr, flush=True)


def encode_missing(
    backbone: "Backbone", missing: MissingPrompts, manifest: "Manifest", settings: "TextCacheSettings"
) -> None:
    """Encode the prompts in `missing` with `backbone`, and write them to the text cache in `settings.folder`.

    Each file holds about `settings.shard_megabytes` MB. `manifest` has the shapes and dtypes of the tensors in the
    cache.
    """
    from cdm_lightning.backbones.base import concat
    from cdm_lightning.data.text_shards import prompt_key, write_shard

    per_shard = max(1, int(settings.shard_megabytes * 1e6 / manifest.bytes_per_prompt))
    progress = Progress("encoding prompts", len(missing))
    keys: list[bytes] = []
    conds: list[Conditioning] = []
    for batch in missing.batches(settings.batch_size):
        keys += map(prompt_key, batch)
        conds.append(encode_batch(backbone, batch, manifest, settings.batch_size))
        progress.advance(len(batch))
        if len(keys) >= per_shard or progress.done == len(missing):
            write_shard(Path(cast(str, settings.folder)), manifest, keys, concat(conds))
            keys, conds = [], []
    progress.close()


def encode_batch(backbone: "Backbone", batch: Sequence[str], manifest: "Manifest", size: int) -> "Conditioning":
    """Return the text conditioning of the prompts in `batch`, on the CPU and in the dtypes of the text cache.

    The size of a batch changes the rounding of some matrix products. Prompts are therefore always encoded `size` at a
    time: a smaller batch is filled with copies of its last prompt, whose conditioning is not returned. Only the empty
    prompt is encoded alone. `manifest` has the shapes and dtypes of the tensors in the cache. Raises `UserError` if a
    tensor has another shape for a prompt of `batch` than for the empty prompt.
    """
    filled = batch if batch[0] == "" else [*batch, *[batch[-1]] * (size - len(batch))]
    cond = backbone.encode_prompts(filled)
    for name, entry in manifest.tensors.items():
        if list(cond[name].shape[1:]) != entry["shape"]:
            raise UserError(
                f"{name} has the shape {list(cond[name].shape[1:])} in the batch of prompts that begins with {batch[0][:60]!r}, "
                f"but {entry['shape']} for the empty prompt, and a text cache needs equal shapes; if "
                "backbone.compact_text is set, raise it until the longest prompt fits"
            )
    return {name: cond[name][: len(batch)].to("cpu", manifest.stored(name)) for name in manifest.tensors}


def callback_prompts(node: DictConfig | None) -> "Iterator[Texts]":
    """Yield the prompts of each callback that makes images of its own prompts.

    `node` is the group `callbacks` of the configuration. A callback sets its own prompts with a key `prompts` whose
    value is a mapping with a `_target_`. The key may also be in a mapping inside the callback's options. The object
    that the mapping describes is built and yielded.
    """
    for key, child in (node or {}).items():
        if isinstance(child, DictConfig):
            if key == "prompts" and "_target_" in child:
                yield build(cast(DictConfig, node), key)
            else:
                yield from callback_prompts(child)


def choose_device(accelerator: str) -> str:
    """Return the device for the text encoders: "cuda" if there is a GPU and `accelerator` is not "cpu", otherwise "cpu"."""
    import torch

    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """Inside the `with` block, hold the lock of the text cache in `folder`, so that no other process writes this cache.

    Before the block, a missing folder is created, and temporary files that killed processes left in it are deleted.
    Raises `UserError` if the folder holds files but is not a text cache, is locked by another process, or cannot be
    written.
    """
    from cdm_lightning.data.text_shards import MANIFEST, SHARDS

    with ExitStack() as held:
        try:
            if not (folder / MANIFEST).is_file() and (others := names_in(folder) - {LOCK, SHARDS}):
                raise UserError(
                    f"{folder} is no text cache, since it holds {min(others)} but no {MANIFEST}; set text_cache.folder to a "
                    "new folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / LOCK))
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process is writing this text cache ({error.strerror}); wait for it, or stop it"
            ) from error
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be the text cache's folder ({error.strerror}); set another text_cache.folder"
            ) from error
        for place in (folder, folder / SHARDS):
            sweep_folder(place)
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror or error}); free space or set another text_cache.folder"
            ) from error


def names_in(folder: Path) -> set[str]:
    """Return the names of the files and folders in `folder`, except temporary files of this package.

    The result is empty if `folder` does not exist.
    """
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir() if not path.name.startswith(OWN)}


def main() -> None:
    """Run the command `python -m cdm_lightning.cache_text`."""
    answer_questions("train")
    from cdm_lightning.terminal.quiet import quiet_libraries

    quiet_libraries()
    run_cli(cache_text, "train", "before all prompts were encoded")


if __name__ == "__main__":
    main()
