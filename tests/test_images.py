"""Real images beside their prompts: what is refused, how they are cut to size, and that they reach the batches."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from cdm_lightning.config import asset_path
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.images import CaptionedFolder, DrawnCaptions, fit_to
from cdm_lightning.data.mixture import MixedPrompts
from cdm_lightning.data.prompts import PromptList
from cdm_lightning.errors import UserError
from cdm_lightning.metrics.references import ImageFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of one colour each, with captions."""
    lines = []
    for number in range(3):
        save_image(torch.full((3, 8, 16), number / 2), tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f" caption {number} "}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return tmp_path


def test_a_folder_gives_captions_and_images_of_one_size(folder):
    images = CaptionedFolder(folder, [8, 8])
    assert [images[n] for n in range(len(images))] == ["caption 0", "caption 1", "caption 2"]
    assert images.image(1).shape == (3, 8, 8)
    assert images.image(1).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", 'line 1: the line must be {"file_name"'),
        ('{"file_name": "0.png"}', 'line 1: the line must be {"file_name"'),
        ("[1]", 'line 1: the line must be {"file_name"'),
        ('{"file_name": "0.png", "text": " "}', "line 1: text is blank"),
        ('{"file_name": 3, "text": "a"}', "line 1: file_name and text must be strings"),
        ('{"file_name": "9.png", "text": "a"}', "line 1: the file "),
        ("", "lists no images"),
    ],
)
def test_a_list_that_is_wrong_is_refused_in_one_line(folder, line, message):
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        CaptionedFolder(folder, [8, 8])
    assert "\n" not in str(refused.value)


def test_images_are_turned_as_their_cameras_say(folder):
    from PIL import Image

    wide = Image.new("RGB", (16, 8), "red")
    wide.paste("blue", (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise: what was on the left comes to the top
    wide.save(folder / "0.png", exif=exif)
    image = CaptionedFolder(folder, [16, 8]).image(0)
    assert image.shape == (3, 16, 8)
    red, _, blue = image
    assert torch.equal(red, torch.cat([torch.ones(8, 8), torch.zeros(8, 8)]))
    assert torch.equal(blue, 1 - red)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_no_image_is_refused_in_one_line(folder, num_workers):
    for number in range(3):
        (folder / f"{number}.png").write_text("text")
    images = CaptionedFolder(folder, [8, 8])
    data = PromptDataModule(images, images, batch_size=1, num_workers=num_workers, images=True)
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    with pytest.raises(UserError) as refused:
        next(iter(data.train_dataloader()))
    begin, path, end = str(refused.value).partition(".png")
    assert path
    assert begin[:-1] == f"{folder}/"
    assert end == (
        ": cannot be read as an image (cannot identify image file); replace it or remove its line from metadata.jsonl"
    )


def test_half_an_image_and_no_list_are_refused(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"0\.png: cannot be read as an image"):
        CaptionedFolder(folder, [8, 8]).image(0)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"no metadata\.jsonl"):
        CaptionedFolder(folder, [8, 8])


def test_sixteen_bits_and_transparency_are_seen_as_they_look(tmp_path):
    """Pillow's own conversion makes 16-bit images white, and shows the colours under transparent pixels."""
    images = {
        "grey16.png": (Image.fromarray(np.full((8, 8), 16384, np.uint16)), [64, 64, 64]),
        "grey8.png": (Image.new("L", (8, 8), 64), [64, 64, 64]),
        "clear.png": (Image.new("RGBA", (8, 8), (200, 0, 0, 0)), [255, 255, 255]),
        "half.png": (Image.new("RGBA", (8, 8), (0, 0, 0, 51)), [204, 204, 204]),
        "grey_clear.png": (Image.new("LA", (8, 8), (10, 0)), [255, 255, 255]),
        "colour.png": (Image.new("RGB", (8, 8), (10, 20, 30)), [10, 20, 30]),
    }
    for name, (image, _) in images.items():
        image.save(tmp_path / name)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    wanted = {name: colour for name, (_, colour) in images.items()} | {"palette.png": [255, 255, 255]}
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": n}) + "\n" for n in wanted))
    captioned = CaptionedFolder(tmp_path, [8, 8])
    for index, (name, colour) in enumerate(wanted.items()):
        assert (captioned.image(index)[:, 0, 0] * 255).round().tolist() == colour, name
    references = torch.cat(list(ImageFolder(tmp_path)))
    for name, image in zip(sorted(wanted), references):
        assert (image[:, 0, 0] * 255).round().tolist() == wanted[name], name
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "float.tiff", "text": "a"}\n')
    with pytest.raises(UserError, match="its pixels have 32 bits"):
        CaptionedFolder(tmp_path, [8, 8]).image(0)


def test_images_are_cut_from_their_middle():
    wide = torch.zeros(1, 3, 8, 16)
    wide[..., 4:12] = 1
    assert torch.equal(fit_to(wide, (8, 8)), torch.ones(1, 3, 8, 8))
    assert fit_to(wide, (8, 16)) is wide
    half = fit_to(wide, (4, 8))
    assert half.shape == (1, 3, 4, 8)
    assert half.min() >= 0
    assert half.max() <= 1
    assert fit_to(torch.rand(2, 3, 5, 7), (10, 3)).shape == (2, 3, 10, 3)


def test_drawings_are_a_function_of_seed_and_number():
    path = asset_path("prompts/shapes_train.txt")
    one, same, other = DrawnCaptions(path), DrawnCaptions(path), DrawnCaptions(path, seed=1)
    assert one.image(5).shape == (3, 32, 32)
    assert torch.equal(one.image(5), same.image(5))
    assert not torch.equal(one.image(5), other.image(5))


def test_texts_that_cannot_be_drawn_are_refused(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("an elephant in the rain\n", encoding="utf-8")
    with pytest.raises(UserError, match="use only captions of the bundled shapes set"):
        DrawnCaptions(file).image(0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_travel_with_their_prompts(num_workers):
    drawn = DrawnCaptions(asset_path("prompts/shapes_train.txt"))
    pairs = lambda n: range(n - n % 2, n - n % 2 + 2)  # noqa: E731
    data = PromptDataModule(drawn, drawn, batch_size=3, num_workers=num_workers, groups=pairs, images=True)
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    batch = next(iter(data.train_dataloader()))
    texts = [drawn[number] for number in range(len(drawn))]
    assert len(batch.group) == 2
    for each in (*batch.group, *batch.split(2)):
        assert each.images.shape == (len(each.prompts), 3, 32, 32)
        for prompt, image in zip(each.prompts, each.images):
            numbers = [n for n, text in enumerate(texts) if text == prompt]
            assert any(torch.equal(image, drawn.image(n)) for n in numbers)
    assert next(iter(data.val_dataloader())).images is None


def test_a_mixture_of_sets_of_images_has_images(folder):
    drawn, small = DrawnCaptions(asset_path("prompts/shapes_heldout.txt")), CaptionedFolder(folder, [32, 32])
    mixed = MixedPrompts({"drawn": drawn, "mine": small}, {"drawn": 1, "mine": 1})
    assert mixed.has_images
    assert torch.equal(mixed.image(2), drawn.image(2))
    assert torch.equal(mixed.image(len(drawn) + 2), small.image(2))
    data = PromptDataModule(mixed, drawn, batch_size=4, images=True)
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    assert next(iter(data.train_dataloader())).images.shape == (4, 3, 32, 32)


def test_a_mixture_that_lacks_images_or_one_size_of_them_is_refused(folder):
    drawn, alone = DrawnCaptions(asset_path("prompts/shapes_heldout.txt")), PromptList(["a"])
    mixed = MixedPrompts({"drawn": drawn, "alone": alone})
    with pytest.raises(UserError, match="needs real images, but there are none in alone;"):
        PromptDataModule(mixed, drawn, batch_size=1, images=True)
    mixed = MixedPrompts({"drawn": drawn, "mine": CaptionedFolder(folder, [8, 16])})
    with pytest.raises(UserError, match="images of drawn have size 32 x 32, but images of mine have 8 x 16"):
        mixed.image(len(drawn))


def test_prompts_alone_are_refused_where_images_are_needed():
    prompts = PromptList(["a", "b"])
    with pytest.raises(UserError, match="the objective needs real images, but there are none in these prompts;"):
        PromptDataModule(prompts, prompts, batch_size=1, images=True)
    with pytest.raises(UserError, match="a PromptList has no images"):
        prompts.image(0)
