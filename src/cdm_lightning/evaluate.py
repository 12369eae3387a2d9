"""`python -m cdm_lightning.evaluate --model FOLDER ... --prompts FILE`: measure models on the same prompts and noise.

Each `--model` is a run, a checkpoint, an exported student, a pipeline folder or a hub id. The words after it set
numbers of steps, guidance scales and shifts. The model is measured at each combination of them, called a sampler:

  python -m cdm_lightning.evaluate --prompts prompts.txt --metric colour \\
      --model my_student steps=1,2,4,8 --model TEACHER name=teacher steps=4,50 guidance=1,1.5

One sampler is the baseline. The figures, and their differences from the baseline's figures, get 95 % confidence
intervals, which are computed by resampling the prompts. If the command was stopped, run the same command again: it
measures only the samplers that are missing.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from cdm_lightning.ends import signals

if __name__ == "__main__":  # before the imports below, because they take seconds
    signals.watch()

from cdm_lightning.config import command, conf_dir, process_number
from cdm_lightning.distributed.launch import is_launched, launch
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import BatchSize, FileOrFolder, Name, Seed, Several
from cdm_lightning.kinds.command_line import Parser, argument
from cdm_lightning.run.folder import is_run
from cdm_lightning.run.model_words import command_words, read_model, read_prompts
from cdm_lightning.terminal.quiet import quiet_libraries

if TYPE_CHECKING:  # these take seconds to import: --help and error messages should not wait for them
    from cdm_lightning.evaluation.grid import ModelGrid
    from cdm_lightning.evaluation.protocol import Evaluated
    from cdm_lightning.evaluation.samplers import SamplerSpec
    from cdm_lightning.metrics.suite import MetricSuite

KINDS = {
    "file": FileOrFolder,
    "name": Name,
    "count": Several,
    "seed": Seed,
    "batch": BatchSize,
    "resamples": Annotated[int, Ge(20), Le(10**6)],
    "processes": Annotated[int, Ge(1), Le(1024)],
}
UNTIL = "before the evaluation was complete"
MODEL_HELP = (
    "a run, checkpoint, export, pipeline folder, hub id or folder of images, and after it steps=1,2,4 guidance=1,1.5 "
    "shift=trained,uniform,3 name=NAME"
)


def evaluate(
    models: "Sequence[ModelGrid | str | Sequence[str]]",
    prompts: str | Sequence[str],
    output: str | Path,
    metrics: Sequence[str] = ("colour",),
    options: Sequence[str] = (),
    count: int = 512,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "float32",
    resamples: int = 200,
    baseline: str | None = None,
    save_images: bool = False,
    scores: Sequence[str | Path] = (),
) -> "Evaluated":
    """Measure the models at all their combinations of steps, guidance scale and shift, and write the results.

    Each combination is called a sampler. A model is a path or hub id, or a list of the words that the command line
    takes, such as ["my_student", "steps=1,2"]. The results go to the folder `output`. `prompts` are a list, a prompt
    file or the name of a bundled one. The first `count` are used, or all if there are fewer. `metrics` are names of
    files in conf/metric, and `options` are overrides such as "metric.colour.sampler=NAME". The noise of an image
    depends only on `seed` and the index of its prompt. The networks compute on `device` in `dtype`. The intervals are
    computed from `resamples` resamples of the prompts. `baseline` is the name of the sampler to which the others are
    compared; None means the first one. With `save_images`, all images are written as PNG files, with a manifest.
    `scores` are files of scores that another program has computed of these images. If torchrun has started several
    processes, all must call this inside `distributed.ranks.connected`; only the first process writes, and only its result
    has scores and measurements.

    Raises `UserError` for a model, prompt, metric or option that cannot be used, before any image is made.
    """
    words = command_words(locals())
    from cdm_lightning.distributed.devices import choose_device
    from cdm_lightning.evaluation.given_scores import Images, read_scores
    from cdm_lightning.evaluation.protocol import Evaluation, GridEvaluation
    from cdm_lightning.module import COMPUTE_DTYPES
    from cdm_lightning.run.page import save_evaluation_page

    if dtype not in COMPUTE_DTYPES:
        raise UserError(f"--dtype {dtype} must be one of {', '.join(COMPUTE_DTYPES)}")
    place, (suite, settings) = choose_device(device), build_metrics(metrics, options)
    output, grids = check_output(Path(output)), [_as_grid(model) for model in models]
    specs = _samplers(grids, baseline)
    texts = read_prompts(prompts, count) if isinstance(prompts, str) else prompts
    ladder = GridEvaluation(texts, specs, count=count, batch_size=batch_size, seed=seed)
    ladder.check(suite)
    given = read_scores(scores, Images.of(ladder), list(suite.metrics))
    require_writable(output, grids)
    evaluation = Evaluation(ladder, suite, output, place, COMPUTE_DTYPES[dtype], settings, save_images, given)
    return save_evaluation_page(evaluation.run(grids, baseline or specs[0].name, resamples), grids, words)


def _samplers(models: "Sequence[ModelGrid]", baseline: str | None) -> "list[SamplerSpec]":
    """Return the samplers of all models. Raises `UserError` if two have the same name, or none that of `baseline`."""
    from cdm_lightning.evaluation.grid import require_distinct

    require_distinct(models)
    specs = [spec for model in models for spec in model.samplers]
    names = [spec.name for spec in specs]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline!r} must be one of the samplers: {', '.join(map(repr, names))}")
    return specs


def _as_grid(model: "ModelGrid | str | Sequence[str]") -> "ModelGrid":
    words = [model] if isinstance(model, str) else model
    return read_model(words) if isinstance(words, Sequence) else words


def build_metrics(metrics: Sequence[str], options: Sequence[str]) -> "tuple[MetricSuite, dict[str, Any]]":
    """Return the metrics, and everything that determines them: their configuration, and hashes of the files it names.

    The arguments are those of `evaluate`. Raises `UserError` for a metric or option that cannot be used.
    """
    from cdm_lightning.config import build_named, compose
    from cdm_lightning.config.secrets import plain
    from cdm_lightning.metrics.suite import MetricSuite

    check_options(metrics, options)
    config = compose([f"metric=[{','.join(metrics)}]", *options, "output_dir=outputs/unused"])
    suite = MetricSuite(build_named(config, "metric"), build_named(config, "feature"))
    if not suite.metrics:
        raise UserError("no metric is left; leave out the --set that removes it")
    chosen = {name: plain(config)[name] for name in ("metric", "feature")}
    return suite, {**chosen, "files": dict(files_named(chosen))}


def files_named(node: Any) -> Iterator[tuple[str, list]]:
    """Yield (path, sizes and hashes of its files) for each existing path in a configuration, in any depth."""
    from cdm_lightning.run.inputs import describe, files_of

    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from files_named(child)
    elif isinstance(node, str) and os.sep in node:
        path = Path(node.removeprefix("local-dir:"))  # so open_clip writes the folder of a model
        yield from [(str(path), [(name, *describe(file)) for name, file in files_of(path)])] if path.exists() else []


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = Parser(
        prog="python -m cdm_lightning.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = {name: argument(kind) for name, kind in KINDS.items()}
    made.add_argument("--model", action="append", nargs="+", required=True, metavar="FOLDER", help=MODEL_HELP)
    what = "a prompt file, or the name of a bundled one, such as general"
    made.add_argument("--prompts", required=True, type=kinds["file"], metavar="FILE", help=what)
    made.add_argument("--count", type=kinds["count"], default=512, metavar="N", help="prompts (default: 512)")
    what = "metrics: names of files in conf/metric (default: colour)"
    made.add_argument("--metric", nargs="+", type=kinds["name"], default=["colour"], metavar="NAME", help=what)
    what = "an option of a metric, such as metric.colour.sampler=NAME; may be given several times"
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)
    what = "the sampler to which the others are compared (default: the first)"
    made.add_argument("--baseline", type=kinds["name"], metavar="NAME", help=what)
    what = "resamples of the prompts, for the intervals (default: 200)"
    made.add_argument("--resamples", type=kinds["resamples"], default=200, metavar="N", help=what)
    made.add_argument("--seed", type=kinds["seed"], default=0, metavar="N", help="the seed of the noise (default: 0)")
    made.add_argument(
        "--batch-size", type=kinds["batch"], default=16, metavar="N", help="images at a time (default: 16)"
    )
    made.add_argument("--device", type=kinds["name"], default="auto", help="default: CUDA if there is one")
    made.add_argument("--dtype", default="float32", metavar="D", help="of the networks: float32 or bfloat16")
    what = "processes on this machine that share the images, one for each GPU (default: 1)"
    made.add_argument("--processes", type=kinds["processes"], default=1, metavar="N", help=what)
    made.add_argument("--save-images", action="store_true", help="write all images as PNG files, with a manifest")
    what = "tables of scores that another program computed of these images (CSV or JSONL); may be given several times"
    made.add_argument("--scores", nargs="+", action="extend", type=kinds["file"], default=[], metavar="FILE", help=what)
    what = "the folder for the results (default: outputs/evaluation)"
    made.add_argument("--output", type=kinds["file"], default="outputs/evaluation", metavar="FOLDER", help=what)
    return made


def check_output(output: Path) -> Path:
    """Return `output`. Raises `UserError` if `output` is a file, or a run or pipeline, whose own files the results would replace."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; pass a folder")
    if is_run(output) or (output / "model_index.json").exists():
        raise UserError(f"--output {output} holds a run or a model; pass a folder outside, such as outputs/evaluation")
    return output


def check_options(metrics: Sequence[str], options: Sequence[str]) -> None:
    """Raise `UserError` for the name of a metric without a file, and for options of other things than metrics."""
    known = sorted(path.stem for path in (conf_dir() / "metric").glob("*.yaml"))
    for name in metrics:
        if name not in known:
            raise UserError(f"--metric {name} must be one of {', '.join(known)}")
    for option in options:
        key = option.lstrip("+~").partition("=")[0]
        if not key.startswith(("metric.", "feature.")):
            raise UserError(
                f"--set {option} must be an option of a metric, such as metric.NAME.OPTION=VALUE, or of a feature"
            )


def require_writable(output: Path, models: "Sequence[ModelGrid]") -> None:
    """Create the folder `output`. Raises `UserError` if it cannot be written, or lies inside one of the models."""
    import tempfile

    for model in models:
        if output.resolve().is_relative_to(Path(model.model).resolve()) and Path(model.model).exists():
            raise UserError(f"--output {output} lies inside the model {model.model}; pass a folder outside")
    try:
        (output / "measured").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output / "measured"):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); pass another folder") from error


def run(options: argparse.Namespace) -> "Evaluated":
    """Run the evaluation that the parsed command-line arguments `options` describe.

    Raises `UserError` for a mistake, before any image is made.
    """
    from cdm_lightning.distributed.ranks import connected

    check_output(Path(options.output))
    with connected("evaluation"):
        return evaluate(
            options.model,
            options.prompts,
            options.output,
            options.metric,
            options.set,
            options.count,
            options.seed,
            options.batch_size,
            options.device,
            options.dtype,
            options.resamples,
            options.baseline,
            options.save_images,
            options.scores,
        )


def run_started(config: Mapping[str, str]) -> None:
    """Run the evaluation in one of the processes that `--processes` has started.

    `config` has the arguments of the command line as hexadecimal JSON, in which nothing can be an interpolation.
    """
    with command(UNTIL):
        show(run(parser().parse_args(json.loads(bytes.fromhex(config["arguments"])))))


def show(found: "Evaluated") -> None:
    """Print the results, in the first process only."""
    if not process_number():
        print(found.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. If the user made a mistake, print one line about it on stderr and exit with status 2."""
    quiet_libraries()
    with command(UNTIL):
        given = list(sys.argv[1:] if arguments is None else arguments)
        options = parser().parse_args(given)
        if options.processes == 1 or is_launched():
            show(run(options))
            return
        check_output(Path(options.output))
        text = json.dumps({"arguments": json.dumps(given).encode().hex()})  # JSON is YAML
        if status := launch(text, options.processes, "cdm_lightning.evaluate:run_started"):
            sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
