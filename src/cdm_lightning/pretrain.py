"""`python -m cdm_lightning.pretrain experiment=tiny_sd3_teacher`: train the bundled tiny pipeline and scorers from scratch."""

import os
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from cdm_lightning.config import run_cli
from cdm_lightning.errors import UserError
from cdm_lightning.files import replacing_folder

STAGES = ("prompts", "vae", "teacher", "classifier", "clip")


def pretrain(cfg: DictConfig) -> Path:
    """Run the stages in `cfg.stages` (some of `STAGES`), write the results into `cfg.output` and return this folder.

    An interrupted stage continues where it stopped, from its state in `cfg.work_dir`. Raises UserError for an unknown stage
    and if `cfg.output` is a file.
    """
    import torch

    from cdm_lightning.pretraining import prompts, scorers, teacher, tiny_sd3, vae
    from cdm_lightning.pretraining.loop import Recipe

    unknown = [stage for stage in cfg.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"stages={unknown} is not known; choose among {', '.join(STAGES)}")
    output, work = Path(cfg.output), Path(cfg.work_dir)
    if output.is_file():
        raise UserError(f"output={output} is a file; give a folder")
    torch.set_num_threads(cfg.threads or os.cpu_count() or 1)
    output.mkdir(parents=True, exist_ok=True)

    def recipe(stage: str) -> Recipe:
        settings = cast(dict[str, Any], OmegaConf.to_container(cfg.recipe[stage]))
        settings |= {"betas": tuple(cfg.recipe[stage].betas), "seed": cfg.seed}
        return Recipe(**settings)

    if "prompts" in cfg.stages:
        prompts.write_prompts(output / "prompts", **cfg.prompts, seed=cfg.seed)
    if "classifier" in cfg.stages:
        scorers.train_classifier(recipe("classifier"), work, output / "shapes_classifier.safetensors", cfg.scorer_pool)
    if "clip" in cfg.stages:
        scorers.train_clip(recipe("clip"), work, output / "tiny_clip", cfg.scorer_pool)
    if "vae" in cfg.stages or "teacher" in cfg.stages:
        pipeline = tiny_sd3.build_pipeline(cfg.seed, **cfg.pipeline)
        if cfg.earlier is None:
            vae.train_vae(pipeline.vae, recipe("vae"), work, cfg.vae_pool)
        else:
            tiny_sd3.start_from(pipeline, cfg.earlier)
        if "teacher" in cfg.stages:
            teacher.train_teacher(pipeline, recipe("teacher"), work, **cfg.teacher)
        save_pipeline(pipeline, output / "tiny_sd3")
    print(f"assets written to {output}")
    return output


def save_pipeline(pipeline, folder: Path) -> None:
    """Write the pipeline into `folder` as diffusers does, completely or not at all.

    The transformer, which takes most of the space, is converted to half precision, in place.
    """
    import torch

    pipeline.transformer.to(torch.float16)
    with replacing_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)


def main() -> None:
    """Run the stages that the command line asks for; a user's mistake is one line on stderr, with exit status 2."""
    run_cli(pretrain, "pretrain")


if __name__ == "__main__":
    main()
