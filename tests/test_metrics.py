"""Metrics against closed forms and against the libraries called by hand."""

import json
import math
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_folder import write_clip_folder
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.functional import to_pil_image

from cdm_lightning.data.shapes import draw_scenes, parse_caption, render
from cdm_lightning.errors import UserError
from cdm_lightning.metrics.base import ImageBatch, extract
from cdm_lightning.metrics.clip_score import CLIPScore
from cdm_lightning.metrics.colour import Colour, ColourStatistics, colour_figures
from cdm_lightning.metrics.diversity import pairwise_diversity
from cdm_lightning.metrics.extractors import InceptionFeatures, OpenClipFeatures
from cdm_lightning.metrics.frechet import FeatureStatistics, frechet_distance
from cdm_lightning.metrics.open_clip_model import OpenClipModel
from cdm_lightning.metrics.references import ImageFolder, ShapesRenderings, render_prompts
from cdm_lightning.metrics.suite import Collected, MetricSuite

PROMPTS = ["a small red circle on the left", "a large blue square", "a green ring above a white cross"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


def normal_features(count: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Features (N, D) whose sample mean and covariance are exactly those given."""
    draws = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draws - draws.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(draws.T.cov()), draws.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def distance(reference: Tensor, features: Tensor) -> float:
    found = frechet_distance(FeatureStatistics.of_features([reference]), features)
    assert found is not None
    return found


# ---- Fréchet distance


def test_frechet_distance_of_two_gaussians_is_the_closed_form() -> None:
    mean, other = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    a, b = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 1.0, 1.0]).double()
    expected = (mean - other).square().sum() + (a.sqrt() - b.sqrt()).square().sum()  # commuting covariances
    found = distance(normal_features(50, mean, a.diag(), 0), normal_features(80, other, b.diag(), 1))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_turned_gaussians_is_the_closed_form() -> None:
    """In two dimensions tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det A det B))."""
    a, b = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 0.5]]).double()
    cross = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(a.det() * b.det())))
    zero = torch.zeros(2).double()
    found = distance(normal_features(40, zero, a, 2), normal_features(40, zero, b, 3))
    assert found == pytest.approx(float(a.trace() + b.trace()) - 2 * cross, rel=1e-9)


def test_frechet_distance_equals_that_of_torchmetrics_on_images() -> None:
    class Channels(nn.Module):
        num_features = 6

        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([images.mean((2, 3)), images.amax((2, 3))], dim=1)

    real, fake = uniform(0, 20, 3, 8, 8), uniform(1, 30, 3, 8, 8) ** 2
    theirs = FrechetInceptionDistance(feature=Channels(), normalize=True)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(FeatureStatistics.of_images(Channels(), real.split(6)), extract(Channels(), fake))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_frechet_distance_knows_no_order_and_no_batches() -> None:
    generator = torch.Generator().manual_seed(4)
    real, fake = torch.randn(70, 5, generator=generator), 1 + torch.randn(60, 5, generator=generator)
    reference = FeatureStatistics.of_features(real.flip(0).split(13))
    assert frechet_distance(reference, fake[torch.randperm(60, generator=generator)]) == pytest.approx(
        distance(real, fake), rel=1e-9
    )
    assert distance(real, real) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_needs_two_samples() -> None:
    assert frechet_distance(FeatureStatistics.of_features([uniform(0, 5, 2)]), uniform(1, 1, 2)) is None
    with pytest.raises(ValueError, match="at least 2 samples"):
        FeatureStatistics.of_features([uniform(0, 1, 2)])


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    statistics = FeatureStatistics.of_features([uniform(0, 9, 4)])
    statistics.save(tmp_path / "real.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "real.safetensors")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.count == 9
    assert [path.name for path in tmp_path.iterdir()] == ["real.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_unreadable_statistics_are_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "real.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert_one_line(lambda: FeatureStatistics.load(path), "the statistics of reference images cannot be read")


# ---- CLIP


def test_clip_score_is_open_clip_by_hand(clip_folder: Path) -> None:
    images = (render([parse_caption(prompt) for prompt in PROMPTS], 0) * 255).round() / 255
    name = f"local-dir:{clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(to_pil_image(image)) for image in images]), normalize=True)
        read = model.encode_text(open_clip.get_tokenizer(name)(PROMPTS), normalize=True)
    clip = {"clip": OpenClipFeatures(name)}
    scores = CLIPScore().score(ImageBatch(images, PROMPTS, range(3), clip))
    torch.testing.assert_close(scores, 100 * (seen * read).sum(1), rtol=1e-4, atol=1e-4)
    assert len(set(scores.tolist())) == 3
    shuffled = CLIPScore().score(ImageBatch(images, PROMPTS[::-1], range(3), clip))
    assert scores[0] != shuffled[0]


@pytest.mark.parametrize(
    ("resize_mode", "shape"), [("squash", (48, 80)), ("shortest", (48, 80)), ("shortest", (64, 64))]
)
def test_preprocessing_is_that_of_open_clip(
    clip_folder: Path, tmp_path: Path, resize_mode: str, shape: tuple[int, int]
) -> None:
    """Pictures of any size reach the network as through open_clip's own path over PIL, but for its 8-bit rounding."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = resize_mode
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = F.interpolate(uniform(0, 1, 3, 6, 7), shape, mode="bicubic").clamp(0, 1)
    image = (image * 255).round() / 255
    model = OpenClipModel(f"local-dir:{folder}")
    seen = []
    model.clip.encode_image = lambda batch: seen.append(batch) or batch
    model.encode_images(image)
    torch.testing.assert_close(seen[0][0], preprocess(to_pil_image(image[0])), rtol=0, atol=4.1 / 255)  # two of 255


def test_clip_features_are_not_normalised(clip_folder: Path) -> None:
    images = render(draw_scenes(4, 0), 0)
    features = OpenClipFeatures(f"local-dir:{clip_folder}")
    found = extract(features, images)
    assert found.shape == (4, 64)
    assert (found.norm(dim=1) - 1).abs().min() > 0.01
    assert not any(parameter.requires_grad for parameter in features.parameters())
    torch.testing.assert_close(found, torch.cat([extract(features, image[None]) for image in images]))


def test_clip_weights_from_a_file(clip_folder: Path, tmp_path: Path) -> None:
    config = json.loads((clip_folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path)
    try:
        weights = clip_folder / "open_clip_model.safetensors"
        images = render(draw_scenes(2, 0), 0)
        by_name = OpenClipModel("tiny-test-clip", str(weights))
        by_name.normalise = OpenClipModel(f"local-dir:{clip_folder}").normalise  # a bare name has CLIP's own mean
        by_folder = OpenClipModel(f"local-dir:{clip_folder}")
        torch.testing.assert_close(by_name.encode_images(images), by_folder.encode_images(images))
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.pop()
        open_clip.factory._rescan_model_configs()


def assert_one_line(make, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_missing_weights_are_one_line(clip_folder: Path, tmp_path: Path) -> None:
    without = shutil.copytree(clip_folder, tmp_path / "without")
    (without / "open_clip_model.safetensors").unlink()
    other = shutil.copytree(clip_folder, tmp_path / "other")
    config = json.loads((other / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 48
    (other / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "cut.safetensors").write_bytes(b"cut off")
    assert_one_line(lambda: OpenClipModel(f"local-dir:{tmp_path}/nowhere"), "is not an open_clip folder")
    assert_one_line(lambda: OpenClipModel(f"local-dir:{without}"), "has no CLIP weights")
    assert_one_line(lambda: OpenClipModel(f"local-dir:{other}"), "cannot load the CLIP model")
    assert_one_line(lambda: OpenClipModel("ViT-B-32"), "has no weights")
    assert_one_line(lambda: OpenClipModel("ViT-B-32", str(tmp_path / "absent.pt")), "absent.pt do not exist")
    assert_one_line(lambda: OpenClipModel("ViT-B-32", str(tmp_path / "cut.safetensors")), "cannot load the CLIP model")
    assert_one_line(lambda: OpenClipFeatures("ViT-Z-99", "openai"), "has no model 'ViT-Z-99'")
    assert_one_line(lambda: InceptionFeatures(tmp_path / "inception.pth"), "Inception weights .* do not exist")


def test_unfit_inception_weights_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "inception.pth").write_bytes(b"cut off")
    assert_one_line(
        lambda: InceptionFeatures(tmp_path / "inception.pth"), "torch-fidelity|cannot be used as Inception weights"
    )


# ---- diversity


def test_diversity_is_the_mean_distance_within_prompts() -> None:
    far = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[100.0, 0.0], [100.0, 0.0], [100.0, 0.0]]])
    assert pairwise_diversity(far) == pytest.approx((5 + 5 + 0 + 0 + 0 + 0) / 6)
    assert pairwise_diversity(far[1:]) == 0
    with pytest.raises(ValueError, match="at least 2 images"):
        pairwise_diversity(far[:, :1])


# ---- references


def test_renderings_are_a_function_of_the_seed() -> None:
    once, again = (torch.cat(list(ShapesRenderings(PROMPTS, count=300, seed=3))) for _ in range(2))
    assert once.shape == (300, 3, 32, 32)
    assert torch.equal(once, again)
    assert torch.equal(once[:256], next(iter(ShapesRenderings(PROMPTS, count=256, seed=3))))
    assert not torch.equal(once, torch.cat(list(ShapesRenderings(PROMPTS, count=300, seed=4))))


def test_renderings_show_the_first_captions_in_turn() -> None:
    prompts = ["a large white circle in the middle", "a large blue circle in the middle", "a red ring"]
    images = torch.cat(list(ShapesRenderings(prompts, captions=2, count=6)))
    middle = images[:, :, 16, 16]
    assert (middle[0::2].amin(1) > 0.7).all()  # white
    assert (middle[1::2, 0] < 0.4).all()  # blue
    assert not torch.equal(images[0], images[2])


def test_renderings_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(UserError, match="not a caption of the shapes set: 'a dog'"):
        list(ShapesRenderings(["a dog"], count=2))
    with pytest.raises(UserError, match="captions=4 must be from 1 to 3"):
        ShapesRenderings(PROMPTS, captions=4)


def test_a_prompts_rendering_knows_its_index_only() -> None:
    together = render_prompts(PROMPTS, [5, 6, 7], 0)
    assert torch.equal(together[1:2], render_prompts(PROMPTS[1:2], [6], 0))
    assert not torch.equal(render_prompts(PROMPTS[:1] * 2, [1, 2], 0)[0], render_prompts(PROMPTS[:1], [2], 0)[0])


def test_image_folder_reads_resizes_and_crops(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    Image.new("RGB", (8, 4), (255, 0, 51)).save(tmp_path / "b.png")
    Image.new("L", (4, 4), 102).save(tmp_path / "below" / "a.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    batches = list(ImageFolder(tmp_path, image_size=4, batch_size=1))
    assert [batch.shape for batch in batches] == [(1, 3, 4, 4)] * 2
    torch.testing.assert_close(batches[0][0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    torch.testing.assert_close(batches[1][0, :, 0, 0], torch.tensor([0.4, 0.4, 0.4]))
    assert_one_line(
        lambda: ImageFolder(tmp_path, batch_size=1), "a.PNG: its size differs from that of .*b.png; set image_size"
    )


def test_unfit_image_folders_are_one_line(tmp_path: Path) -> None:
    assert_one_line(lambda: ImageFolder(tmp_path), "has no reference images")
    (tmp_path / "a.png").write_bytes(b"cut off")
    assert_one_line(lambda: ImageFolder(tmp_path), "cannot be read as an image")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])  # the header is whole
    assert_one_line(lambda: list(ImageFolder(tmp_path)), "cannot be read as an image")


# ---- colour


def colours(*images: Tensor, patch: int = 4) -> dict[str, float]:
    return colour_figures(ColourStatistics(patch)(torch.stack(images)))


def plain(red: float, green: float, blue: float, size: int = 8) -> Tensor:
    return torch.tensor([red, green, blue])[:, None, None].expand(3, size, size)


def test_colour_statistics_of_plain_images_are_the_closed_form() -> None:
    found = colours(plain(1, 0, 0), plain(0.5, 0.5, 0.5))
    assert found["brightness"] == pytest.approx((0.2126 + 0.5) / 2)
    assert found["saturation"] == pytest.approx((1 + 0) / 2)
    assert found["contrast"] == pytest.approx(0, abs=1e-6)
    assert "patch_grid" not in found  # no neighbours differ, so there is nothing to divide by
    black = colours(plain(0, 0, 0))
    assert (black["brightness"], black["saturation"]) == (0, 0)  # the saturation of black is 0, not NaN


def test_contrast_is_the_deviation_of_the_luma() -> None:
    halves = torch.cat([plain(0, 0, 0)[:, :4], plain(1, 1, 1)[:, 4:]], dim=1)
    assert colours(halves)["contrast"] == pytest.approx(0.5)


def test_patch_grid_is_one_for_noise_and_large_for_patches() -> None:
    noise = uniform(3, 3, 64, 64)
    assert colours(noise)["patch_grid"] == pytest.approx(1, abs=0.05)
    steps = noise[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2)  # each patch has one colour
    assert colours(0.9 * steps + 0.1 * noise)["patch_grid"] > 5
    assert "patch_grid" not in colours(uniform(4, 3, 4, 4))  # one patch has no border


def test_colour_ratios_to_another_sampler() -> None:
    images = uniform(5, 6, 3, 16, 16)
    extractors = {"colour": ColourStatistics(4)}
    suite = MetricSuite({"colour": Colour("teacher")}, extractors)
    samplers = {"teacher": Collected(), "student": Collected()}
    for name, made in (("teacher", images), ("student", 0.8 * images)):
        suite.measure(samplers[name], made, [f"p{i}" for i in range(6)], range(6))
    rows = suite.figures(samplers)
    assert rows["student"]["colour_brightness"] == pytest.approx(0.8)
    assert rows["student"]["colour_contrast"] == pytest.approx(0.8)
    assert rows["student"]["colour_saturation"] == pytest.approx(1)
    assert rows["teacher"] == pytest.approx(dict.fromkeys(rows["student"], 1.0))
    assert MetricSuite({"colour": Colour("absent")}, extractors).figures(samplers)["student"] == {}
