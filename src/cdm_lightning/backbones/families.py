"""Which backbone reads which pipeline: the one list of families, by the class that a pipeline's index names."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_lightning.backbones.pipeline_folder import pipeline_class_name
from cdm_lightning.backbones.student_folder import read_call
from cdm_lightning.errors import UserError

if TYPE_CHECKING:
    from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone

FAMILIES = {  # imported when needed: each brings its own classes of diffusers and transformers
    "StableDiffusion3Pipeline": ("sd3", "SD3Backbone"),
    "LongCatImagePipeline": ("longcat", "LongCatBackbone"),
    "FluxPipeline": ("flux", "FluxBackbone"),
    "QwenImagePipeline": ("qwen_image", "QwenImageBackbone"),
    "SanaPipeline": ("sana", "SanaBackbone"),
    "ZImagePipeline": ("z_image", "ZImageBackbone"),
}


def open_pipeline(
    pretrained: str, revision: str | None = None, lora: str | None = None
) -> "tuple[PipelineBackbone, dict[str, Any]]":
    """The backbone of a pipeline folder or hub id, in the sizes of an exported student, and the arguments of its call.

    With `lora`, a LoRA file or an exported LoRA, that is fused in, and the call is the one of its export. The arguments are
    empty where nothing was exported. UserError for a pipeline of no known family.
    """
    found = pipeline_class_name(pretrained, revision)
    if found not in FAMILIES:
        raise UserError(f"{pretrained} holds a {found}, which no backbone reads; there are {', '.join(FAMILIES)}")
    module, name = FAMILIES[found]
    family = getattr(import_module(f"cdm_lightning.backbones.{module}"), name)
    call = read_call(family(pretrained, revision).folder if lora is None else Path(lora))
    return family(pretrained, revision, teacher_lora=lora, **family.settings_of(call)), call
