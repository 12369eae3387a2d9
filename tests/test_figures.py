"""The figure of docs/method.md: what it shows is what the code computes, and the stored picture is the one that the script draws."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "docs/figures/method.py"


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_figure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_points_and_directions_are_those_of_the_page(figure: ModuleType) -> None:
    scene = figure.scene()
    anchor, s = scene.anchor, float(scene.anchor.sigma)
    assert s == pytest.approx(figure.SIGMAS[figure.ANCHOR])
    torch.testing.assert_close(scene.extrapolated, anchor.x + (figure.TARGET - s) * anchor.v)
    torch.testing.assert_close(scene.at_anchor.x0, anchor.x - s * anchor.v)
    t = figure.LEVEL
    for term in (scene.at_anchor, scene.off_trajectory):
        torch.testing.assert_close(term.noised, (1 - t) * term.x0 + t * figure.latent(figure.FRESH_NOISE))
        torch.testing.assert_close(term.matching, term.teacher - term.fake_score)
        torch.testing.assert_close(term.guidance, figure.GUIDANCE * (term.teacher - term.teacher_without_text))
        assert float(term.teacher) > float(term.x0)  # the arrows lead towards the data, which the page says
    mean = figure.TEXT[0][1]
    assert abs(float(scene.off_trajectory.x0) - mean) < abs(float(scene.at_anchor.x0) - mean)


def test_velocity_of_a_single_normal_distribution(figure: ModuleType) -> None:
    """For x0 ~ N(m, w^2), E[noise - x0 | x] follows from the covariances of a Gaussian."""
    m, w, s, x = 0.8, 0.3, 0.4, 1.1
    variance = (1 - s) ** 2 * w**2 + s**2
    noise, x0 = s / variance * (x - (1 - s) * m), m + (1 - s) * w**2 / variance * (x - (1 - s) * m)
    got = figure.mixture(((1.0, m, w),))(figure.latent(x), torch.tensor([s]))
    assert float(got) == pytest.approx(noise - x0, rel=1e-5)


def test_the_stored_picture_is_the_one_that_the_script_draws(figure: ModuleType, tmp_path: Path) -> None:
    drawn = tmp_path / "method.png"
    figure.draw(figure.scene()).savefig(drawn)
    old, new = (np.asarray(Image.open(path).convert("L"), float) for path in (SCRIPT.with_suffix(".png"), drawn))
    assert old.shape == new.shape
    assert np.abs(old - new).mean() < 2  # of 255: fonts of another matplotlib may differ, other points may not
    assert np.abs(old - np.roll(new, 20, axis=1)).mean() > 2
