"""The reward term: its gradient for a scorer whose gradient is known, and CLIP as a scorer of the bundled images."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import train_together
from torch import Tensor

from cdm_lightning import plan as planner
from cdm_lightning.checkpoint.stored import newest_checkpoint
from cdm_lightning.config import asset_path, compose
from cdm_lightning.core.flow import FunctionField, per_sample
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.rollout import TrajectoryPoint
from cdm_lightning.data.shapes import parse_caption, render
from cdm_lightning.errors import UserError
from cdm_lightning.metrics.rewards import CLIPReward
from cdm_lightning.objectives.base import RolledOutSample, VelocityFields
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.objectives.reward import Reward
from cdm_lightning.train import train

SHAPE, PROMPTS = (2, 3, 3), ["dark", "bright", "brighter"]
BY_PROMPT = {"dark": -1.0, "bright": 1.0, "brighter": 3.0}  # the score of one unit of brightness


def brightness(images: Tensor, prompts) -> Tensor:
    return torch.tensor([BY_PROMPT[prompt] for prompt in prompts]) * images.mean(dim=(1, 2, 3))


def decode(latents: Tensor) -> Tensor:
    return 2 * latents + 0.5


def sample_of(x0: Tensor, **more) -> RolledOutSample:
    """A student that predicts x0 whatever it sees."""
    rng, sigma = StepRandom(5, 0, range(3), "cpu"), torch.tensor([0.9, 0.5, 0.3])
    student = FunctionField(lambda x, s: (x - x0) / per_sample(s, x))
    other = FunctionField(lambda x, s: 0.2 * x)
    x = rng.normal("x", SHAPE)
    fields = VelocityFields(student, other, other, by_role={"fake_score": FunctionField(lambda x, s: 0.1 * x)})
    point = TrajectoryPoint(x, student(x, sigma).detach(), sigma)
    return RolledOutSample(PROMPTS, fields, rng, torch.clone, torch.clone, SHAPE, 0, point=point, **more)


def gradient(reward: Reward | None) -> tuple[Tensor, dict, dict]:
    x0 = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (loss,) = CDMObjective(cdm_weight=0.0, reward=reward).student_losses(sample_of(x0, decode=decode))
    return torch.autograd.grad(loss.total, x0)[0], loss.terms, loss.logs


def test_the_gradient_is_that_of_the_scorer_through_the_decoder() -> None:
    with_reward, terms, logs = gradient(Reward(brightness, weight=0.5))
    without, plain_terms, _ = gradient(None)
    slope = -0.5 * torch.tensor([BY_PROMPT[p] for p in PROMPTS]) * 2 / (3 * 18)  # of a pixel of a sample in the mean
    torch.testing.assert_close(
        with_reward - without, per_sample(slope, without).expand_as(without), atol=1e-6, rtol=1e-4
    )
    assert float(terms["reward"]) == pytest.approx(-0.5 * float(logs["score"]))
    assert {name: float(terms[name]) for name in plain_terms} == {name: float(v) for name, v in plain_terms.items()}


def test_an_objective_without_images_says_so() -> None:
    with pytest.raises(UserError, match="no image codec"):
        list(CDMObjective(reward=Reward(brightness)).student_losses(sample_of(torch.zeros(3, *SHAPE))))


def test_clip_scores_as_the_metric_does_and_its_gradient_is_the_slope() -> None:
    scorer = CLIPReward(f"local-dir:{asset_path('tiny_clip')}")
    prompts = ["a large red circle", "a small blue square"]
    images = render([parse_caption(prompt) for prompt in prompts], 0).requires_grad_(True)
    scores = scorer(images, prompts)
    with torch.no_grad():
        expected = F.cosine_similarity(scorer.model.encode_images(images), scorer.model.encode_texts(prompts))
    torch.testing.assert_close(scores.detach(), expected)
    assert (scorer(images, prompts[::-1]) < scores).all()
    (slope,) = torch.autograd.grad(scores.sum(), images)
    step = 1e-2 * slope / slope.norm()
    with torch.no_grad():
        gained = scorer(images + step, prompts).sum() - scorer(images - step, prompts).sum()
    assert float(gained) == pytest.approx(2e-2 * float(slope.norm()), rel=0.05)


# ---- in a run

CLIP = ["+objective/reward=clip", "objective.reward.scorer.model=local-dir:${asset:tiny_clip}"]
CLIP += ["objective.reward.scorer.pretrained=null"]


def test_a_run_learns_from_clip(tmp_path) -> None:
    small = ["experiment=toy2d_cdm", "trainer.max_steps=2", "data.batch_size=2", "backbone.hidden=8"]
    small += ["backbone.depth=1", "backbone.fit_steps=2", "data.train.prompts=[a ring, a circle]"]
    small += ["callbacks=none", "metric=[]", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1"]
    metrics = train(compose([*small, *CLIP, f"output_dir={tmp_path}"])).metrics
    assert -1 < metrics["student/score"] < 1
    assert metrics["student/reward"] == pytest.approx(-metrics["student/score"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [CLIP, ["+objective/first_step=dp_dmd", "objective.first_step.weight=1"]], ids=["reward", "first_step"]
)
def test_added_parts_learn_the_same_on_two_sharded_processes(part, toy_overrides, tmp_path) -> None:
    made = [*toy_overrides, "trainer.max_steps=4"]
    made += [f"optim.{role}.optimizer.eps=1e-3" for role in ("student", "fake_score")]
    one = train(compose([*made, *part, "data.batch_size=4", f"output_dir={tmp_path / 'one'}"])).folder
    plain = train(compose([*made, "data.batch_size=4", f"output_dir={tmp_path / 'plain'}"])).folder
    place = ["strategy=fsdp2", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2"]
    train_together(2, [*made, *part, *place, f"output_dir={tmp_path / 'two'}"])
    assert furthest(one, tmp_path / "two") < 2e-6 < 1e-5 < furthest(one, plain)


def furthest(a: Path, b: Path) -> float:
    """The largest difference of any two weights in the newest checkpoints of two runs."""
    left, right = (newest_checkpoint(folder / "checkpoints").tensors("networks.") for folder in (a, b))
    return max((value - right[name]).abs().max().item() for name, value in left.items())


@pytest.mark.slow
def test_the_planner_says_that_it_leaves_the_reward_out(capsys) -> None:
    (planned,) = planner.plan(["experiment=tiny_sd3_cdm", *CLIP, "gpus=1x80"])
    assert planned.total > 0
    assert "objective.reward is not counted" in capsys.readouterr().err
