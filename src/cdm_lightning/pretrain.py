"""`python -m cdm_lightning.pretrain experiment=tiny_sd3_teacher`: train the bundled tiny pipeline and scorers from scratch."""

import difflib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf

from cdm_lightning.ends import signals

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()

from cdm_lightning.config import run_cli
from cdm_lightning.config.arguments import check_arguments, check_value
from cdm_lightning.config.origin import where_set
from cdm_lightning.errors import UserError
from cdm_lightning.files import replacing_folder
from cdm_lightning.kinds import Count, FileOrFolder, FolderToWrite, Seed

LEARNED = ("vae", "teacher", "classifier", "clip")  # the stages with a recipe
TOP: dict[str, Any] = {
    "output": FolderToWrite,
    "work_dir": FolderToWrite,
    "stages": list[Literal["prompts", "vae", "teacher", "classifier", "clip"]],
    "threads": Count | None,
    "seed": Seed,
    "earlier": FileOrFolder | None,
    "vae_pool": Count,
    "scorer_pool": Count,
}
ARGUMENTS = {  # options that are the arguments of a function or class, whose annotations say what is allowed
    "prompts": "prompts.write_prompts",
    "pipeline": "tiny_sd3.build_pipeline",
    "teacher": "teacher.train_teacher",
    **{f"recipe.{stage}": "loop.Recipe" for stage in LEARNED},
}


def pretrain(cfg: DictConfig) -> Path:
    """Run the stages in `cfg.stages`, write the results into `cfg.output` and return this folder.

    The stages are prompts, vae, teacher, classifier and clip. An interrupted stage continues where it stopped, from its state in
    `cfg.work_dir`. Raises UserError for an option that is not allowed, and if `cfg.output` is a file.
    """
    check_options(cfg)
    import torch

    from cdm_lightning.pretraining import prompts, scorers, teacher, tiny_sd3, vae
    from cdm_lightning.pretraining.loop import Recipe

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


def check_options(cfg: DictConfig) -> None:
    """Raise UserError for the first option that is missing, unknown, or has a value that is not allowed."""
    _require_known(cfg, (*TOP, *(key.partition(".")[0] for key in ARGUMENTS)), "")
    if isinstance(recipes := cfg.get("recipe"), DictConfig):
        _require_known(recipes, LEARNED, "recipe.")
    for key, kind in TOP.items():
        if key not in cfg:
            raise UserError(f"{key} is missing in the configuration; remove ~{key} from the command line")
        check_value(cfg[key], kind, key)
    for key, called in ARGUMENTS.items():
        options = OmegaConf.select(cfg, key)
        if not isinstance(options, DictConfig):
            raise UserError(f"{key}={options} must be a mapping; see conf/experiment/tiny_sd3_teacher.yaml")
        options = cast(dict[str, Any], OmegaConf.to_container(options))
        check_arguments(OmegaConf.create({**options, "_target_": f"cdm_lightning.pretraining.{called}"}), key)


def _require_known(node: DictConfig, known: Collection[str], prefix: str) -> None:
    for key in map(str, node):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"the options are: {', '.join(dict.fromkeys(known))}"
            raise UserError(f"{prefix}{key} is no option of pretrain; {hint}{where_set(f'{prefix}{key}')}")


def save_pipeline(pipeline, folder: Path) -> None:
    """Write the pipeline into `folder` as diffusers does, completely or not at all.

    The transformer takes most of the space and is converted to half precision, in place.
    """
    import torch

    pipeline.transformer.to(torch.float16)
    with replacing_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)


def main() -> None:
    """Run the stages that the command line names. A mistake of the user gives one line on stderr and exit status 2."""
    run_cli(pretrain, "pretrain", "before all stages were complete")


if __name__ == "__main__":
    main()
