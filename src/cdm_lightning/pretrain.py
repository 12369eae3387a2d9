"""`python -m cdm_lightning.pretrain experiment=NAME`: train small pipelines from scratch.

NAME is `tiny_sd3_teacher` for the bundled 32-pixel pipeline, or `storybook_teacher` for the 64-pixel pipeline of the
storybook scenes. The command runs in stages. One stage writes the prompts. Each other stage trains a part of the
pipeline, or a network that judges the pipeline's images.
"""

import difflib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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

TOP: dict[str, Any] = {
    "output": FolderToWrite,
    "work_dir": FolderToWrite,
    "bundle": Literal["tiny_sd3", "storybook"],
    "stages": list[str],  # refined by the bundle
    "threads": Count | None,
    "seed": Seed,
}


@dataclass(frozen=True)
class Bundle:
    """The options that the configuration has for one pipeline. The option `bundle` selects the pipeline.

    The attribute `stages` is the type of the option `stages`. `learned` names the stages that train a network; for each
    of these stages there is an option group `recipe.STAGE`. Some options at the top of the configuration exist for this
    pipeline only; `top` maps their names to the types of their values. `arguments` maps an option group to the name of
    a function in the package `pretraining`. The options of the group are arguments of this function, and the function's
    annotations say which values are allowed.
    """

    stages: Any
    learned: tuple[str, ...]
    top: dict[str, Any]
    arguments: dict[str, str]


BUNDLES = {
    "tiny_sd3": Bundle(
        list[Literal["prompts", "vae", "teacher", "classifier", "clip"]],
        ("vae", "teacher", "classifier", "clip"),
        {"earlier": FileOrFolder | None, "vae_pool": Count, "scorer_pool": Count},
        {
            "prompts": "prompts.write_prompts",
            "pipeline": "tiny_sd3.build_pipeline",
            "teacher": "teacher.train_teacher",
        },
    ),
    "storybook": Bundle(
        list[Literal["prompts", "judge", "vae", "teacher"]],
        ("judge", "vae", "teacher"),
        {"measured": Count},
        {
            "prompts": "storybook.write_scene_prompts",
            "judge": "judge.train_judge",
            "pipeline": "storybook.build_storybook",
            "vae": "storybook.train_storybook_vae",
            "teacher": "storybook.train_storybook_teacher",
        },
    ),
}


def pretrain(cfg: DictConfig) -> Path:
    """Run the stages in `cfg.stages`, write the results into `cfg.output` and return this folder.

    If an earlier run of the command ended within a stage, this stage continues from its state in `cfg.work_dir`. Raises
    UserError for an option that is not allowed, and if `cfg.output` is a file.
    """
    check_options(cfg)
    import torch

    from cdm_lightning.pretraining.loop import Recipe

    output = Path(cfg.output)
    if output.is_file():
        raise UserError(f"output={output} is a file; give a folder")
    torch.set_num_threads(cfg.threads or os.cpu_count() or 1)
    output.mkdir(parents=True, exist_ok=True)

    def recipe(stage: str) -> Recipe:
        settings = cast(dict[str, Any], OmegaConf.to_container(cfg.recipe[stage]))
        settings |= {"betas": tuple(cfg.recipe[stage].betas), "seed": cfg.seed}
        return Recipe(**settings)

    {"tiny_sd3": make_tiny_sd3, "storybook": make_storybook}[cfg.bundle](cfg, recipe, output, Path(cfg.work_dir))
    print(f"assets written to {output}")
    return output


def make_tiny_sd3(cfg: DictConfig, recipe: Callable[[str], Any], output: Path, work: Path) -> None:
    """Run the stages in `cfg.stages` for the 32-pixel pipeline, and write the results into `output`.

    The stages are prompts, vae, teacher, classifier and clip. `recipe(stage)` returns the training settings of a stage.
    Each training saves its state in the folder `work`, from which an interrupted training resumes.
    """
    from cdm_lightning.pretraining import prompts, scorers, teacher, tiny_sd3, vae

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
        save_pipeline(pipeline, output / "tiny_sd3", [pipeline.transformer])


def make_storybook(cfg: DictConfig, recipe: Callable[[str], Any], output: Path, work: Path) -> None:
    """Run the stages in `cfg.stages` for the 64-pixel pipeline, and write the results into `output`.

    The stages are prompts, judge, vae and teacher. `recipe(stage)` returns the training settings of a stage. Each
    training saves its state in the folder `work`, from which an interrupted training resumes. The results of
    `measure_judge` and `measure_vae` are written to `storybook_judge.json` and `storybook_vae.json`.
    """
    from cdm_lightning.pretraining import judge, storybook

    if "prompts" in cfg.stages:
        storybook.write_scene_prompts(output / "prompts", **cfg.prompts, seed=cfg.seed)
    figures, its_judge = {}, output / "scenes_judge.safetensors"
    if "judge" in cfg.stages:
        judge.train_judge(recipe("judge"), work, its_judge, **cfg.judge)
        figures["judge"] = judge.measure_judge(judge.ScenesJudge.load(its_judge), cfg.measured)
    if "vae" in cfg.stages or "teacher" in cfg.stages:
        pipeline = storybook.build_storybook(cfg.seed, **cfg.pipeline)
        storybook.train_storybook_vae(pipeline.vae, recipe("vae"), work, **cfg.vae)
        if "vae" in cfg.stages:
            known = judge.ScenesJudge.load(its_judge) if its_judge.is_file() else None
            figures["vae"] = judge.measure_vae(pipeline.vae, known, cfg.measured)
        if "teacher" in cfg.stages:
            storybook.train_storybook_teacher(pipeline, recipe("teacher"), work, **cfg.teacher)
        save_pipeline(pipeline, output / "storybook_sd3", [pipeline.transformer, pipeline.vae])
    for stage, values in figures.items():
        print(stage, ", ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)
        (output / f"storybook_{stage}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_options(cfg: DictConfig) -> None:
    """Raise UserError for the first option that is missing, unknown, or has a value that is not allowed."""
    check_value(cfg.get("bundle"), TOP["bundle"], "bundle")
    bundle = BUNDLES[cfg.bundle]
    top = {**TOP, "stages": bundle.stages, **bundle.top}
    arguments = {**bundle.arguments, **{f"recipe.{stage}": "loop.Recipe" for stage in bundle.learned}}
    _require_known(cfg, (*top, *(key.partition(".")[0] for key in arguments)), "")
    if isinstance(recipes := cfg.get("recipe"), DictConfig):
        _require_known(recipes, bundle.learned, "recipe.")
    for key, kind in top.items():
        if key not in cfg:
            raise UserError(f"{key} is missing in the configuration; remove ~{key} from the command line")
        check_value(cfg[key], kind, key)
    for key, called in arguments.items():
        options = OmegaConf.select(cfg, key)
        if not isinstance(options, DictConfig):
            raise UserError(f"{key}={options} must be a mapping; see conf/experiment/{cfg.bundle}_teacher.yaml")
        options = cast(dict[str, Any], OmegaConf.to_container(options))
        check_arguments(OmegaConf.create({**options, "_target_": f"cdm_lightning.pretraining.{called}"}), key)


def _require_known(node: DictConfig, known: Collection[str], prefix: str) -> None:
    for key in map(str, node):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"the options are: {', '.join(dict.fromkeys(known))}"
            raise UserError(f"{prefix}{key} is no option of pretrain; {hint}{where_set(f'{prefix}{key}')}")


def save_pipeline(pipeline: Any, folder: Path, halved: Sequence[Any]) -> None:
    """Write the pipeline into `folder` as diffusers does, completely or not at all.

    The networks in `halved` are converted to half precision, in place, to save space. diffusers converts them back to
    float32 when it loads them. `halved` must not contain text encoders, because transformers would leave them in half
    precision.
    """
    import torch

    for network in halved:
        network.to(torch.float16)
    with replacing_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)


def main() -> None:
    """Run the stages that the command line names.

    A user's mistake is printed in one line on stderr, and the exit status is 2.
    """
    run_cli(pretrain, "pretrain", "before all stages were complete")


if __name__ == "__main__":
    main()
