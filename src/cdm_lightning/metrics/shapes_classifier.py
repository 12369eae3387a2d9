"""A small classifier that decides whether an image of the shapes set shows what its caption says.

The shapes set is this package's procedural data set of captioned shapes (see `data.shapes`). The classifier is trained
on renderings of this set and not on generated images.
"""

from collections.abc import Sequence
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cdm_lightning.data.shapes import COLOURS, PLACES, SHAPES, SIZES, Item, Scene, parse_caption
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line
from cdm_lightning.kinds import FileToRead

ARRANGEMENTS = ("single", "one above the other", "side by side")
HEADS = {
    "arrangement": len(ARRANGEMENTS),
    "place": len(PLACES),
    **{
        f"{what}_{slot}": n
        for slot in (0, 1)
        for what, n in (("colour", len(COLOURS)), ("shape", len(SHAPES)), ("size", len(SIZES)))
    },
}


class ShapesClassifier(nn.Module):
    """A convolutional classifier of images (N, 3, 32, 32) of the shapes set.

    The classifier predicts the arrangement of the shapes, the place of a shape that is alone, and the colour, shape and
    size of each of up to two shapes (the upper or left one first). Each prediction has a linear head of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 32, 32, 64, 64), (1, 2, 2, 2)
        layers: list[nn.Module] = []
        for inside, outside, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(8, outside), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, classes) for name, classes in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (N, classes) of each head, by the head's name, for images (N, 3, 32, 32) in [0, 1]."""
        features = self.features(images * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}

    @classmethod
    def load(cls, path: FileToRead) -> "ShapesClassifier":
        """Return the classifier whose weights are in the safetensors file `path`, in eval mode and frozen.

        Raises `UserError` if the file is missing or does not hold the weights of a `ShapesClassifier`.
        """
        model = cls()
        try:
            model.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(
                f"{path}: the shapes classifier cannot be loaded ({reason}); pass a file that cdm_lightning.pretrain wrote"
            ) from None
        return model.eval().requires_grad_(False)

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is not a caption of the shapes set."""
        parse_caption(prompt)

    @torch.no_grad()
    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return for each image (N, 3, 32, 32) in [0, 1] whether it shows everything that its prompt says: (N,) bool.

        Raises ValueError for a prompt that is not a caption of the shapes set.
        """
        device = next(self.parameters()).device
        chunks = [self(chunk.to(device)) for chunk in images.split(512)]
        seen = {name: torch.cat([chunk[name].argmax(1) for chunk in chunks]).tolist() for name in HEADS}
        wanted = [expected(parse_caption(prompt)) for prompt in prompts]
        return torch.tensor(
            [all(seen[name][i] == value for name, value in want.items()) for i, want in enumerate(wanted)]
        )


def expected(scene: Scene) -> dict[str, int]:
    """Return a dictionary from each head's name to the number of the class that the head should predict for `scene`.

    Heads for attributes that the scene's caption does not mention are left out.
    """
    if scene.relation is None:
        place = {} if scene.place is None else {"place": list(PLACES).index(scene.place)}
        return {"arrangement": 0, **place, **_item(scene, 0)}
    upright, turned = scene.relation in ("above", "below"), scene.relation in ("below", "right of")
    return {"arrangement": 1 if upright else 2, **_item(scene, 0, turned), **_item(scene, 1, turned)}


def _item(scene: Scene, slot: int, turned: bool = False) -> dict[str, int]:
    item = cast(Item, (scene.first, scene.second)[slot ^ turned])
    said = (("colour", item.colour, COLOURS), ("shape", item.shape, SHAPES), ("size", item.size, SIZES))
    return {f"{what}_{slot}": list(names).index(name) for what, name, names in said if name is not None}
