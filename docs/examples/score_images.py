"""Scores the images of an evaluation by a scorer that needs an environment of its own, for `evaluate --scores`.

    python score_images.py hpsv3 outputs/evaluation/images hpsv3.jsonl
    python score_images.py imagereward outputs/evaluation/images imagereward.jsonl

Copy this file into the other environment: it needs nothing but the scorer. docs/other-scorers.md says how to install each. The
first argument after the scorer is the folder `images` that `--save-images` has written, or the folder of one sampler in it. If
the script is stopped, the same command goes on where it was. A scorer of your own is one more function in `SCORERS`.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Scorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # (prompts, paths of their images) -> scores
COPIED = ("model", "prompt_index", "prompt", "seed", "images")  # from the manifest, so that `evaluate` can compare them


def hpsv3() -> Scorer:
    """HPSv3 (Ma et al., arXiv:2508.03789). The model gives a mean and a spread for each image; the mean is the score."""
    import torch
    from hpsv3 import HPSv3RewardInferencer

    scorer = HPSv3RewardInferencer(device="cuda" if torch.cuda.is_available() else "cpu")

    def score(prompts: Sequence[str], paths: Sequence[str]) -> list[float]:
        with torch.inference_mode():
            found = scorer.reward(prompts=list(prompts), image_paths=list(paths))
        return [float(one[0]) for one in found]

    return score


def imagereward() -> Scorer:
    """ImageReward (Xu et al., arXiv:2304.05977)."""
    import ImageReward
    import torch

    scorer = ImageReward.load("ImageReward-v1.0").eval()

    def score(prompts: Sequence[str], paths: Sequence[str]) -> list[float]:
        with torch.inference_mode():
            return [float(scorer.score(prompt, path)) for prompt, path in zip(prompts, paths)]

    return score


SCORERS: dict[str, Callable[[], Scorer]] = {"hpsv3": hpsv3, "imagereward": imagereward}


def entries(images: Path) -> Iterator[tuple[dict, Path]]:
    """Yield each image's line of the manifest, and its path, of all samplers in the folder `images`, or of one sampler."""
    manifests = sorted([*images.glob("manifest.jsonl"), *images.glob("*/manifest.jsonl")])
    if not manifests:
        raise SystemExit(f"{images} has no manifest.jsonl; pass the folder that `evaluate --save-images` has written")
    for manifest in manifests:
        with manifest.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                yield entry, manifest.parent / Path(entry["file"]).name


def known(output: Path) -> list[dict]:
    """Return the whole lines of an earlier call that was stopped."""
    if not output.exists():
        return []
    lines = output.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # the last one may be cut


def place(entry: dict) -> tuple:
    """Return what tells an image from all others."""
    return entry["model"], entry["prompt_index"], entry.get("images")


def score_images(name: str, images: Path, output: Path, batch: int) -> None:
    """Write a line with the score of each image into `output`, which is a .jsonl file."""
    every = list(entries(images))
    wanted = {place(entry) for entry, _ in every}
    done = [row for row in known(output) if place(row) in wanted and name in row]
    seen = {place(row) for row in done}
    left = [(entry, path) for entry, path in every if place(entry) not in seen]
    scorer = SCORERS[name]() if left else None
    with output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in done)
        for start in range(0, len(left), batch):
            part = left[start : start + batch]
            scores = scorer([entry["prompt"] for entry, _ in part], [str(path) for _, path in part])
            for (entry, _), score in zip(part, scores, strict=True):
                row = {key: entry[key] for key in COPIED if key in entry} | {name: score}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{len(done) + start + len(part)} of {len(every)} images", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("scorer", choices=SCORERS)
    made.add_argument("images", type=Path, help="the folder that --save-images has written")
    made.add_argument("output", type=Path, help="a .jsonl file, for --scores of evaluate")
    made.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the images that the command line names."""
    given = parser().parse_args(arguments)
    score_images(given.scorer, given.images, given.output, given.batch)


if __name__ == "__main__":
    main()
