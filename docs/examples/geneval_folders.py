"""Arranges the images of evaluations as GenEval reads them, and turns its results into a file for `evaluate --scores`.

    python geneval_folders.py write evaluation_metadata.jsonl geneval_images out0/images/SAMPLER out1/images/SAMPLER ...
    python geneval_folders.py scores results.jsonl out0/images/SAMPLER geneval.jsonl

`write` makes geneval_images/00000/metadata.jsonl and geneval_images/00000/samples/0000.png, 0001.png, ...: one folder for each
line of evaluation_metadata.jsonl, and one sample from each of the folders of images, which are of other seeds. `scores` gives
each prompt the share of its samples that GenEval calls correct. It needs nothing but Python. See docs/other-scorers.md.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path


def objects(path: Path) -> list[dict]:
    """Return the objects on the lines of a file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def manifest(images: Path) -> dict[int, dict]:
    """Return the manifest of a sampler's images by the prompt's index."""
    if not (images / "manifest.jsonl").is_file():
        raise SystemExit(
            f"{images} has no manifest.jsonl; pass the folder of one sampler that --save-images has written"
        )
    return {entry["prompt_index"]: entry for entry in objects(images / "manifest.jsonl")}


def write(metadata: Path, output: Path, folders: list[Path]) -> None:
    """Copy the images of all `folders` into the new folder `output`, in GenEval's layout."""
    if output.exists():
        raise SystemExit(f"{output} exists; pass a new folder, because GenEval would also count the images in it")
    prompts, found = objects(metadata), [manifest(folder) for folder in folders]
    for folder, entries in zip(folders, found):
        for index, prompt in enumerate(prompts):
            if index not in entries or entries[index]["prompt"].strip() != prompt["prompt"].strip():
                raise SystemExit(
                    f"{folder} has no image for line {index + 1} of {metadata}; evaluate it with --prompts {metadata} "
                    f"--count {len(prompts)} --save-images"
                )
    for index, prompt in enumerate(prompts):
        samples = output / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt), encoding="utf-8")
        for number, (folder, entries) in enumerate(zip(folders, found)):
            shutil.copyfile(folder / Path(entries[index]["file"]).name, samples / f"{number:04d}.png")


def scores(results: Path, folder: Path, output: Path) -> None:
    """Write the share of correct samples of each prompt, as the score of the image in `folder`."""
    correct: dict[int, list[bool]] = {}
    for row in objects(results):
        correct.setdefault(int(Path(row["filename"]).parts[-3]), []).append(bool(row["correct"]))
    with output.open("w", encoding="utf-8") as file:
        for index, entry in sorted(manifest(folder).items()):
            if index not in correct:
                raise SystemExit(f"{results} has no result for prompt {index}; run GenEval on all images")
            row = {key: entry[key] for key in ("model", "prompt_index", "prompt", "seed", "images") if key in entry}
            share = sum(correct[index]) / len(correct[index])
            file.write(json.dumps(row | {"geneval": share}, ensure_ascii=False) + "\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    command = commands.add_parser("write")
    command.add_argument("metadata", type=Path, help="GenEval's prompts/evaluation_metadata.jsonl")
    command.add_argument("output", type=Path, help="a new folder")
    command.add_argument("folders", type=Path, nargs="+", help="folders of images of one sampler, of different seeds")
    command = commands.add_parser("scores")
    command.add_argument("results", type=Path, help="what GenEval's evaluate_images.py has written")
    command.add_argument("folder", type=Path, help="the sampler's images in the evaluation that gets the scores")
    command.add_argument("output", type=Path, help="a .jsonl file, for --scores of evaluate")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out one of the commands."""
    given = parser().parse_args(arguments)
    if given.command == "write":
        write(given.metadata, given.output, given.folders)
    else:
        scores(given.results, given.folder, given.output)


if __name__ == "__main__":
    main()
