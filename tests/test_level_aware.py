"""The level-aware objective: what its fake score is told, what it is trained on, and what its terms add up to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cdm_lightning.core.flow import FunctionField, VelocityField, interpolate, predict_x0
from cdm_lightning.core.losses import flow_matching_loss
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.objectives.base import RolledOutSample, VelocityFields
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.objectives.level_aware import LevelAwareObjective, LevelEmbedding

SHAPE = (3, 2, 2)
BATCH = 5


class Telling(VelocityField):
    """A field whose velocity is a function of x, sigma and what it was given; it keeps all that it was given."""

    def __init__(self, kept: list[dict[str, Tensor]], given: dict[str, Tensor] | None = None) -> None:
        self.kept, self.inputs = kept, given or {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.kept.append(self.inputs)
        seen = self.inputs.get("seen_sigma", torch.zeros_like(sigma))
        return torch.sin(x) * (1 + seen + sigma)[:, None, None, None]

    def given(self, **inputs: Tensor) -> "Telling":
        return Telling(self.kept, inputs)


def sample_of(kept: list[dict[str, Tensor]], iteration: int = 0) -> RolledOutSample:
    rng = StepRandom(3, iteration, range(BATCH), "cpu")
    x, v = (rng.normal(name, SHAPE) for name in ("x", "v"))
    fields = VelocityFields(
        student=FunctionField(lambda x, sigma: torch.cos(x) * sigma[:, None, None, None]),
        teacher=FunctionField(lambda x, sigma: 0.5 * x),
        teacher_uncond=FunctionField(lambda x, sigma: 0.3 * x + 0.1),
        by_role={"fake_score": Telling(kept)},
    )
    point = TrajectoryPoint(x, v, 0.3 + 0.6 * rng.uniform("sigma"))
    return RolledOutSample(["a"] * BATCH, fields, rng, lambda s: s, lambda s: s, SHAPE, iteration, point=point, steps=4)


def test_the_fake_score_learns_both_predictions_each_with_its_own_sigma() -> None:
    kept: list[dict[str, Tensor]] = []
    sample = sample_of(kept)
    objective = LevelAwareObjective(off_trajectory_share=0.25)
    anchor, off = objective.fake_score_losses(sample)
    assert torch.equal(kept[0]["seen_sigma"], sample.point.sigma)
    published = next(iter(CDMObjective().fake_score_losses(replace(sample, fields=replace_fake(sample, kept)))))
    assert anchor.total == pytest.approx(0.75 * float(published.total))
    # by hand: the student's prediction at the extrapolated point, noised again with draws of its own
    rng, point = sample.rng, sample.point
    target = rng.uniform("fake_score.target").clamp(0.02, 0.98)
    x0 = predict_x0(sample.fields.student, point.move_to(target), target)
    sigma = rng.uniform("fake_score.off_trajectory.sigma").clamp(0.02, 0.98)
    noise = rng.normal("fake_score.off_trajectory.noise", SHAPE)
    expected = flow_matching_loss(Telling([], {"seen_sigma": target})(interpolate(x0, noise, sigma), sigma), x0, noise)
    assert float(off.total) == pytest.approx(0.25 * float(expected))
    assert torch.equal(kept[1]["seen_sigma"], target)
    assert not torch.equal(target, point.sigma)


def replace_fake(sample: RolledOutSample, kept: list[dict[str, Tensor]]) -> VelocityFields:
    """The same networks, with a fake score that is told the anchor's sigma whoever calls it."""
    return replace(sample.fields, by_role={"fake_score": Telling(kept, {"seen_sigma": sample.point.sigma})})


def test_dm_is_judged_at_the_anchors_sigma_and_cdm_at_that_of_its_own_point() -> None:
    kept: list[dict[str, Tensor]] = []
    sample = sample_of(kept)
    list(LevelAwareObjective(ca_weight=0.0).student_losses(sample))
    target = sample.rng.uniform("cdm.target").clamp(0.02, 0.98)
    assert [told["seen_sigma"].tolist() for told in kept] == [sample.point.sigma.tolist(), target.tolist()]


def test_the_number_of_steps_is_told_as_its_reciprocal() -> None:
    kept: list[dict[str, Tensor]] = []
    list(LevelAwareObjective(fake_score_conditioning="sigma_and_steps").fake_score_losses(sample_of(kept)))
    assert [told["seen_steps"].tolist() for told in kept] == [[0.25] * BATCH] * 2


def test_only_every_nth_update_has_the_off_trajectory_part() -> None:
    objective = LevelAwareObjective(fake_score_steps=3, off_trajectory_every=2)
    parts = [
        len(list(objective.fake_score_losses(sample_of([], iteration).again(repeat))))
        for iteration in range(2)
        for repeat in range(3)
    ]
    assert parts == [2, 1, 2, 1, 2, 1]


def test_without_conditioning_and_share_it_is_published_cdm() -> None:
    kept: list[dict[str, Tensor]] = []
    sample = sample_of(kept)
    objective = LevelAwareObjective(fake_score_conditioning="none", off_trajectory_share=0.0)
    for losses in ("fake_score_losses", "student_losses"):
        ours = [float(part.total) for part in getattr(objective, losses)(sample)]
        theirs = [float(part.total) for part in getattr(CDMObjective(), losses)(sample)]
        assert ours == theirs


def test_guidance_of_the_cdm_term_is_added_to_its_direction() -> None:
    without, scaled = LevelAwareObjective(), LevelAwareObjective(cdm_guidance_scale=2.0)
    sample = sample_of([])
    student = sample.fields.student
    x, seen = scaled._off_trajectory(sample)
    x0 = predict_x0(student, x, seen)
    looks = {"cdm": scaled._look("cdm", x0, seen, sample)}
    judged = scaled._judge(sample, looks)
    matching, guidance = judged.directions["cdm"], judged.teacher["cdm"] - judged.without_text["cdm"]
    told = [part.logs for part in scaled.student_losses(sample)][-1]
    plain = [part.logs for part in without.student_losses(sample)][-1]
    expected = (matching + 2.0 * guidance).square().mean().sqrt()
    assert float(told["cdm_delta_rms"]) == pytest.approx(float(expected))
    assert float(plain["cdm_delta_rms"]) == pytest.approx(float(matching.square().mean().sqrt()))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (CDMObjective(), 4.5),  # CA 7 for two matching terms
        (CDMObjective(cdm_weight=0.0), 8.0),
        (CDMObjective(ca_weight=0.0), 1.0),
        (CDMObjective(cdm_weight=0.5, guidance_scale=3.0), 3.0),
        (LevelAwareObjective(cdm_guidance_scale=7.0), 8.0),
        (LevelAwareObjective(dm_weight=0.0), 8.0),
    ],
)
def test_the_effective_guidance_is_told_once(objective, expected) -> None:
    told = [
        part.logs["effective_guidance"]
        for part in objective.student_losses(sample_of([]))
        if "effective_guidance" in part.logs
    ]
    assert [float(each) for each in told] == [pytest.approx(expected)]


def test_the_embedding_is_zero_at_first_and_separates_levels_once_it_learns() -> None:
    embedding = LevelEmbedding(16)
    levels = torch.linspace(0, 1, 7)
    assert embedding(levels).abs().max() == 0
    torch.nn.init.normal_(embedding.layers[-1].weight)
    codes = embedding(levels)
    assert codes.shape == (7, 16)
    assert torch.cdist(codes, codes).add(torch.eye(7)).min() > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"fake_score_conditioning": "steps"},
        {"off_trajectory_share": 1.0},
        {"off_trajectory_share": -0.1},
        {"off_trajectory_every": 0},
        {"cdm_input": "trajectory"},
    ],
)
def test_arguments_out_of_range(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LevelAwareObjective(**wrong)
