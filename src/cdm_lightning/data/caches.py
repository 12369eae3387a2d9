"""Connect a run to its caches: one for the text conditioning of prompts, and one for the latents of real images."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import lightning as L

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.image_cache import ImageCacheSettings, StoredLatents
from cdm_lightning.data.text_ahead import TextAhead
from cdm_lightning.data.text_cache import StoredText, TextCacheSettings
from cdm_lightning.data.text_memory import RememberedText

if TYPE_CHECKING:
    from cdm_lightning.module import CDMModule


def use_text_cache(
    settings: TextCacheSettings, module: "CDMModule", data: PromptDataModule, callbacks: Sequence[L.Callback]
) -> None:
    """Let the backbone of `module` take the text conditioning of prompts from the cache in `settings.folder`.

    If `settings.folder` is None, the backbone encodes the prompts itself. With `settings.encode_ahead`, it encodes the
    prompts of several iterations in advance. Without `settings.encode_ahead`, it keeps the encodings of the run's
    prompts in memory, within the limits that `TextCacheSettings` explains. The run's prompts are those of `data` and
    those for which `callbacks` make images.

    Raises `UserError` if the cache in `settings.folder` was made by other text encoders. If the run has at most
    `settings.check_up_to` prompts, `UserError` is also raised if the cache lacks one of them.
    """
    backbone = module.backbone
    most_bytes = int(settings.remember_megabytes * 1e6)
    generated = {type(callback).__name__: callback.prompts for callback in callbacks if hasattr(callback, "prompts")}
    sets = {"training": data.train, "validation": data.val, **generated}
    if settings.folder is not None:
        cache = StoredText(settings.folder, backbone.text_fingerprint)
        cache.require(sets, settings.check_up_to)
        backbone.use_text_cache(cache)
    elif settings.encode_ahead is not None:
        coming = partial(_coming, data, module, settings.encode_ahead)
        backbone.use_text_memory(TextAhead(backbone.encode_prompts, coming, backbone.text_encoders, most_bytes))
    elif sum(map(len, sets.values())) <= settings.remember_up_to and settings.remember_megabytes:
        prompts = [prompts[number] for prompts in sets.values() for number in range(len(prompts))]
        backbone.use_text_memory(RememberedText(backbone.encode_prompts, prompts, most_bytes))


def _coming(data: PromptDataModule, module: "CDMModule", count: int) -> list[list[str]]:
    return data.coming(module.iteration, count, module.compute.accumulate)


def use_image_cache(settings: ImageCacheSettings, backbone: Backbone) -> None:
    """Let `backbone` take the latents of real images from the cache in `settings.folder`.

    An image that is not in the cache is encoded, and its latent is added to the cache. If `settings.folder` is None,
    every image is encoded each time that it is used.
    """
    if settings.folder is not None:
        stored = StoredLatents(settings.folder, settings.dtype, codec_of(backbone), backbone.encode_images)
        backbone.encode_images = stored.encode  # the instance attribute hides the method of the class


def codec_of(backbone: Backbone) -> str:
    """Return a string that identifies how `backbone` encodes images.

    The string contains the name of the backbone's class. If the backbone is a diffusers pipeline, the string also
    contains a hash of the files of the pipeline's VAE. Raises `UserError` if the VAE of a pipeline has no files.
    """
    from cdm_lightning.backbones.pipeline_folder import hash_part  # imports diffusers, which takes seconds
    from cdm_lightning.backbones.pipeline_settings import PipelineSettings

    name = type(backbone).__qualname__
    return f"{name} {hash_part(backbone.folder / 'vae')}" if isinstance(backbone, PipelineSettings) else name
