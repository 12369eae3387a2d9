"""Metrics of distributions: each equals its reference implementation, or a number that is known in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd
from torchvision.transforms.functional import to_pil_image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from cdm_lightning.config import asset_path
from cdm_lightning.core.rng import stream
from cdm_lightning.errors import UserError
from cdm_lightning.evaluate import build_metrics, evaluate
from cdm_lightning.evaluation.intervals import compare
from cdm_lightning.metrics.against import AgainstReference
from cdm_lightning.metrics.base import MeasuredImages, Metric
from cdm_lightning.metrics.dinov2 import Dinov2Features
from cdm_lightning.metrics.diversity import Diversity
from cdm_lightning.metrics.frechet import FrechetToSampler
from cdm_lightning.metrics.kernels import CMMD, KID, gaussian, mmd, polynomial
from cdm_lightning.metrics.mind import MIND
from cdm_lightning.metrics.neighbours import PrecisionRecall, overlap
from cdm_lightning.metrics.paired import PairedDistance, PixelFeatures
from cdm_lightning.metrics.suite import Collected, MetricSuite
from cdm_lightning.metrics.two_sample import TwoSampleTest, fit, p_value, wilson
from cdm_lightning.metrics.vendi import Vendi, VendiWithinPrompt, vendi_score


def normal(seed: int, count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def images_of(features: Tensor, **more) -> MeasuredImages:
    count = len(features)
    return MeasuredImages([f"prompt {i}" for i in range(count)], list(range(count)), {"f": features}, **more)


def figures(metric: Metric, own: Tensor, reference: Tensor):
    """The metric's figures against reference images, which are given as features."""
    if isinstance(metric, AgainstReference):
        metric.prepare({"f": nn.Identity()})
    measured = images_of(own)
    return metric.figures(measured, {"own": measured, "teacher": images_of(reference)})


# ---- KID and CMMD


def test_kid_of_one_subset_is_that_of_torchmetrics():
    own, real = normal(0, 40, 5), normal(1, 40, 5) + 0.5
    found = figures(KID(sampler="teacher", feature="f", subset_size=40), own, real)
    assert found == {"mean": pytest.approx(float(poly_mmd(real, own)), rel=1e-9)}
    by_hand = [mmd(polynomial, own[:30], real), float(poly_mmd(real[:30], own[:30]))]
    assert by_hand[0] != pytest.approx(by_hand[1])  # sets of different sizes are used whole


def test_kid_over_subsets_is_that_of_torchmetrics_without_its_global_random_numbers():
    own, real = normal(0, 60, 5), normal(1, 90, 5) + 0.5
    metric = KID(sampler="teacher", feature="f", subset_size=20, subsets=30, seed=3)
    torch.manual_seed(stream(3, "subsets of KID").initial_seed())  # torchmetrics draws the same subsets from this state
    theirs = KernelInceptionDistance(feature=nn.Identity(), subsets=30, subset_size=20, normalize=True)
    theirs.real_features, theirs.fake_features = [real], [own]
    mean, std = theirs.compute()
    state = torch.get_rng_state()
    found = figures(metric, own, real)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == {"mean": pytest.approx(float(mean), rel=1e-9), "std": pytest.approx(float(std), rel=1e-9)}


def test_the_unbiased_estimate_is_0_on_average_for_equal_distributions():
    found = [
        figures(KID(sampler="teacher", feature="f"), normal(i, 8, 3), normal(900 + i, 8, 3))["mean"] for i in range(200)
    ]
    spread = torch.tensor(found).std() / 200**0.5
    assert abs(sum(found) / 200) < 3 * spread
    assert min(found) < 0 < max(found)


def test_cmmd_is_the_mmd_of_the_paper():
    own, real = normal(0, 12, 4), normal(1, 9, 4)
    a, b = own / own.norm(dim=1, keepdim=True), real / real.norm(dim=1, keepdim=True)
    means = [
        math.fsum(math.exp(-float((x - y).square().sum()) / 200) for x in one for y in other) / len(one) / len(other)
        for one, other in ((a, a), (b, b), (a, b))
    ]
    found = figures(CMMD(sampler="teacher", feature="f"), own, real)
    assert found == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), rel=1e-6)
    assert figures(CMMD(sampler="teacher", feature="f"), own, 3 * own) == pytest.approx(
        0, abs=1e-9
    )  # only directions count
    opposite = torch.tensor([[1.0, 0.0]]).double().expand(4, 2)
    found = figures(CMMD(sampler="teacher", feature="f"), opposite, -opposite)
    assert found == pytest.approx(2000 * (1 - math.exp(-4 / 200)), rel=1e-9)


def test_large_sets_are_compared_in_blocks(monkeypatch):
    own, real = normal(0, 23, 4), normal(1, 31, 4)
    whole = mmd(polynomial, own, real), overlap(own, real, 3), mmd(lambda a, b: gaussian(a, b, 2.0), own, real, True)
    for module in ("kernels", "against"):
        monkeypatch.setattr(f"cdm_lightning.metrics.{module}.LARGEST_BLOCK", 100)
    parts = mmd(polynomial, own, real), overlap(own, real, 3), mmd(lambda a, b: gaussian(a, b, 2.0), own, real, True)
    assert parts[0] == pytest.approx(whole[0])
    assert parts[1] == whole[1]
    assert parts[2] == pytest.approx(whole[2])


# ---- MIND


def test_mind_of_shifted_features_is_three_times_the_squared_shift():
    own, shift = normal(0, 300, 6), torch.tensor([1.0, 2, 0, 0, 0, 2]).double()
    found = figures(MIND(sampler="teacher", feature="f", projections=8000), own, own + shift)
    assert found == pytest.approx(3 * 9, rel=0.05)  # the mean of (u.m)^2 over directions u is |m|^2 / 6
    assert figures(MIND(sampler="teacher", feature="f"), own, own.flip(0)) == 0  # the order is of no meaning


def test_mind_in_one_dimension_is_the_wasserstein_distance():
    own, real = normal(0, 7, 1), 2 * normal(1, 7, 1) + 1
    by_hand = 3 * float((own.flatten().sort().values - real.flatten().sort().values).square().mean())
    assert figures(MIND(sampler="teacher", feature="f", projections=3), own, real) == pytest.approx(by_hand)
    more = torch.cat([real, real])
    assert figures(MIND(sampler="teacher", feature="f"), own, more) > 0  # 7 of the 14 are drawn


# ---- precision and recall


def test_precision_recall_density_and_coverage_on_a_line():
    real = torch.tensor([[0.0], [1], [2], [10], [11], [12]]).double()
    own = torch.tensor([[0.5], [1.5], [2.5], [100]]).double()
    # k=1: balls of the reference have radius 1, those of 0.5, 1.5, 2.5 too, that of 100 reaches to 2.5
    found = overlap(own, real, 1)
    assert found["precision"] == 3 / 4
    assert found["recall"] == 6 / 6  # the ball of 100 holds 10, 11 and 12
    assert found["density"] == (2 + 2 + 1) / 4
    assert found["coverage"] == 3 / 6
    metric = PrecisionRecall(sampler="teacher", feature="f", k=1)
    assert figures(metric, own, real) == found
    assert figures(metric, real, real)["precision"] == 1


# ---- Vendi


def test_vendi_scores_in_closed_form():
    assert vendi_score(torch.eye(5)) == pytest.approx(5)
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
    assert vendi_score(torch.eye(3).repeat(4, 1)) == pytest.approx(3)  # 12 images of 3 kinds
    angle = 0.6
    two = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]).double()
    values = [(1 + math.cos(angle)) / 2, (1 - math.cos(angle)) / 2]
    assert vendi_score(two) == pytest.approx(math.exp(-sum(value * math.log(value) for value in values)))
    assert vendi_score(two.repeat(1, 8)) == pytest.approx(vendi_score(two))  # more features than images
    assert math.isnan(vendi_score(torch.tensor([[math.nan], [1.0]])))


def test_diversity_can_be_a_ratio_to_another_sampler():
    alike, different = torch.ones(3, 2, 4), torch.eye(4)[:2].expand(3, 2, 4)
    student = images_of(torch.ones(3, 4), copies={"f": alike})
    teacher = images_of(torch.eye(4)[:3], copies={"f": different})
    others = {"student": student, "teacher": teacher}
    assert Vendi("f", "teacher").figures(student, others) == pytest.approx(1 / 3)
    assert VendiWithinPrompt("f", 3, 2).figures(teacher, others) == pytest.approx(2)
    assert VendiWithinPrompt("f", 3, 2, "teacher").figures(student, others) == pytest.approx(1 / 2)
    assert Diversity("f", 3, 2).figures(teacher, others) == pytest.approx(2**0.5)
    assert Diversity("f", 3, 2, "teacher").figures(teacher, others) == 1
    assert Diversity("f", 3, 2, "student").figures(teacher, others) is None  # a division by 0
    assert Vendi("f", "nobody").figures(student, others) is None
    assert Vendi("f").figures(images_of(torch.ones(1, 4)), {}) is None


# ---- two-sample test


def test_logistic_regression_is_at_the_minimum_of_its_loss():
    features, labels = normal(0, 30, 3), (normal(1, 30, 1)[:, 0] > 0).double()
    weights, bias = fit(features, labels, 0.1)
    errors = torch.sigmoid(features @ weights + bias) - labels
    torch.testing.assert_close(features.T @ errors / 30 + 0.1 * weights, torch.zeros(3).double(), atol=1e-5, rtol=0)
    assert float(errors.mean()) == pytest.approx(0, abs=1e-5)


def test_the_accuracy_is_that_of_the_best_classifier_of_two_normal_distributions():
    own, real = normal(0, 3000, 4), normal(1, 3000, 4) + 0.5
    found = figures(TwoSampleTest(sampler="teacher", feature="f"), own, real)
    best = 0.5 * (1 + math.erf(0.5 / 2**0.5))  # of means at the distance 1
    assert found["accuracy"] == pytest.approx(best, abs=0.015)
    assert found["low"] < best < found["high"]
    assert found["p_value"] < 1e-6


def test_two_samples_of_one_distribution_are_not_told_apart():
    found = [
        figures(TwoSampleTest(sampler="teacher", feature="f"), normal(i, 60, 4), normal(99 + i, 60, 4))
        for i in range(20)
    ]
    assert sum(one["p_value"] < 0.05 for one in found) <= 4
    same = normal(0, 60, 4)
    assert figures(TwoSampleTest(sampler="teacher", feature="f"), same, same)["accuracy"] == 0.5


def test_p_value_and_interval_are_those_of_tables():
    assert p_value(60, 100) == pytest.approx(0.028444, abs=1e-6)
    assert p_value(0, 10) == pytest.approx(1)
    assert wilson(60, 100) == pytest.approx((0.50200, 0.69060), abs=1e-4)


# ---- paired distances


def test_paired_distances_from_the_same_and_from_other_noise():
    zero, one = torch.zeros(3, 4), torch.ones(3, 4)
    teacher = images_of(zero, other_noise={"f": 2 * one})
    student = images_of(one, other_noise={"f": 3 * one})
    folder = images_of(one, has_noise=False, other_noise={"f": one})
    others = {"teacher": teacher, "student": student, "folder": folder}
    metric = PairedDistance("teacher", "f")
    assert metric.figures(student, others) == {"same_noise": 2, "other_noise": 6}
    assert metric.figures(teacher, others) == {"other_noise": 4}
    assert metric.figures(folder, others) == {"other_noise": 2}
    assert PairedDistance("folder", "f").figures(student, others) == {"other_noise": 4}
    assert metric.figures(student, {"student": student}) is None
    assert set(FrechetToSampler("folder", "f").figures(student, others)) == {"other_noise"}
    black, white = torch.zeros(1, 3, 32, 48), torch.ones(1, 3, 32, 48)
    assert float((PixelFeatures()(black) - PixelFeatures()(white)).norm()) == pytest.approx(1)


# ---- all of them


ALL = (KID, CMMD, MIND, PrecisionRecall, TwoSampleTest)


@pytest.mark.parametrize("kind", ALL)
def test_few_images_and_images_that_are_not_finite_are_no_error(kind):
    metric = kind(sampler="teacher", feature="f")
    assert figures(metric, normal(0, 1, 3), normal(1, 30, 3)) is None
    assert metric.caution(images_of(normal(0, 1, 3))).startswith("1 images are too few")
    assert metric.caution(images_of(normal(0, 20, 30)))
    broken = normal(0, 30, 3)
    broken[0] = math.nan
    found = figures(metric, broken, normal(1, 30, 3))
    assert all(map(math.isnan, found.values() if isinstance(found, dict) else [found]))
    with pytest.raises(UserError, match="either reference images or another sampler"):
        kind(feature="f")
    with pytest.raises(UserError, match="needs at least"):
        figures(kind([normal(0, 1, 3)], feature="f"), normal(0, 30, 3), normal(1, 30, 3))


@pytest.mark.parametrize("kind", ALL)
def test_reference_images_count_as_another_sampler_does(kind):
    own, real = normal(0, 30, 3), normal(1, 30, 3) + 1
    metric = kind(real.split(8), feature="f")
    assert figures(metric, own, real) == figures(kind(sampler="teacher", feature="f"), own, real)
    assert metric.facts() == {"reference_images": 30}


def collected(features: Tensor) -> Collected:
    count = len(features)
    return Collected([f"prompt {i}" for i in range(count)], list(range(count)), {"f": [features.float()]})


def test_intervals_of_distances_cover_the_distance_and_others_say_why_they_have_none():
    real = normal(9, 60, 3)
    metrics = {
        "kid": KID(real.split(20), feature="f"),
        "mind": MIND(real.split(20), feature="f", projections=50),
        "overlap": PrecisionRecall(real.split(20), feature="f"),
        "test": TwoSampleTest(real.split(20), feature="f", folds=2),
        "vendi": Vendi("f"),
    }
    suite = MetricSuite(metrics, {"f": nn.Identity()})
    suite.prepare(torch.device("cpu"))
    samplers = {"a": collected(normal(0, 60, 3) + 1), "b": collected(normal(1, 60, 3))}
    found = compare(suite, samplers, "a", resamples=40)
    assert set(found.figures["b"]) == {"kid_mean", "mind", "overlap_precision", "overlap_density"}
    for figure in ("kid_mean", "mind", "overlap_precision"):
        middle = found.figures["a"][figure]
        assert middle.low <= middle.value <= middle.high
    assert found.differences["b"]["kid_mean"].high < 0  # b is nearer
    assert "no interval of vendi: repeated images are less diverse" in found.missing
    assert [
        line
        for line in found.missing
        if line.startswith("no interval of test_accuracy, test_high, test_low, test_p_value: ")
    ]
    assert found.left_out == []


def test_intervals_of_kid_have_the_width_of_new_samples():
    """The spread of the resamples is that of other images of the same distribution."""
    real = normal(500, 80, 3)
    metric = KID(real.split(80), feature="f")
    metric.prepare({"f": nn.Identity()})
    others = torch.tensor([metric.figures(images_of(normal(i, 80, 3) + 1), {})["mean"] for i in range(200)])
    found = compare(
        MetricSuite({"kid": metric}, {"f": nn.Identity()}), {"a": collected(normal(0, 80, 3) + 1)}, "a", resamples=200
    )
    own = found.figures["a"]["kid_mean"]
    assert (own.high - own.low) / (2 * 1.96) == pytest.approx(float(others.std()), rel=0.35)


# ---- DINOv2


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_dinov2_features_are_those_of_transformers(dinov2):
    images = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    pictures = [to_pil_image((image * 255).round().byte()) for image in images]
    pixels = BitImageProcessor.from_pretrained(dinov2)(pictures, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 28, 28)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2).eval()(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(Dinov2Features(str(dinov2))(images), expected)


def test_what_is_missing_of_dinov2_is_said_in_one_line(dinov2, tmp_path):
    with pytest.raises(UserError, match="does not exist; pass a folder or a hub id"):
        Dinov2Features(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        Dinov2Features(str(tmp_path))


# ---- as files of conf/metric


def test_evaluate_measures_them_all_and_other_noise_of_every_sampler(tmp_path):
    names = ("mmd_real", "mind_real", "overlap_real", "two_sample_real")
    options = [f"metric.{name}.reference.{key}" for name in names for key in ("count=32", "captions=12")]
    options += ['metric.paired.sampler="tiny_sd3 2 steps"', "metric.mind_real.projections=20"]
    models = [[str(asset_path("tiny_sd3")), "steps=1,2"]]
    metrics = ["shapes_distributions", "paired"]
    found = evaluate(models, "shapes_heldout", tmp_path, metrics, options, count=12, resamples=20)
    one, two = found.ladder.rows
    assert 0 < one["paired_same_noise"] < one["paired_other_noise"]
    assert "paired_same_noise" not in two
    assert two["paired_other_noise"] > 0
    wanted = {"mmd_real_mean", "mind_real", "overlap_real_recall", "two_sample_real_p_value", "vendi"}
    assert all(math.isfinite(row[figure]) for figure in wanted for row in (one, two))
    assert set(found.comparison.differences["tiny_sd3 2 steps"]) >= {"mmd_real_mean", "mind_real", "paired_other_noise"}
    assert found.text().startswith("12 images of each sampler\n")
    assert found.ladder.settings["mmd_real_reference_images"] == 32


def test_files_that_need_weights_build_what_they_say(dinov2, tmp_path):
    to_pil_image(torch.rand(3, 8, 8)).save(tmp_path / "a.png")
    tiny = f"local-dir:{asset_path('tiny_clip')}"
    suite, _ = build_metrics(
        ["fd_dinov2", "fd_clip", "cmmd", "vendi", "diversity", "two_sample"],
        [f"feature.dinov2.pretrained={dinov2}"]
        + [f"feature.{name}.{value}" for name in ("clip", "clip_336") for value in (f"model={tiny}", "pretrained=null")]
        + [f"metric.{name}.reference.folder={tmp_path}" for name in ("fd_dinov2", "fd_clip", "two_sample")]
        + ["metric.cmmd.reference=null", "metric.cmmd.sampler=teacher"],
    )
    features = {name: metric.features for name, metric in suite.metrics.items()}
    assert features == {
        **dict.fromkeys(("fd_clip", "vendi", "vendi_prompt", "diversity", "two_sample"), ("clip",)),
        "fd_dinov2": ("dinov2",),
        "cmmd": ("clip_336",),
    }
    assert suite.metrics["cmmd"].sampler == "teacher"
    with pytest.raises(UserError, match=r"metric\.kid\.reference\.folder is required"):
        build_metrics(["kid"], ["feature.inception.weights=nowhere"])
