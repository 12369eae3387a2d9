"""Stage 0 of `cdm_lightning.pretrain`: write the captions of the shapes set, for training and for evaluation.

The shapes set is a data set of captioned shapes that this package draws (`data.shapes`).
"""

from pathlib import Path

from cdm_lightning.data.shapes import draw_scenes
from cdm_lightning.kinds import Count, Seed, Share


def write_prompts(folder: Path, train: Count, heldout: Count, pairs: Share, seed: Seed) -> None:
    """Write `train` captions to `shapes_train.txt` and `heldout` captions to `shapes_heldout.txt`, in `folder`, one per line.

    The captions depend on `seed` only. A caption describes two shapes with probability `pairs`. The held-out captions describe
    combinations that no training caption has (`data.shapes.Scene.held_out`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("heldout", heldout)):
        captions = [scene.caption for scene in draw_scenes(count, seed + 3000, split, pairs=pairs)]
        (folder / f"shapes_{split}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
