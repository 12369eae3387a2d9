"""Stage 0: the caption files of the shapes set for training and for held-out evaluation."""

from pathlib import Path

from cdm_lightning.data.shapes import draw_scenes


def write_prompts(folder: Path, train: int, heldout: int, pairs: float, seed: int) -> None:
    """Write `shapes_train.txt` and `shapes_heldout.txt` into `folder`, with one caption per line.

    The captions are drawn in the same way as the teacher's training captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("heldout", heldout)):
        captions = [scene.caption for scene in draw_scenes(count, seed + 3000, split, pairs=pairs)]
        (folder / f"shapes_{split}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
