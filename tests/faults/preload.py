"""What the commands import only when they need it, for the server that forks the cases."""

import importlib

LAZY = (
    "cdm_lightning.backbones.families",
    "cdm_lightning.backbones.lora_file",
    "cdm_lightning.backbones.transformer_files",
    "cdm_lightning.callbacks.ladder",
    "cdm_lightning.callbacks.metrics",
    "cdm_lightning.callbacks.progress",
    "cdm_lightning.callbacks.sample_grid",
    "cdm_lightning.callbacks.throughput",
    "cdm_lightning.checkpoint.single_file",
    "cdm_lightning.data.columns",
    "cdm_lightning.data.mixture",
    "cdm_lightning.data.text_cache",
    "cdm_lightning.data.text_shards",
    "cdm_lightning.evaluation.pictures",
    "cdm_lightning.lora.extract",
    "cdm_lightning.lora.fuse",
    "cdm_lightning.metrics.energy",
    "cdm_lightning.objectives.cdm",
    "cdm_lightning.planning.advice",
    "cdm_lightning.planning.recipe",
    "cdm_lightning.run.student",
    "diffusers.loaders.lora_pipeline",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.guiders",
    "diffusers.utils.dummy_pt_objects",
    "lightning.pytorch.loggers",
    "matplotlib.figure",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
for name in LAZY:
    try:
        importlib.import_module(name)
    except ImportError:  # it has moved: the cases import it themselves
        continue
