"""Stage 0 of `cdm_lightning.pretrain`: write the captions of the shapes set, for training and for evaluation.

The shapes set is a data set of captioned shapes that this package draws (see `data.shapes`).
"""

from pathlib import Path

from cdm_lightning.data.shapes import draw_scenes
from cdm_lightning.kinds import Count, Seed, Share


def write_prompts(folder: Path, train: Count, heldout: Count, pairs: Share, seed: Seed) -> None:
    """Write captions to the files `shapes_train.txt` and `shapes_heldout.txt` in `folder`, one per line.

    `train` and `heldout` are the numbers of captions in these files. A caption describes two shapes with probability
    `pairs`, and otherwise one. The held-out captions describe combinations of attributes that no training caption has
    (see `data.shapes.Scene.held_out`). All random draws depend on `seed` only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("heldout", heldout)):
        captions = [scene.caption for scene in draw_scenes(count, seed + 3000, split, pairs=pairs)]
        (folder / f"shapes_{split}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
