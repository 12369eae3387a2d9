"""The procedural shapes set: captions parse back, renderings show what captions say, held-out captions stay out."""

import pytest
import torch

from cdm_lightning.config import asset_path
from cdm_lightning.data.shapes import (
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    Item,
    Scene,
    all_words,
    draw_scenes,
    lay_out,
    parse_caption,
    render,
)
from cdm_lightning.metrics.shapes_classifier import HEADS, ShapesClassifier, expected


def test_captions_parse_back() -> None:
    scenes = draw_scenes(400, seed=1, split="all", pairs=0.5)
    assert [parse_caption(scene.caption) for scene in scenes] == scenes
    assert {word for scene in scenes for word in scene.caption.split()} <= set(all_words())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a dog",
        "red circle",
        "a huge red circle",
        "a red large circle",
        "a red circle above",
        "a ring at the top left",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(text)


def test_held_out_captions_are_never_trained_on() -> None:
    train = {scene.caption for scene in draw_scenes(5000, seed=2, split="train")}
    held_out = {scene.caption for scene in draw_scenes(2000, seed=3, split="heldout")}
    assert len(held_out) > 30
    assert not train & held_out
    for split, captions in (("train", train), ("heldout", held_out)):
        with open(asset_path(f"prompts/shapes_{split}.txt"), encoding="utf-8") as file:
            assert set(file.read().splitlines()) <= captions | {s.caption for s in draw_scenes(9000, 3000, split)}


def test_draws_are_a_function_of_the_seed() -> None:
    scenes = draw_scenes(8, seed=4)
    assert scenes == draw_scenes(8, seed=4) != draw_scenes(8, seed=5)
    assert torch.equal(render(scenes, 6), render(scenes, 6))
    assert not torch.equal(render(scenes, 6), render(scenes, 7))


def test_what_a_caption_leaves_open_is_drawn_at_random() -> None:
    layout = lay_out([parse_caption("a shape")] * 300, seed=0)
    for drawn, names in ((layout.colour[:, 0], COLOURS), (layout.shape[:, 0], SHAPES), (layout.place, PLACES)):
        counts = torch.bincount(drawn, minlength=len(names))
        assert counts.min() > 0.6 * 300 / len(names)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rendering_has_its_colour_at_its_place(shape: str) -> None:
    for place, (x, y) in PLACES.items():
        images = render([Scene(Item("red", shape, "large"), place)] * 16, seed=1)
        assert images.shape == (16, 3, 32, 32)
        assert 0 <= images.min() < images.max() <= 1
        red = (images[:, 0] - images[:, 1:].mean(1)) > 0.35
        rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        for mask in red:
            assert mask.sum() > 30
            assert abs((columns[mask].float().mean() + 0.5) / 32 - x) < 0.09
            assert abs((rows[mask].float().mean() + 0.5) / 32 - y) < 0.09


def test_relations_are_laid_out_as_said() -> None:
    for relation in RELATIONS:
        scene = Scene(Item("red", "circle", "large"), relation=relation, second=Item("blue", "square", "small"))
        layout = lay_out([scene], seed=0)
        upright = relation in ("above", "below")
        first = 1 if relation in ("below", "right of") else 0  # slots run from the upper or left one
        assert layout.arrangement.item() == (1 if upright else 2)
        assert layout.colour[0, first].item() == list(COLOURS).index("red")
        assert expected(scene)[f"shape_{first}"] == SHAPES.index("circle")


def test_the_bundled_classifier_knows_real_renderings_and_sees_wrong_ones() -> None:
    classifier = ShapesClassifier.load(asset_path("shapes_classifier.safetensors"))
    scenes = draw_scenes(512, seed=9, split="heldout", pairs=0.5)
    images, captions = render(scenes, seed=10), [scene.caption for scene in scenes]
    assert classifier.adherence(images, captions).float().mean() > 0.99
    assert classifier.adherence(images.flip(0), captions).float().mean() < 0.1
    assert classifier.adherence(torch.full_like(images, 0.3), captions).float().mean() < 0.1


def test_each_wrong_attribute_alone_breaks_adherence() -> None:
    classifier = ShapesClassifier.load(asset_path("shapes_classifier.safetensors"))
    image = render([Scene(Item("red", "circle", "large"), "at the top")] * 8, seed=3)
    assert classifier.adherence(image, ["a large red circle at the top"] * 8).all()
    for wrong in (
        "a large blue circle at the top",
        "a large red ring at the top",
        "a small red circle at the top",
        "a large red circle on the left",
        "a large red circle above a red ring",
    ):
        assert not classifier.adherence(image, [wrong] * 8).any(), wrong
    for open_caption in ("a red circle", "a large circle", "a shape at the top", "a shape"):
        assert classifier.adherence(image, [open_caption] * 8).all(), open_caption
    assert set(HEADS) >= set(expected(parse_caption("a large red circle above a red ring")))
