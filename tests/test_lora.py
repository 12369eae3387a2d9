"""Three roles on one base: every role computes and learns as a network of its own would."""

from types import SimpleNamespace

import pytest
import torch
from core.samples import summed
from torch import Tensor, nn
from torch.func import functional_call

from cdm_lightning.backbones.base import BoundField
from cdm_lightning.backbones.sd3 import SD3Backbone
from cdm_lightning.config import build, compose
from cdm_lightning.core.ema import lerp_parameters_
from cdm_lightning.core.flow import evaluate_together
from cdm_lightning.core.lengths import UniformLength
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.core.schedules import RandomSchedule
from cdm_lightning.data.batches import PromptBatch
from cdm_lightning.errors import UserError
from cdm_lightning.evaluation.samplers import device_of
from cdm_lightning.exporting.pipeline import rehearse_fusion
from cdm_lightning.lora.fuse import fuse
from cdm_lightning.lora.plan import Adapter, LoRAPlan
from cdm_lightning.lora.weights import AdapterWeights
from cdm_lightning.module import CDMModule
from cdm_lightning.objectives.cdm import CDMObjective
from cdm_lightning.training.gradient_checkpointing import Recomputation
from cdm_lightning.training.networks import Networks
from cdm_lightning.training.optim import LearningRate, OptimizerRecipe

CDM_ROLES = CDMObjective().roles

PROMPTS = ["a large red circle", "a small blue square above a green ring", "a ring", "a star"]
ROLES = ("student", "fake_score", "student_ema")
ADAPTER = Adapter(rank=3, alpha=6)
BOTH = LoRAPlan(student=ADAPTER, fake_score=ADAPTER)
KINDS = [
    ADAPTER,
    Adapter(rank=4, alpha=2, use_rslora=True, targets="attention"),
    Adapter(rank=2, alpha=2, use_dora=True),
]


@pytest.fixture(scope="module")
def backbone(tiny_pipeline_folder) -> SD3Backbone:
    backbone = SD3Backbone(str(tiny_pipeline_folder), max_sequence_length=8)
    backbone.setup(torch.device("cpu"))
    return backbone


def moved(networks: Networks, *roles: str) -> Networks:
    """Adapters as training leaves them: no factor is zero, no two roles are alike."""
    for number, role in enumerate(roles or ROLES):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in getattr(networks, role).parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return networks


def built(backbone, plan: LoRAPlan = BOTH, checkpointing: bool | Recomputation = False, seed: int = 0) -> Networks:
    recomputation = checkpointing if isinstance(checkpointing, Recomputation) else Recomputation(float(checkpointing))
    return moved(
        Networks(backbone, CDM_ROLES, recomputation, plan, seed), *plan.among(("student", "fake_score", "student_ema"))
    )


def inputs(backbone, count: int = 4) -> tuple[Tensor, Tensor, dict]:
    rng = StepRandom(0, 0, range(count), "cpu")
    return rng.normal("x", backbone.latent_shape), rng.uniform("sigma"), backbone.encode_prompts(PROMPTS[:count])


def velocity(backbone, network: nn.Module) -> Tensor:
    x, sigma, cond = inputs(backbone)
    with torch.no_grad():
        return BoundField(backbone, network, cond)(x, sigma)


# ---- roles


@pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: adapter.tag)
def test_all_roles_start_as_the_base_and_the_base_stays_the_teacher(backbone, adapter):
    networks = Networks(backbone, CDM_ROLES, lora=LoRAPlan(student=adapter, fake_score=adapter))
    pretrained = velocity(backbone, backbone.build_teacher())
    assert torch.equal(velocity(backbone, networks.teacher), pretrained)
    for role in ROLES:
        torch.testing.assert_close(velocity(backbone, getattr(networks, role)), pretrained, rtol=0, atol=1e-5)
    moved(networks)
    assert torch.equal(velocity(backbone, networks.teacher), pretrained)
    outputs = [velocity(backbone, getattr(networks, role)) for role in ROLES] + [pretrained]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_a_view_has_the_adapters_parameters_and_no_others(backbone):
    networks = built(backbone)
    layers = len(networks.student.shared.layers)
    assert layers > 10
    for role in ROLES:
        parameters = dict(getattr(networks, role).named_parameters())
        assert len(parameters) == 2 * layers
        assert {value.dtype for value in parameters.values()} == {torch.float32}
        assert all(".lora_A." in name or ".lora_B." in name for name in parameters)
        assert all(value.requires_grad == (role != "student_ema") for value in parameters.values())
    assert set(networks.state_dict()) == {f"{role}.{name}" for role in ROLES for name in parameters}
    teacher = dict(networks.teacher.named_parameters())
    assert teacher.keys() == dict(backbone.build_teacher().named_parameters()).keys()
    assert not any(value.requires_grad for value in teacher.values())
    assert device_of(networks.teacher).type == "cpu"


def test_the_base_moves_with_the_teacher_and_the_views_with_the_module(backbone):
    networks = built(backbone)
    base = networks.student.shared.network
    held = list(networks.student.parameters())
    networks.place(torch.device("cpu"))
    networks.teacher.double()  # a change of dtype, as a change of device cannot be seen here
    assert base.pos_embed.pos_embed.dtype == base.proj_out.weight.dtype == torch.float64
    assert all(a is b for a, b in zip(held, networks.student.parameters()))


def test_roles_in_any_order_and_in_one_batch(backbone):
    networks = built(backbone, checkpointing=True)
    alone = {role: velocity(backbone, getattr(networks, role)) for role in (*ROLES, "teacher")}
    for role in ("student", "teacher", "fake_score", "student", "student_ema", "teacher"):
        assert torch.equal(velocity(backbone, getattr(networks, role)), alone[role])
    x, sigma, cond = inputs(backbone)
    fields = [BoundField(backbone, getattr(networks, role), cond) for role in ("student", "fake_score", "student")]
    assert fields[0].join([fields[2]]) is not None
    assert fields[0].join([fields[1]]) is None
    with torch.no_grad():
        together = evaluate_together([(fields[0], x, sigma), (fields[2], x.flip(0), sigma.flip(0))])
    torch.testing.assert_close(together[0], alone["student"], rtol=0, atol=1e-5)


def test_an_error_in_a_call_leaves_the_adapters_off(backbone):
    networks = built(backbone)
    with pytest.raises(TypeError):
        networks.student(nonsense=1)
    assert torch.equal(velocity(backbone, networks.teacher), velocity(backbone, backbone.build_teacher()))


def test_the_start_depends_on_the_seed_and_not_on_the_global_generator(backbone):
    torch.manual_seed(1)
    one = Networks(backbone, CDM_ROLES, lora=BOTH, seed=5)
    torch.manual_seed(2)
    same, other = Networks(backbone, CDM_ROLES, lora=BOTH, seed=5), Networks(backbone, CDM_ROLES, lora=BOTH, seed=6)
    for name, value in one.student.named_parameters():
        assert torch.equal(value, same.student.get_parameter(name))
        assert torch.equal(value, one.fake_score.get_parameter(name))
        assert torch.equal(value, one.student_ema.get_parameter(name))
        if ".lora_A." in name:
            assert not torch.equal(value, other.student.get_parameter(name))
            assert value.abs().max() <= value.shape[1] ** -0.5
            assert value.std() > 0.4 * value.shape[1] ** -0.5
        else:
            assert not value.any()


def test_averages_are_of_factors(backbone):
    networks = built(backbone)
    name = next(iter(dict(networks.student.named_parameters())))
    expected = torch.lerp(networks.fake_score.get_parameter(name), networks.student.get_parameter(name), 0.25)
    lerp_parameters_(networks.fake_score, networks.student, 0.25)
    assert torch.equal(networks.fake_score.get_parameter(name), expected)


def test_adapters_stay_float32_on_a_bfloat16_base(tiny_pipeline_folder):
    backbone = SD3Backbone(str(tiny_pipeline_folder), max_sequence_length=8, teacher_dtype="bfloat16")
    backbone.setup(torch.device("cpu"))
    networks = built(backbone, LoRAPlan(student=Adapter(rank=2, use_dora=True), fake_score=None), checkpointing=True)
    assert networks.student.dtype == networks.teacher.dtype == torch.bfloat16
    assert next(networks.fake_score.parameters()).dtype == torch.float32
    x, sigma, cond = inputs(backbone, count=1)
    for compute_dtype in (torch.float32, torch.bfloat16):
        BoundField(backbone, networks.student, cond, compute_dtype)(x, sigma).square().mean().backward()
        gradients = [parameter.grad for parameter in networks.student.parameters()]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
        assert max(g.abs().max() for g in gradients) > 0
        networks.student.zero_grad()


# ---- gradients


class LowRankNetwork(nn.Module):
    """A whole network with weights W + scale B A, of which the factors are trained: no peft, no sharing."""

    def __init__(self, network: nn.Module, weights: AdapterWeights) -> None:
        super().__init__()
        self.network, self.scale = network.requires_grad_(False), weights.adapter.scale
        self.factors = {name: nn.Parameter(value.clone()) for name, value in weights.tensors.items()}
        self.dtype = torch.float32

    def forward(self, **arguments):
        changed = {}
        for name, a in self.factors.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                b = self.factors[f"{layer}.lora_B.weight"]
                changed[f"{layer}.weight"] = self.network.get_parameter(f"{layer}.weight") + self.scale * (b @ a)
        return functional_call(self.network, changed, args=(), kwargs=arguments)


def make_module(backbone, networks) -> CDMModule:
    recipe = OptimizerRecipe(torch.optim.SGD, LearningRate(1.0))
    optim = {"student": recipe, "fake_score": recipe}
    module = CDMModule(backbone, CDMObjective(), RandomSchedule(UniformLength(2, 3)), optim)
    object.__setattr__(module, "networks", networks)
    module.rollouts = module.make_rollouts(torch.device("cpu"))
    return module


def losses(module: CDMModule, slots: list[int]) -> tuple[Tensor, Tensor]:
    """(student's, fake score's) of one iteration with the prompts of these slots."""
    (sample,) = module.rollouts.samples(PromptBatch([PROMPTS[i] for i in slots], torch.tensor(slots)), 0)
    losses = (module.objective.student_losses, module.objective.fake_score_losses)
    student, fake_score = (summed(of_role(sample)).total for of_role in losses)
    return student, fake_score


def gradients(network: nn.Module) -> dict[str, Tensor]:
    named = network.factors.items() if isinstance(network, LowRankNetwork) else network.named_parameters()
    return {name: parameter.grad for name, parameter in named}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * max(value.norm(), 1e-3 * largest), name


@pytest.fixture(scope="module")
def separate(backbone) -> dict[str, dict[str, Tensor]]:
    """Gradients of student and fake score as three networks that share nothing."""
    networks = built(backbone)
    apart = {role: LowRankNetwork(backbone.build_network(), getattr(networks, role).weights) for role in ROLES[:2]}
    parts = SimpleNamespace(
        **apart,
        average={"student_ema": apart["student"]},
        teacher=backbone.build_teacher(),
        trained=apart,
        built_roles=(),
    )
    for loss in losses(make_module(backbone, parts), [0, 1, 2, 3]):
        loss.backward()
    return {role: gradients(network) for role, network in apart.items()}


@pytest.mark.parametrize("checkpointing", [False, True, Recomputation(0.5), Recomputation(1.0, attention=False)])
def test_gradients_are_those_of_separate_networks(backbone, separate, checkpointing):
    networks = built(backbone, checkpointing=checkpointing)
    student, fake_score = losses(make_module(backbone, networks), [0, 1, 2, 3])
    velocity(backbone, networks.student_ema)
    velocity(backbone, networks.teacher)
    with networks.student.shared.running("fake_score"):  # the adapter that happens to be on at the backward pass
        student.backward()
    with networks.student.shared.running(None):
        fake_score.backward()
    assert_close(gradients(networks.student), separate["student"])
    assert_close(gradients(networks.fake_score), separate["fake_score"])
    assert all(parameter.grad is None for parameter in networks.student_ema.parameters())
    assert all(parameter.grad is None for parameter in networks.teacher.parameters())


def test_unguarded_checkpointing_would_give_other_gradients(backbone, separate):
    """The reason for `SharedBase.with_its_adapter`, and the proof that the test above can fail."""
    networks = built(backbone)
    backbone.enable_gradient_checkpointing(networks.student.shared.network)
    student, _ = losses(make_module(backbone, networks), [0, 1, 2, 3])
    with networks.student.shared.running("fake_score"):
        student.backward()
    found = {name: g for name, g in gradients(networks.student).items() if g is not None}
    with pytest.raises(AssertionError):
        assert_close(found, separate["student"])


@pytest.mark.parametrize(
    "plan",
    [LoRAPlan(student=ADAPTER, fake_score=None), LoRAPlan(student=None, fake_score=ADAPTER)],
    ids=["student", "fake_score"],
)
def test_mixed_modes_learn_as_separate_networks(backbone, separate, plan):
    networks = built(backbone, checkpointing=True, plan=plan)
    whole = built(backbone)
    for role in ("student", "fake_score"):  # the one that is tuned as a whole starts from the same function
        if plan.of(role) is None:
            state = fuse(getattr(whole, role).weights, backbone.build_network()).state_dict()
            getattr(networks, role).load_state_dict(state)
        else:
            getattr(networks, role).load_state_dict(getattr(whole, role).state_dict())
    student, fake_score = losses(make_module(backbone, networks), [0, 1, 2, 3])
    fake_score.backward()
    student.backward()
    adapted = "student" if plan.of("student") else "fake_score"
    assert_close(gradients(getattr(networks, adapted)), separate[adapted], tolerance=1e-3)
    tuned = getattr(networks, "fake_score" if plan.of("student") else "student")
    assert all(parameter.grad is not None for parameter in tuned.parameters() if parameter.requires_grad)


def test_a_batch_is_the_mean_of_its_halves(backbone):
    """What averaging gradients over two processes computes; `test_strategies.py` has the processes."""

    def of(*parts: list[int]) -> dict[str, dict[str, Tensor]]:
        networks = built(backbone, checkpointing=True)
        for part in parts:
            for loss in losses(make_module(backbone, networks), part):
                (loss / len(parts)).backward()
        return {role: gradients(getattr(networks, role)) for role in ROLES[:2]}

    whole, halves = of([0, 1, 2, 3]), of([0, 1], [2, 3])
    for role in whole:
        assert_close(halves[role], whole[role], tolerance=1e-3)


# ---- fusing


@pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: adapter.tag)
def test_a_fused_network_computes_what_the_view_computes(backbone, adapter):
    networks = built(backbone, LoRAPlan(student=adapter, fake_score=None))
    fused = fuse(networks.student.weights, backbone.build_network())
    assert fused.state_dict().keys() == backbone.build_network().state_dict().keys()
    assert not hasattr(fused, "peft_config")
    torch.testing.assert_close(velocity(backbone, fused), velocity(backbone, networks.student), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: adapter.tag)
def test_a_fusion_is_rehearsed_without_weights(backbone, adapter):
    networks = built(backbone, LoRAPlan(student=adapter, fake_score=None))
    before = {name: value.clone() for name, value in networks.student.state_dict().items()}
    rehearse_fusion(backbone, networks.student)
    rehearse_fusion(backbone, networks.fake_score)  # no LoRA: nothing to do
    assert all(torch.equal(value, before[name]) for name, value in networks.student.state_dict().items())
    layer, _, last = next(name for name in before if name.endswith("lora_B.weight")).rpartition(".")
    delattr(networks.student.get_submodule(layer), last)
    with pytest.raises(
        UserError, match=r"^the student's LoRA cannot be fused .*; set callbacks.ladder=null, and"
    ) as told:
        rehearse_fusion(backbone, networks.student)
    assert "\n" not in str(told.value)


# ---- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=lora_student"], "set objective.fake_score_merge=0"),
        (["lora=lora", "lora.student.rank=8"], "set objective.fake_score_merge=0"),
        (["lora=lora", "lora.student.rank=0"], "lora.student.rank=0 must be a whole number of at least 1"),
        (["lora=lora", "lora.student.targets=everything"], "use attention, attention_feed_forward"),
        (["lora=lora", "lora.student.targets=[]"], "a list with at least 1 entry"),
        (["experiment=toy2d_cdm", "lora=lora"], "use blocks"),
    ],
)
def test_settings_that_cannot_work_are_one_line_before_anything_is_loaded(tmp_path, overrides, message):
    with pytest.raises(UserError, match="lora") as caught:
        build(compose([f"output_dir={tmp_path}", "experiment=tiny_sd3_cdm", *overrides]), "module")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_are_not_there(backbone):
    with pytest.raises(UserError, match="name ending in to_qq"):
        Networks(backbone, CDM_ROLES, lora=LoRAPlan(student=Adapter(targets=["to_q", "to_qq"])))
    listed = Networks(backbone, CDM_ROLES, lora=LoRAPlan(student=Adapter(rank=1, targets=["attn.to_q", "proj_out"])))
    names = list(listed.student.shared.layers)
    assert "proj_out" in names
    assert all(name == "proj_out" or name.endswith(".attn.to_q") for name in names)


def test_the_toy_has_its_closed_form_teacher_beside_the_shared_base(tmp_path):
    from cdm_lightning.backbones.toy2d import MixtureVelocity, Toy2DBackbone

    adapter = Adapter(rank=2, targets="blocks")
    networks = Networks(
        Toy2DBackbone(hidden=16, depth=2, fit_steps=5),
        CDM_ROLES,
        Recomputation(1.0),
        LoRAPlan(student=adapter, fake_score=adapter),
    )
    assert isinstance(networks.teacher, MixtureVelocity)
    networks.place(torch.device("cpu"))
    x, sigma, weights = torch.randn(3, 2), torch.rand(3), torch.full((3, 8), 1 / 8)
    networks.student(x, sigma, weights).sum().backward()
    assert all(parameter.grad is not None for parameter in networks.student.parameters())
