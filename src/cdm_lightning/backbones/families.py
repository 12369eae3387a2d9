"""The backbone of each supported class of diffusers pipelines, and the function that opens a pipeline."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_lightning.backbones.pipeline_folder import pipeline_class_name
from cdm_lightning.backbones.student_folder import read_call
from cdm_lightning.errors import UserError

if TYPE_CHECKING:
    from cdm_lightning.backbones.diffusers_pipeline import PipelineBackbone

FAMILIES = {  # imported when needed: each imports its own classes of diffusers and transformers
    "StableDiffusion3Pipeline": ("sd3", "SD3Backbone"),
    "LongCatImagePipeline": ("longcat", "LongCatBackbone"),
    "FluxPipeline": ("flux", "FluxBackbone"),
    "QwenImagePipeline": ("qwen_image", "QwenImageBackbone"),
    "SanaPipeline": ("sana", "SanaBackbone"),
    "ZImagePipeline": ("z_image", "ZImageBackbone"),
}
# All backbones of the package, which may be built from the folder of a run.
BACKBONES = frozenset(f"cdm_lightning.backbones.{module}.{name}" for module, name in FAMILIES.values()) | {
    "cdm_lightning.backbones.toy2d.Toy2DBackbone"
}


def is_known(pretrained: str, revision: str | None = None) -> bool:
    """Return whether a pipeline folder, or a hub id at `revision`, is of a class that has a backbone.

    Raises `UserError` if there is no pipeline.
    """
    return pipeline_class_name(pretrained, revision) in FAMILIES


def open_pipeline(
    pretrained: str, revision: str | None = None, lora: str | None = None
) -> "tuple[PipelineBackbone, dict[str, Any]]":
    """Return the backbone for a pipeline, and the arguments with which to call the pipeline in addition to the prompt.

    `pretrained` is a pipeline folder, or a hub id at `revision`. For an exported student, the arguments are those that
    the export stored, such as "num_inference_steps". For another pipeline, they are {}.

    `lora` is a LoRA file, or the folder of an exported LoRA. If it is given, the LoRA is fused into the network, and
    the arguments are those stored in the LoRA's folder, or {} for a LoRA file.

    The backbone takes its image size and text length from the arguments. Raises `UserError` for a pipeline of an
    unknown family.
    """
    found = pipeline_class_name(pretrained, revision)
    if found not in FAMILIES:
        raise UserError(
            f"{pretrained} is a {found}, which is not supported; pass a pipeline of one of these classes: {', '.join(FAMILIES)}"
        )
    module, name = FAMILIES[found]
    family = getattr(import_module(f"cdm_lightning.backbones.{module}"), name)
    call = read_call(family(pretrained, revision).folder if lora is None else Path(lora))
    return family(pretrained, revision, teacher_lora=lora, **family.settings_of(call)), call
