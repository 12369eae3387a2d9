"""The CDM objective on closed-form fields: values, gradients, switches, and the number of network calls."""

from dataclasses import dataclass, replace

import pytest
import torch
from closed_form import BatchField, Network, point_mass
from samples import sample_of, summed
from torch import Tensor

from cdm_lightning.core.flow import predict_x0
from cdm_lightning.core.levels import CappedUniformLevels, LogitNormalLevels, UniformLevels
from cdm_lightning.core.ramps import LinearRamp
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import FullTrajectoryPoint, TrajectoryPoint
from cdm_lightning.objectives.base import TermLosses, VelocityFields
from cdm_lightning.objectives.cdm import CDMObjective

B, SHAPE = 8, (3, 8, 8)
RNG = StepRandom(seed=3, iteration=5, slots=range(B), device="cpu")
ONLY = {"ca": (1.0, 0.0, 0.0), "dm": (0.0, 1.0, 0.0), "cdm": (0.0, 0.0, 1.0)}


def identity(sigmas: Tensor) -> Tensor:
    return sigmas


def shift3(sigmas: Tensor) -> Tensor:
    return 3 * sigmas / (1 + 2 * sigmas)


def only(term: str, **settings) -> CDMObjective:
    ca, dm, cdm = ONLY[term]
    return CDMObjective(ca_weight=ca, dm_weight=dm, cdm_weight=cdm, **settings)


@dataclass
class Setting:
    """Nonlinear networks around a student whose clean prediction is theta + 0.1 x, and a point of its rollout."""

    theta: Tensor
    student: Network
    teacher: Network
    fake_score: Network
    fields: VelocityFields
    point: TrajectoryPoint


@pytest.fixture
def setting() -> Setting:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(1, *SHAPE, generator=generator).requires_grad_(True)
    student = Network(lambda x, sigma: theta + 0.1 * x)
    teacher = Network(lambda x, sigma: torch.tanh(x) + sigma.view(-1, 1, 1, 1))
    fake_score = Network(lambda x, sigma: torch.sin(x) * (1 - sigma.view(-1, 1, 1, 1)))
    text, none = torch.rand(B, generator=generator), torch.zeros(B)
    fields = VelocityFields(
        student=BatchField(student, none),
        teacher=BatchField(teacher, text),
        teacher_uncond=BatchField(teacher, none),
        by_role={"fake_score": BatchField(fake_score, text)},
    )
    x, v = torch.randn(2, B, *SHAPE, generator=generator)
    point = FullTrajectoryPoint(
        x, v, torch.rand(B, generator=generator) * 0.7 + 0.25, x0_final=torch.full_like(x, 200.0)
    )
    return Setting(theta, student, teacher, fake_score, fields, point)


def student_loss(objective: CDMObjective, setting: Setting, iteration: int = 0, shift=identity) -> TermLosses:
    for network in (setting.student, setting.teacher, setting.fake_score):
        network.calls.clear()
    setting.theta.grad = None
    losses = loss_of(objective, setting.fields, setting.point, RNG, shift, iteration)
    losses.total.backward()
    return losses


def loss_of(objective: CDMObjective, fields, point, rng=RNG, shift=identity, iteration: int = 0) -> TermLosses:
    return summed(objective.student_losses(sample_of(fields, point, rng, shift, iteration)))


def fake_score_loss(objective: CDMObjective, fields, point, shift=identity) -> TermLosses:
    return summed(objective.fake_score_losses(sample_of(fields, point, RNG, shift)))


def looks(setting: Setting) -> list[Tensor]:
    """Noised samples and sigmas that the teacher was shown for CA, DM, CDM and CA without text."""
    calls = [pair for call in setting.teacher.calls for pair in zip(call.x.split(B), call.sigma.split(B))]
    ca, dm, uncond, cdm = calls
    return [ca, dm, cdm, uncond]


def constant_fields(student: float, teacher: float, uncond: float, fake: float) -> VelocityFields:
    student, teacher, uncond, fake = (point_mass(value, B) for value in (student, teacher, uncond, fake))
    return VelocityFields(student, teacher, uncond, {"fake_score": fake})


# ---- values


def test_point_masses_give_the_exact_values(setting):
    fields = constant_fields(student=0.0, teacher=1.0, uncond=0.5, fake=0.0)
    losses = loss_of(CDMObjective(), fields, setting.point)
    assert losses.terms["ca"].item() == pytest.approx((7 * 0.5) ** 2, rel=1e-4)
    assert losses.terms["dm"].item() == pytest.approx(1.0, rel=1e-4)
    assert losses.terms["cdm"].item() == pytest.approx(1.0, rel=1e-4)
    assert losses.total.item() == pytest.approx(14.25, rel=1e-4)
    assert losses.logs["ca_delta_rms"].item() == pytest.approx(3.5, rel=1e-4)
    assert losses.logs["dm_delta_rms"].item() == pytest.approx(1.0, rel=1e-4)
    assert losses.logs["ca_dm_cosine"].item() == pytest.approx(1.0, rel=1e-4)
    assert losses.logs["x0_mean"].item() == pytest.approx(0.0, abs=1e-5)
    assert losses.logs["nonfinite_deltas"] == 0


def test_distance_and_floor_divide_the_direction(setting):
    fields = constant_fields(student=0.0, teacher=4.0, uncond=4.0, fake=2.0)  # n = 4, delta = 2
    losses = loss_of(only("dm"), fields, setting.point)
    assert losses.total.item() == pytest.approx(0.25, rel=1e-4)
    fields = constant_fields(student=0.0, teacher=0.05, uncond=0.0, fake=0.0)  # n = 0.05, under the floor
    assert loss_of(only("dm"), fields, setting.point).total.item() == pytest.approx(0.25, rel=1e-3)
    wide = loss_of(only("dm", norm_floor=0.5), fields, setting.point)
    assert wide.total.item() == pytest.approx(0.01, rel=1e-3)


def test_fake_score_at_the_optimum_and_off_it(setting):
    point = TrajectoryPoint(torch.ones(B, *SHAPE), torch.zeros(B, *SHAPE), setting.point.sigma)  # its x0 is 1
    losses = [fake_score_loss(CDMObjective(), constant_fields(0, 0, 0, fake), point) for fake in (1.0, 1.5)]
    assert losses[0].total.item() == pytest.approx(0.0, abs=1e-6)
    # the velocity error is (x0 - prediction) / sigma
    sigma = UniformLevels().sample(RNG, "fake_score.sigma", point.sigma, identity)
    assert losses[1].total.item() == pytest.approx((0.25 / sigma**2).mean().item(), rel=1e-3)
    assert not losses[1].terms  # it is one


def test_fake_score_learns_from_the_students_sample_with_gradient_for_itself_only(setting):
    losses = fake_score_loss(CDMObjective(), setting.fields, setting.point)
    (call,) = setting.fake_score.calls
    assert call.with_grad
    assert not setting.student.calls
    assert not setting.teacher.calls
    sigma = call.sigma.view(-1, 1, 1, 1)
    noise = (call.x - (1 - sigma) * setting.point.x0) / sigma
    assert abs(noise.mean()) < 0.2
    assert noise.std() == pytest.approx(1.0, abs=0.1)
    prediction = setting.fake_score.x0(call.x, call.sigma) + setting.fields["fake_score"].offset.view(-1, 1, 1, 1)
    expected = ((call.x - prediction) / sigma - (noise - setting.point.x0)).square().mean()
    torch.testing.assert_close(losses.total, expected, rtol=1e-3, atol=1e-4)


# ---- gradients


def expected_gradient(setting: Setting, term: str, slot: int, guidance_scale: float = 7.0) -> Tensor:
    """-2 (delta / n) / numel with the predictions at what the teacher was shown in its `slot`-th part, (B, *)."""
    call = setting.teacher.calls[0]
    x, sigma = call.x.split(B)[slot], call.sigma.split(B)[slot]
    text = setting.fields.teacher.offset.view(-1, 1, 1, 1)
    student_call = setting.student.calls[-1]
    x0 = setting.student.x0(student_call.x, student_call.sigma).detach()
    teacher = setting.teacher.x0(x, sigma) + text
    if term == "ca":
        delta = guidance_scale * (teacher - setting.teacher.x0(x, sigma))
    else:
        delta = teacher - (setting.fake_score.x0(x, sigma) + text)
    n = (teacher - x0).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)
    return -2 * (delta / n) / x0.numel()


@pytest.mark.parametrize("term", ["ca", "dm", "cdm"])
def test_gradient_of_each_term_follows_the_formula(setting, term):
    student_loss(only(term), setting)
    expected = expected_gradient(setting, term, slot=0).sum(dim=0, keepdim=True)  # theta is shared by the batch
    torch.testing.assert_close(setting.theta.grad, expected, rtol=2e-3, atol=1e-5)


def test_gradient_of_the_sum_is_the_weighted_sum(setting):
    gradients = {}
    for term in ONLY:
        student_loss(only(term), setting)
        gradients[term] = setting.theta.grad.clone()
    losses = student_loss(CDMObjective(ca_weight=0.5, dm_weight=2.0, cdm_weight=3.0), setting)
    expected = 0.5 * gradients["ca"] + 2.0 * gradients["dm"] + 3.0 * gradients["cdm"]
    torch.testing.assert_close(setting.theta.grad, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses.total, sum(losses.terms.values()))


def test_each_term_has_noise_and_sigma_of_its_own(setting):
    student_loss(CDMObjective(), setting)
    shown = looks(setting)
    sigmas = [sigma for _, sigma in shown]
    assert torch.equal(sigmas[0], sigmas[3])  # CA with and without text look at the same sample
    assert not any(torch.equal(sigmas[i], sigmas[j]) for i, j in [(0, 1), (0, 2), (1, 2)])
    x0 = [setting.student.x0(call.x, call.sigma).detach() for call in setting.student.calls]
    noises = []
    for look, base in zip((0, 1, 2), (x0[0], x0[0], x0[1])):
        x, sigma = shown[look][0], sigmas[look].view(-1, 1, 1, 1)
        noises.append(((x - (1 - sigma) * base) / sigma)[sigmas[look] > 0.1])
    for noise in noises:
        assert noise.std() == pytest.approx(1.0, abs=0.1)
    assert len({round(noise.flatten()[0].item(), 4) for noise in noises}) == 3


# ---- network calls


def test_ca_and_dm_share_a_student_forward_and_a_teacher_call(setting):
    student_loss(CDMObjective(), setting)
    assert [(len(call.x), call.with_grad) for call in setting.student.calls] == [(B, True), (B, True)]
    assert [(len(call.x), call.with_grad) for call in setting.teacher.calls] == [(3 * B, False), (B, False)]
    assert [(len(call.x), call.with_grad) for call in setting.fake_score.calls] == [(B, False), (B, False)]


def test_each_summand_can_be_differentiated_before_the_next_is_computed(setting):
    student_loss(CDMObjective(), setting)
    together = setting.theta.grad.clone()
    setting.theta.grad = None
    setting.student.calls.clear()
    terms = []
    for losses in CDMObjective().student_losses(sample_of(setting.fields, setting.point, RNG)):
        assert len(setting.student.calls) == len(terms) + 1
        losses.total.backward()
        terms.append(list(losses.terms))
    assert terms == [["ca", "dm"], ["cdm"]]
    torch.testing.assert_close(setting.theta.grad, together)


@pytest.mark.parametrize(
    ("weights", "student", "teacher", "fake_score"),
    [
        ((1, 1, 0), [B], [3 * B], [B]),
        ((1, 0, 0), [B], [2 * B], []),
        ((0, 1, 0), [B], [B], [B]),
        ((0, 0, 1), [B], [B], [B]),
        ((1, 0, 1), [B, B], [2 * B, B], [B]),
        ((0, 1, 1), [B, B], [B, B], [B, B]),
    ],
)
def test_weight_0_skips_the_network_calls(setting, weights, student, teacher, fake_score):
    losses = student_loss(CDMObjective(*weights), setting)
    assert list(losses.terms) == [term for term, weight in zip(("ca", "dm", "cdm"), weights) if weight]
    assert setting.student.batches == student
    assert setting.teacher.batches == teacher
    assert setting.fake_score.batches == fake_score


def test_networks_that_cannot_join_are_called_one_by_one(setting):
    lonely = Network(setting.teacher.x0)
    fields = replace(setting.fields, teacher_uncond=BatchField(lonely, torch.zeros(B)))
    together = student_loss(CDMObjective(), setting)
    apart = loss_of(CDMObjective(), fields, setting.point)
    assert lonely.batches == [B]
    for term in together.terms:
        torch.testing.assert_close(apart.terms[term], together.terms[term])


# ---- switches


def test_student_inputs_of_the_cdm_term(setting):
    point, sigma = setting.point, setting.point.sigma
    student_loss(only("cdm"), setting)
    (call,) = setting.student.calls
    torch.testing.assert_close(call.x, point.x + (call.sigma - sigma).view(-1, 1, 1, 1) * point.v)
    assert not torch.equal(call.sigma, sigma)
    target = call.sigma

    student_loss(only("cdm", cdm_input="trajectory"), setting)
    (call,) = setting.student.calls
    assert torch.equal(call.x, point.x)
    assert torch.equal(call.sigma, sigma)
    student_loss(CDMObjective(cdm_input="trajectory"), setting)
    assert setting.student.batches == [B]  # then all three terms share the forward

    student_loss(only("cdm", cdm_input="renoised"), setting)
    (call,) = setting.student.calls
    assert torch.equal(call.sigma, target)
    s = target.view(-1, 1, 1, 1)
    noise = ((call.x - (1 - s) * point.x0) / s)[target > 0.1]
    assert noise.std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("term", ["ca", "dm", "cdm"])
def test_what_is_renoised_for_the_teacher(setting, term):
    """The authors' x0_next is the prediction at the anchor, and their base acts on the CDM term alone."""
    own = predict_x0(setting.fields.student, setting.point.x, setting.point.sigma).detach()
    for base, offset in (("next", setting.point.x0), ("final", setting.point.x0_final)):
        objective = only(term, teacher_base=base)
        assert objective.rollout == {"next": "to_anchor", "final": "full"}[base]
        student_loss(objective, setting)
        call = setting.teacher.calls[0]
        sigma = call.sigma[:B].view(-1, 1, 1, 1)
        noise = (call.x[:B] - (1 - sigma) * (offset if term == "cdm" else own)) / sigma
        assert noise[call.sigma[:B] > 0.1].std() == pytest.approx(1.0, abs=0.1)
    assert only(term).rollout == "to_anchor"


def test_the_next_base_is_the_authors_formula_and_changes_the_cdm_term_alone(setting):
    """Their x0_next is x_i - s_i v_i; with it the CDM term looks at (1 - t) x0_next + t noise, and CA and DM stay as they are."""
    student_loss(CDMObjective(teacher_base="next"), setting)
    gradient, point = setting.theta.grad.clone(), setting.point
    x_t, t = looks(setting)[2]
    ratio = t.view(-1, 1, 1, 1)
    x0_next = point.x - point.sigma.view(-1, 1, 1, 1) * point.v
    torch.testing.assert_close(x_t, (1 - ratio) * x0_next + ratio * RNG.normal("cdm.noise", SHAPE))
    text, seen = setting.fields.teacher.offset.view(-1, 1, 1, 1), setting.student.calls[-1]
    teacher, fake = setting.teacher.x0(x_t, t) + text, setting.fake_score.x0(x_t, t) + text
    distance = (teacher - setting.student.x0(seen.x, seen.sigma).detach()).abs().mean(dim=(1, 2, 3), keepdim=True)
    cdm = (-2 * (teacher - fake) / distance.clamp(min=0.1) / x_t.numel()).sum(dim=0, keepdim=True)
    student_loss(CDMObjective(cdm_weight=0.0), setting)
    torch.testing.assert_close(gradient - setting.theta.grad, cdm, rtol=2e-3, atol=1e-5)


def test_later_bases_need_a_full_rollout(setting):
    stopped = TrajectoryPoint(setting.point.x, setting.point.v, setting.point.sigma)
    with pytest.raises(ValueError, match="rollouts to their end"):
        loss_of(only("cdm", teacher_base="final"), setting.fields, stopped)


def test_levels_of_each_term(setting):
    student_loss(CDMObjective(), setting)
    ca, dm, cdm, _ = (sigma for _, sigma in looks(setting))
    assert torch.equal(ca, CappedUniformLevels().sample(RNG, "ca.sigma", setting.point.sigma, identity))
    assert torch.equal(dm, UniformLevels().sample(RNG, "dm.sigma", setting.point.sigma, identity))
    assert (ca <= setting.point.sigma).all()
    other = CDMObjective(
        ca_levels=LogitNormalLevels(), dm_levels=CappedUniformLevels(), cdm_levels=CappedUniformLevels()
    )
    student_loss(other, setting)
    other_ca, other_dm, other_cdm, _ = (sigma for _, sigma in looks(setting))
    seen = setting.student.calls[1].sigma  # the CDM term's cap is the sigma that its student saw
    assert not torch.equal(ca, other_ca)
    torch.testing.assert_close(other_dm, (dm * setting.point.sigma).clamp(min=0.02), rtol=0, atol=0.02)
    assert (other_cdm <= seen.clamp(min=0.02)).all()
    assert not torch.equal(other_cdm, cdm)


def test_target_and_fake_score_levels(setting):
    student_loss(only("cdm", target_levels=UniformLevels(low=0.4, high=0.5)), setting)
    target = setting.student.calls[0].sigma
    assert (target >= 0.4).all()
    assert (target <= 0.5).all()
    objective = CDMObjective(fake_score_levels=UniformLevels(low=0.1, high=0.2))
    setting.fake_score.calls.clear()
    fake_score_loss(objective, setting.fields, setting.point)
    assert (setting.fake_score.calls[0].sigma <= 0.2).all()


def test_the_shift_reaches_the_levels_that_ask_for_it(setting):
    settings = dict.fromkeys(("dm_levels", "target_levels", "fake_score_levels"), UniformLevels(space="before_shift"))
    for objective, changes in ((CDMObjective(**settings), True), (CDMObjective(), False)):
        seen = []
        for shift in (identity, shift3):
            student_loss(objective, setting, shift=shift)
            dm, target = setting.teacher.calls[0].sigma.split(B)[1], setting.student.calls[1].sigma
            setting.fake_score.calls.clear()
            fake_score_loss(objective, setting.fields, setting.point, shift)
            seen.append((dm, target, setting.fake_score.calls[0].sigma))
        for plain, shifted in zip(*seen):
            expected = shift3(plain) if changes else plain
            inside = (plain > 0.02) & (plain < 0.98) & (shifted < 0.98)
            torch.testing.assert_close(shifted[inside], expected[inside])


def test_guidance_scale_multiplies_the_ca_direction(setting):
    losses = [student_loss(only("ca", guidance_scale=scale), setting).total.item() for scale in (2.0, 6.0)]
    assert losses[1] == pytest.approx(9 * losses[0], rel=1e-4)


def test_a_ramp_turns_a_term_on(setting):
    objective = CDMObjective(cdm_weight=LinearRamp(2.0, over=4, start=10))
    assert student_loss(objective, setting, iteration=9).terms.keys() == {"ca", "dm"}
    assert setting.student.batches == [B]
    half, full = (student_loss(objective, setting, iteration=n).terms["cdm"].item() for n in (11, 50))
    assert full == pytest.approx(2 * half)


# ---- health


def test_non_finite_predictions_are_counted_and_do_no_harm(setting):
    healthy = setting.teacher.x0
    setting.teacher.x0 = lambda x, sigma: healthy(x, sigma).index_fill(0, torch.tensor([0]), float("nan"))
    losses = student_loss(only("dm"), setting)
    assert losses.logs["nonfinite_deltas"] == 3 * 8 * 8
    assert losses.total.isfinite()
    assert setting.theta.grad.isfinite().all()


def test_all_figures_are_numbers_without_gradient(setting):
    losses = student_loss(CDMObjective(), setting)
    assert losses.logs.keys() == {
        "ca_delta_rms", "dm_delta_rms", "cdm_delta_rms", "ca_dm_cosine", "x0_mean", "x0_std", "nonfinite_deltas",
        "effective_guidance",
    }  # fmt: skip
    assert all(log.ndim == 0 and not log.requires_grad for log in losses.logs.values())
    assert all(term.ndim == 0 for term in losses.terms.values())


def test_two_halves_of_a_batch_give_the_whole_loss(setting):
    """What a second process would compute: the mean of the halves' losses is the loss of the whole batch."""
    whole = student_loss(CDMObjective(), setting).terms
    halves = []
    for rows in (torch.arange(0, 4), torch.arange(4, 8)):
        whole_batch = setting.fields
        fields = VelocityFields(
            whole_batch.student.select(rows),
            whole_batch.teacher.select(rows),
            whole_batch.teacher_uncond.select(rows),
            {"fake_score": whole_batch["fake_score"].select(rows)},
        )
        point = TrajectoryPoint(setting.point.x[rows], setting.point.v[rows], setting.point.sigma[rows])
        rng = StepRandom(RNG.seed, RNG.iteration, rows.tolist(), "cpu")
        halves.append(loss_of(CDMObjective(), fields, point, rng).terms)
    for term in whole:
        torch.testing.assert_close((halves[0][term] + halves[1][term]) / 2, whole[term])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cdm_input": "noise"}, "extrapolated, trajectory, renoised"),
        ({"teacher_base": "x0"}, "online, next, final"),
        (
            {"ca_weight": 0, "dm_weight": 0.0, "cdm_weight": LinearRamp(1.0, over=5, start=1)},
            "are all 0 in iteration 0",
        ),
        ({"norm_floor": 0.0}, "norm_floor"),
        ({"student_every": 0}, "student_every"),
        ({"fake_score_steps": 0}, "fake_score_steps"),
        ({"fake_score_merge": 1.5}, "fake_score_merge"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CDMObjective(**settings)
