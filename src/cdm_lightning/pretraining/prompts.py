"""Stage 0 of `cdm_lightning.pretrain`: the caption files of the shapes set, for training and for held-out evaluation.

The shapes set is this package's procedural data set of captioned shapes (`data.shapes`).
"""

from pathlib import Path

from cdm_lightning.data.shapes import draw_scenes
from cdm_lightning.kinds import Count, Seed, Share


def write_prompts(folder: Path, train: Count, heldout: Count, pairs: Share, seed: Seed) -> None:
    """Write `shapes_train.txt` with `train` captions and `shapes_heldout.txt` with `heldout` captions into `folder`, one per line.

    They depend on `seed` only, and about the share `pairs` of them describes two shapes. The held-out captions describe
    combinations that no training caption has (`data.shapes.Scene.held_out`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("heldout", heldout)):
        captions = [scene.caption for scene in draw_scenes(count, seed + 3000, split, pairs=pairs)]
        (folder / f"shapes_{split}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
