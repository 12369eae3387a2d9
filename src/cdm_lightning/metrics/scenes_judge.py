"""A small classifier that decides whether a picture of the storybook scenes shows what its caption says.

The storybook scenes are this package's procedural data set of captioned drawings (see `data.scenes`). The classifier is
trained on these drawings and not on generated pictures. Its features also serve to compute the Fréchet distance.
"""

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cdm_lightning.data.scenes.grammar import COLOURS, NOUNS, PLACES, SETTINGS, SIZES, Scene, parse_caption
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, require_regular
from cdm_lightning.kinds import FileToRead

ARRANGEMENTS = ("single", "side by side", "one in front")
SLOTS = (0, 1)  # the only, left or front thing; the right one or the one behind
OF_A_THING = {"noun": NOUNS, "colour": COLOURS, "size": tuple(SIZES)}
HEADS: dict[str, Sequence[str]] = {
    "arrangement": ARRANGEMENTS,
    "place": tuple(PLACES),
    "setting": tuple(SETTINGS),
    **{f"{what}_{slot}": names for slot in SLOTS for what, names in OF_A_THING.items()},
}
FEATURES = 128


class ScenesJudge(nn.Module):
    """A convolutional classifier of pictures (N, 3, 64, 64) of the storybook scenes.

    The classifier predicts the arrangement, the place and the setting of the scene, and the noun, colour and size of
    each of up to two things in it. Each prediction has a linear head of its own; `HEADS` holds the class names of each
    head.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 24, 48, 64, 96, 96), (2, 1, 2, 2, 2)
        layers: list[nn.Module] = []
        for inside, outside, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(8, outside), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(classes)) for name, classes in HEADS.items()})

    def features(self, images: Tensor) -> Tensor:
        """Return the features (N, 128) of pictures (N, 3, 64, 64) in [0, 1], for use in a Fréchet distance."""
        return self.trunk(images * 2 - 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (N, classes) of each head, by the head's name, for pictures (N, 3, 64, 64) in [0, 1]."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @classmethod
    def load(cls, path: FileToRead) -> "ScenesJudge":
        """Return the judge whose weights are in the safetensors file `path`, in eval mode and frozen.

        Raises `UserError` if the file is missing or does not hold the weights of a `ScenesJudge`.
        """
        model = cls()
        try:
            model.load_state_dict({name: tensor.float() for name, tensor in load_file(require_regular(path)).items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{path}: the judge of scenes cannot be loaded ({first_line(error)}); pass a file that cdm_lightning.pretrain wrote"
            ) from None
        return model.eval().requires_grad_(False)

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is not a caption of the storybook scenes."""
        parse_caption(prompt)

    @torch.no_grad()
    def adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return for each picture (N, 3, 64, 64) in [0, 1] whether it shows everything that its prompt says: (N,) bool.

        Raises ValueError for a prompt that is not a caption of the storybook scenes.
        """
        return self.agreement(images, [expected(parse_caption(prompt)) for prompt in prompts])

    @torch.no_grad()
    def agreement(self, images: Tensor, wanted: Sequence[dict[str, int]]) -> Tensor:
        """Return for each picture (N, 3, 64, 64) in [0, 1] whether the judge predicts the wanted classes: (N,) bool.

        `wanted` has one dictionary for each picture. It maps a head's name to the number of the wanted class. A head
        that is not in the dictionary may predict any class.
        """
        device = next(self.parameters()).device
        chunks = [self(chunk.to(device)) for chunk in images.split(256)]
        seen = {name: torch.cat([chunk[name].argmax(1) for chunk in chunks]).tolist() for name in HEADS}
        return torch.tensor(
            [all(seen[name][i] == value for name, value in want.items()) for i, want in enumerate(wanted)]
        )


def expected(scene: Scene) -> dict[str, int]:
    """Return a dictionary from each head's name to the number of the class that the head should predict for `scene`.

    Heads for attributes that the scene does not have are left out.
    """
    classes: dict[str, int] = {"arrangement": 0}
    if scene.relation:
        classes["arrangement"] = 1 if scene.relation in ("left of", "right of") else 2
    for name, value in (("place", scene.place), ("setting", scene.setting)):
        if value is not None:
            classes[name] = HEADS[name].index(value)
    things = scene.things[::-1] if scene.relation in ("right of", "behind") else scene.things
    for slot, thing in enumerate(things):
        for what in OF_A_THING:
            value = getattr(thing, what)
            if value is not None:
                classes[f"{what}_{slot}"] = HEADS[f"{what}_{slot}"].index(value)
    return classes
