"""The storybook scenes: captions that parse back, held-out combinations that no training picture shows, and drawings."""

import random
from itertools import product

import numpy as np
import pytest
import torch

from cdm_lightning.data.scenes.drawing import PALETTE, draw_scene, draw_scenes
from cdm_lightning.data.scenes.grammar import (
    COLOURS,
    NOUNS,
    PLACES,
    SETTINGS,
    SIZES,
    Scene,
    Thing,
    all_words,
    complete,
    count_captions,
    draw_captions,
    held_out_combinations,
    is_held_out,
    parse_caption,
    word,
)
from cdm_lightning.metrics.scenes_judge import HEADS, ScenesJudge, expected


def near(picture: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture (64, 64, 3) has a colour of the palette: rows and columns, (N, 2)."""
    distance = np.abs(picture.astype(int) - np.array(PALETTE[colour])).sum(-1)
    return np.argwhere(distance < 60)


def test_there_are_many_captions_and_all_their_words_are_known() -> None:
    captions = draw_captions(20000, 0, "all", pairs=0.4)
    assert len(set(captions)) > 10000
    assert {word for caption in captions for word in caption.split()} == set(all_words())
    singles = {caption for caption in captions if parse_caption(caption).second is None}
    assert len(singles) < count_captions() == 12 * 11 * 7 * 7 * 25


def test_a_caption_says_its_scene_in_each_wording() -> None:
    rng = random.Random(0)
    scene = Scene(Thing("cat", "orange", "large"), relation="behind", second=Thing("cup", None, "small"), setting="sea")
    wordings = {word(scene, rng) for _ in range(1000)}
    assert {
        "a big orange cat behind a tiny cup under water",
        "under the sea a huge orange cat behind a little cup",
    } < wordings
    assert all(parse_caption(wording) == scene for wording in wordings)
    single = Scene(Thing("bird", "orange"), "middle", setting="beach")
    wordings = {word(single, rng) for _ in range(100)}
    assert "by the sea an orange bird in the centre" in wordings
    assert all(parse_caption(wording) == single for wording in wordings)
    for caption in draw_captions(500, 3, "all", pairs=0.5):
        assert all(thing.noun in NOUNS for thing in parse_caption(caption).things)


@pytest.mark.parametrize(
    "text",
    ["", "house", "a red", "a red dog", "a red large house", "the house", "a house on the moon", "a house left of a",
     "a cat left of a cup on the left"],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the storybook scenes"):
        parse_caption(text)


def test_no_training_picture_shows_a_held_out_combination() -> None:
    captions = draw_captions(2000, 1, "train", pairs=0.4)
    rng = random.Random(0)
    assert not any(complete(parse_caption(caption), rng, "train").held_out for caption in captions)
    assert any(complete(parse_caption(caption), rng, "all").held_out for caption in captions)  # without the split
    assert all(parse_caption(caption).held_out for caption in draw_captions(300, 1, "heldout", pairs=0.4))


def test_what_is_held_out_is_known_in_parts() -> None:
    held_out = held_out_combinations()
    assert 0.08 < len(held_out) / (len(NOUNS) * len(COLOURS) * len(SETTINGS)) < 0.14
    trained = [names for names in product(NOUNS, COLOURS, SETTINGS) if not is_held_out(*names)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(names[i], names[j]) for names in held_out} <= {(names[i], names[j]) for names in trained}


def test_a_drawing_is_a_function_of_caption_and_seed() -> None:
    captions = ["a cat", "a small boat left of a tree", "a large pink bird on the right in the snow"]
    pictures, scenes = draw_scenes(captions, 7)
    random.seed(1)
    np.random.seed(1)
    again, same = draw_scenes(captions, 7)
    assert pictures.shape == (3, 64, 64, 3)
    assert np.array_equal(pictures, again)
    assert scenes == same
    assert np.array_equal(pictures[1], np.asarray(draw_scene(captions[1], 8)[0]))
    others, _ = draw_scenes(captions, 70)
    assert all((picture != other).any() for picture, other in zip(pictures, others, strict=True))


def test_left_out_attributes_vary_and_named_ones_do_not() -> None:
    scenes = [draw_scene("a blue cup", seed)[1] for seed in range(60)]
    assert {scene.first.colour for scene in scenes} == {"blue"}
    assert {scene.first.size for scene in scenes} == set(SIZES)
    assert {scene.place for scene in scenes} == set(PLACES)
    assert {scene.setting for scene in scenes} == set(SETTINGS)


def test_drawings_show_colour_size_and_place() -> None:
    columns, areas = {}, {}
    for size, place in product(SIZES, PLACES):
        spots = [
            near(np.asarray(draw_scene(f"a {size} red cup {PLACES[place][0]} in the snow", i)[0]), "red")
            for i in range(5)
        ]
        columns[size, place] = float(np.concatenate(spots)[:, 1].mean())
        areas[size, place] = sum(map(len, spots)) / 5
    for size in SIZES:
        left, middle, right = (columns[size, place] for place in PLACES)
        assert left + 9 < middle < right - 9
    assert all(areas["large", place] > 2 * areas["small", place] > 40 for place in PLACES)


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_things_stand_as_the_caption_says(setting: str) -> None:
    for seed, (relation, axis) in enumerate({"left of": 1, "right of": 1, "in front of": 0, "behind": 0}.items()):
        picture = np.asarray(draw_scene(f"a red car {relation} a purple house {SETTINGS[setting][0]}", seed)[0])
        red, purple = (near(picture, colour).mean(0)[axis] for colour in ("red", "purple"))
        assert (red < purple) == (relation in ("left of", "behind"))


def test_a_large_thing_in_front_of_another_is_refused() -> None:
    with pytest.raises(ValueError, match="the one in front must be small"):
        draw_scene("a large cat in front of a house", 0)


def test_the_judge_asks_for_what_the_caption_says() -> None:
    says = expected(parse_caption("a red cat behind a tiny cup at night"))
    assert {name: HEADS[name][index] for name, index in says.items()} == {
        "arrangement": "one in front", "setting": "night", "noun_0": "cup", "size_0": "small", "noun_1": "cat", "colour_1": "red",
    }  # fmt: skip
    judge = ScenesJudge()
    for head in judge.heads.values():  # of equal logits, argmax takes the first class
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    captions = [
        "a house",
        "a small red house on the left in a meadow",
        "a cat",
        "a large house",
        "a house left of a house",
    ]
    assert judge.adherence(torch.rand(5, 3, 64, 64), captions).tolist() == [True, True, False, False, False]
    assert judge.features(torch.rand(2, 3, 64, 64)).shape == (2, 128)
    with pytest.raises(ValueError, match="not a caption"):
        judge.check_prompt("a dragon")
