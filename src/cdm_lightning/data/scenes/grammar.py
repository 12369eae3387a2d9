"""The captions of the storybook scenes: one or two things with colour, size and place, in a setting.

Examples are "a large red house on the left in the snow", "at night a tiny cat", and "a blue car in front of a big
yellow house". Like a real prompt, a caption may leave out any attribute except the noun. The pictures of one caption
then differ in this attribute.

Some combinations of noun, colour and setting are held out. No training picture shows such a combination, even if the
caption leaves out the colour or the setting.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

NOUNS = (
    "house", "tree", "fish", "boat", "car", "flower", "mushroom", "balloon", "cat", "bird", "cup", "butterfly",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "brown", "black")
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}  # each with its wordings
PLACES = {
    "left": ("on the left", "at the left"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right"),
}
SETTINGS = {
    "meadow": ("in a meadow", "on the grass"),
    "beach": ("on the beach", "by the sea"),
    "night": ("at night", "under the stars"),
    "snow": ("in the snow", "in winter"),
    "desert": ("in the desert", "among the dunes"),
    "sea": ("under the sea", "under water"),
}
RELATIONS = ("left of", "right of", "in front of", "behind")
SETTING_FIRST = 0.25  # probability that a caption names the setting before the things
LEAVE_OUT = 0.3  # probability with which a caption leaves out each attribute; in a pair, of size LEAVE_OUT_IN_PAIRS
LEAVE_OUT_IN_PAIRS = 0.6
HELD_OUT = 10  # one in this many combinations of noun, colour and setting is never trained on
Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class Thing:
    """One thing of a scene. An attribute that the caption leaves out is None."""

    noun: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one thing at a `place`, or two things in a `relation` such as "left of".

    `setting` is the background of the things. `place` and `setting` are keys of PLACES and SETTINGS, or None if the
    caption leaves them out.
    """

    first: Thing
    place: str | None = None
    relation: str | None = None
    second: Thing | None = None
    setting: str | None = None

    @property
    def things(self) -> tuple[Thing, ...]:
        """The one or two things, in the order of the caption."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def held_out(self) -> bool:
        """Whether a thing of the scene has a combination of noun, colour and setting that is kept out of training.

        Whether a combination is kept out depends on a hash of the combination.
        """
        return any(is_held_out(thing.noun, thing.colour, self.setting) for thing in self.things)


def is_held_out(noun: str, colour: str | None, setting: str | None) -> bool:
    """Return whether the combination of `noun`, `colour` and `setting` is kept out of training.

    If `colour` or `setting` is None, the result is False.
    """
    if colour is None or setting is None:
        return False
    digest = hashlib.blake2b(f"{noun}/{colour}/{setting}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def all_words() -> list[str]:
    """Return every word that captions can contain, in a fixed order."""
    wordings = [phrase for table in (SIZES, PLACES, SETTINGS) for phrases in table.values() for phrase in phrases]
    return sorted({word for phrase in [*NOUNS, *COLOURS, *wordings, *RELATIONS, "a an"] for word in phrase.split()})


def count_captions() -> int:
    """Return the number of different captions with one thing. Captions that differ only in wording count separately."""
    ways = [len(NOUNS), len(COLOURS) + 1]
    ways += [1 + sum(map(len, table.values())) for table in (SIZES, PLACES)]
    settings = sum(map(len, SETTINGS.values()))
    one = 1
    for number in ways:
        one *= number
    return one * (1 + 2 * settings)  # a setting is named first or last


def draw_captions(count: int, seed: int, split: Split = "train", pairs: float = 0.0) -> list[str]:
    """Draw `count` random captions. The same arguments give the same captions.

    A caption has two things with probability `pairs`, and otherwise one. With `split` "heldout", every caption names a
    held-out combination of noun, colour and setting. With "train", no caption does. "all" gives captions of
    both kinds.
    """
    rng = random.Random(f"captions/{seed}/{split}")
    captions: list[str] = []
    while len(captions) < count:
        scene = _draw_pair(rng) if rng.random() < pairs else _draw_single(rng)
        if split == "all" or scene.held_out == (split == "heldout"):
            captions.append(word(scene, rng))
    return captions


def _maybe(rng: random.Random, names: Sequence[str] | Mapping[str, object], leave_out: float) -> str | None:
    return None if rng.random() < leave_out else rng.choice(list(names))


def _draw_single(rng: random.Random) -> Scene:
    thing = Thing(rng.choice(NOUNS), _maybe(rng, COLOURS, LEAVE_OUT), _maybe(rng, SIZES, LEAVE_OUT))
    return Scene(thing, _maybe(rng, PLACES, LEAVE_OUT), setting=_maybe(rng, SETTINGS, LEAVE_OUT))


def _draw_pair(rng: random.Random) -> Scene:
    nouns, relation = rng.sample(NOUNS, 2), rng.choice(RELATIONS)
    sizes = {"in front of": ("small", "large"), "behind": ("large", "small")}.get(relation)
    first, second = (
        Thing(
            noun,
            _maybe(rng, COLOURS, LEAVE_OUT),
            _maybe(rng, [sizes[i]] if sizes else SIZES, LEAVE_OUT_IN_PAIRS),
        )
        for i, noun in enumerate(nouns)
    )
    while second.colour is not None and second.colour == first.colour:
        second = replace(second, colour=rng.choice(COLOURS))
    return Scene(first, relation=relation, second=second, setting=_maybe(rng, SETTINGS, LEAVE_OUT))


def word(scene: Scene, rng: random.Random) -> str:
    """Return a caption of `scene` in a wording that `rng` chooses, in lower case without punctuation."""

    def phrase(thing: Thing) -> list[str]:
        size = [rng.choice(SIZES[thing.size])] if thing.size else []
        words = [*size, *([thing.colour] if thing.colour else []), thing.noun]
        return ["an" if words[0][0] in "aeiou" else "a", *words]

    words = phrase(scene.first)
    if scene.relation and scene.second:
        words += [scene.relation, *phrase(scene.second)]
    if scene.place:
        words.append(rng.choice(PLACES[scene.place]))
    if scene.setting:
        setting, first = rng.choice(SETTINGS[scene.setting]), rng.random() < SETTING_FIRST
        words = [setting, *words] if first else [*words, setting]
    return " ".join(words)


def parse_caption(caption: str) -> Scene:
    """Return the scene that `caption` describes. Raises ValueError for a text that is not a caption of the scenes."""
    text, setting = _take(caption, SETTINGS)
    text, place = _take(text, PLACES)
    for relation in RELATIONS:
        if f" {relation} a" in text and place is None:
            first, second = (_parse_thing(part, caption) for part in text.split(f" {relation} ", 1))
            return Scene(first, relation=relation, second=second, setting=setting)
    return Scene(_parse_thing(text, caption), place, setting=setting)


def _take(text: str, table: Mapping[str, Sequence[str]]) -> tuple[str, str | None]:
    """Return the text without a phrase of the table at its beginning or end, and the phrase's key."""
    for key, phrases in table.items():
        for phrase in phrases:
            if text.endswith(f" {phrase}"):
                return text.removesuffix(f" {phrase}"), key
            if table is SETTINGS and text.startswith(f"{phrase} "):
                return text.removeprefix(f"{phrase} "), key
    return text, None


def _parse_thing(phrase: str, caption: str) -> Thing:
    article, *adjectives, noun = phrase.split() if len(phrase.split()) > 1 else ("", "")
    size = None
    if adjectives:
        size = next((key for key, wordings in SIZES.items() if adjectives[0] in wordings), None)
    adjectives = adjectives[1:] if size else adjectives
    colour = adjectives.pop(0) if adjectives and adjectives[0] in COLOURS else None
    if article not in ("a", "an") or adjectives or noun not in NOUNS:
        raise ValueError(f"not a caption of the storybook scenes: {caption!r}")
    return Thing(noun, colour, size)


def complete(scene: Scene, rng: random.Random, split: Split = "all") -> Scene:
    """Return the scene with a random value for every attribute that `scene` leaves out.

    With `split` "train", the result has no held-out combination of noun, colour and setting, and with "heldout" it has
    one. Two things never have the same colour unless `scene` says so. If one thing is in front of the other, the one in
    front is small and the other large; ValueError is raised if `scene` names other sizes for them.
    """
    in_front = {"in front of": ("small", "large"), "behind": ("large", "small")}.get(scene.relation or "")
    if in_front and any(thing.size not in (None, size) for thing, size in zip(scene.things, in_front, strict=True)):
        raise ValueError(
            "of two things, the one in front must be small and the one behind large; leave out their sizes"
        )
    while True:
        things: list[Thing] = []
        for i, thing in enumerate(scene.things):
            taken = [other.colour for other in (*things, *scene.things)]
            colour = thing.colour or rng.choice([name for name in COLOURS if name not in taken])
            size = thing.size or (in_front[i] if in_front else rng.choice(list(SIZES)))
            things.append(Thing(thing.noun, colour, size))
        place = None if scene.second else scene.place or rng.choice(list(PLACES))
        setting = scene.setting or rng.choice(list(SETTINGS))
        full = Scene(things[0], place, scene.relation, things[1] if scene.second else None, setting)
        if split == "all" or full.held_out == (split == "heldout"):
            return full


def held_out_combinations() -> list[tuple[str, str, str]]:
    """Return all combinations (noun, colour, setting) that are kept out of training."""
    return [names for names in product(NOUNS, COLOURS, SETTINGS) if is_held_out(*names)]
