"""The planner's arithmetic, exactly; its memory and FLOPs against a real training step, within 10 %."""

import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cdm_lightning import plan as planner
from cdm_lightning.config import build, compose
from cdm_lightning.core.lengths import (
    CategoricalLength,
    FixedLength,
    GeometricLength,
    LogUniformLength,
    UniformLength,
)
from cdm_lightning.core.rng import StepRandom
from cdm_lightning.errors import UserError
from cdm_lightning.planning.advice import faster, further, remedies
from cdm_lightning.planning.layout import GPUs, Layout, make_layout, read_gpus
from cdm_lightning.planning.live import LiveBytes, Timeline, storages
from cdm_lightning.planning.memory import (
    TEXT,
    Sizes,
    at_once,
    checkpoint_bytes,
    gathered,
    largest_batch,
    phase_peaks,
    resting,
    total,
)
from cdm_lightning.planning.recipe import optimizer_bytes, read_recipe
from cdm_lightning.planning.skeleton import hollow
from cdm_lightning.planning.step import every_network
from cdm_lightning.planning.work import Work, expected_calls, hours
from cdm_lightning.training.gradient_checkpointing import Recomputation

BATCH = 6

# ---- arithmetic

STEP = Timeline(fixed=(0, 10, 100), sample=(0, 50, 5), gradient=(0, 0, 80))
ROLE = 100.0


def sizes(**changes) -> Sizes:
    given = {
        "networks": {"student": ROLE, "fake_score": ROLE, "student_ema": ROLE, "teacher": 50.0},
        "trained": {"student": ROLE, "fake_score": ROLE},
        "buffers": {"student": 2.0, "teacher": 1.0},
        "states": {"student": 200.0, "fake_score": 200.0},
        "step_copies": {"student": 100.0, "fake_score": 100.0},
        "text": 30.0,
        "vae": 7.0,
        "largest_block": 4,
        "outside_blocks": 5,
        "compute": 2,
        "phases": {"rollout": Timeline((0, 3), (0, 1), (0, 0)), "fake_score": STEP, "student": STEP},
    }
    return Sizes(**{**given, **changes})


def test_a_timeline_is_affine_in_the_batch_at_each_moment() -> None:
    assert STEP.peak(1) == 105
    assert STEP.peak(3) == 160  # another moment is the worst
    assert STEP.peak(1, gradient_share=0.5, fixed_share=0.0) == 50


def test_one_gpu() -> None:
    single = Layout("single")
    assert sum(resting(sizes(), single).values()) == 350 + 3 + 400 + 30 + 7
    assert phase_peaks(sizes(), single, 3) == {"rollout": 6, "fake_score": 160, "student": 160, "optimizer step": 200}
    assert total(sizes(), single, 3) == 790 + 200
    assert largest_batch(sizes(), single, 790 + 260) == 5  # 10 + 50 B <= 260
    assert largest_batch(sizes(), single, 790) == 0
    assert checkpoint_bytes(sizes()) == 702


def test_memory_that_is_left_is_spoken_of() -> None:
    parts = "compute.gradient_checkpointing=false compute.accumulate=8"
    assert faster(Recomputation(1.0), 0.5, batch=16) == ["compute.recompute_attention=false", parts]
    assert faster(Recomputation(0.5, attention=False), 0.5, batch=16) == [parts]
    assert faster(Recomputation(1.0), 0.1, batch=16) == []
    assert faster(Recomputation(0.0), 0.5, batch=16) == []
    assert further(Recomputation(0.5), lora=True) == ["compute.gradient_checkpointing=true"]
    assert further(Recomputation(1.0), lora=False) == ["lora=lora"]


def test_shards() -> None:
    layout = make_layout("fsdp2", 4, ["student_ema"])
    rest = resting(sizes(), layout)
    assert rest["weights: student"] == 25
    assert rest["weights: student_ema"] == 0
    assert rest["optimizer states"] == 100
    assert gathered(sizes(), layout) == (5 + 8) * 2 + 8 * 4
    assert phase_peaks(sizes(), layout, 1)["student"] == max(50, 80 / 4 + 5) + 58
    adapter = sizes(held_whole=frozenset({"student"}))  # an adapter, or a head, is whole on every GPU
    assert resting(adapter, layout)["weights: student"] == ROLE
    assert resting(adapter, layout)["optimizer states"] == 200 + 50
    assert phase_peaks(adapter, layout, 1)["student"] == max(50, 80 + 5) + 58
    hybrid = make_layout("hsdp", 16)
    assert (hybrid.replicas, hybrid.shards) == (2, 8)


def test_remedies_say_what_they_save() -> None:
    found = {r.overrides.split(" ")[0]: r for r in remedies(sizes(), Layout("ddp", replicas=2), GPUs(2, 1), 3)}
    assert found["strategy.on_cpu=[student_ema]"].saves == ROLE
    assert found["text_cache.folder=DIR"].saves == 30
    assert found["strategy=fsdp2"].saves > 350
    assert found["optim=adamw8bit"].saves == pytest.approx(400 * (1 - 2.03 / 8))
    together = found["all"]
    assert together.saves > max(remedy.saves for name, remedy in found.items() if name != "all")
    assert together.batch >= max(remedy.batch for remedy in found.values())


def test_text_encoders_in_host_memory_take_memory_only_while_they_encode() -> None:
    single, few, many = Layout("single"), sizes(text_rests=True), sizes(text=300.0, text_rests=True)
    assert total(sizes(), single, 3) - total(few, single, 3) == 30
    assert phase_peaks(few, single, 3)[TEXT] == 30
    assert resting(few, single)["text encoders"] == 0
    assert total(many, single, 3) == 760 + 300  # no phase of an iteration takes as much
    assert largest_batch(many, single, 760 + 299) == 0
    assert "text_cache.folder=DIR" not in [r.overrides.split(" ")[0] for r in remedies(few, single, GPUs(1, 1), 3)]


def test_a_batch_in_parts_takes_the_memory_of_the_largest() -> None:
    single, gpu = Layout("single"), GPUs(1, 1.2e-6, reserve=0.0)
    assert at_once(10, 3) == 4
    assert largest_batch(sizes(), single, 790 + 240 + 100, accumulate=4) == 4 * 5  # 10 + 50 B + 80 <= 340
    assert STEP.peak(1, repeated=True) == 140  # 10 + 50 with all 80 of the gradients, where it was 105
    assert phase_peaks(sizes(), single, 3, accumulate=3)["student"] == 140
    found = {r.overrides: r for r in remedies(sizes(), single, gpu, 30, accumulate=2)}
    whole, parts = total(sizes(), single, 30, 2), total(sizes(), single, 30, 30)
    assert found["compute.accumulate=30"].saves == whole - parts
    assert found["compute.accumulate=30"].batch % 30 == 0
    assert total(sizes(), single, found["compute.accumulate=30"].batch, 30) <= gpu.usable
    assert "compute.accumulate=30" not in {r.overrides for r in remedies(sizes(), single, gpu, 30, accumulate=30)}


def test_work() -> None:
    calls = {kind: expected_calls(14.5, kind) for kind in ("to_anchor", "full", "none")}
    assert calls == {"to_anchor": 7.75, "full": 14.5, "none": 0.0}
    assert Work(7.75, 15.5, {"fake_score": 12.0, "student": 5.0}).total == 32.5
    assert hours(1e12, batch=10, iterations=360, peak_tflops=2, utilisation=0.5) == 1.0


@pytest.mark.parametrize(
    "length", [UniformLength(1, 28), FixedLength(4), GeometricLength(), LogUniformLength(), CategoricalLength()]
)
def test_mean_lengths_are_those_of_the_draws(length) -> None:
    rng = torch.Generator().manual_seed(0)
    draws = torch.tensor([length.sample(rng) for _ in range(4000)], dtype=torch.float64)
    assert abs(draws.mean() - length.mean) < 4 * max(draws.std().item(), 1e-9) / 4000**0.5


@pytest.mark.parametrize("text", ["8", "0x80", "ax80", "8x", "8x-1"])
def test_gpus_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="COUNTxGB"):
        read_gpus(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=sd3_cdm"], "gpus is missing"),
        (["gpus=2x80", "strategy=single"], "one GPU"),
        (["gpus=12x80", "strategy=hsdp"], "nodes of 8"),
        (["gpus=1x80", "strategy=magic"], "is not one of"),
        (["gpus=1x80", "utilisation=much"], "utilisation: 'much' must be a number of at least 0.0001 and at most 1"),
        (["gpus=1x80", "--multirun"], "takes only arguments KEY=VALUE"),
        (["gpus=1x80", "backbone.pretrained=some/model"], "to its folder"),
        (["gpus=1x80", "experiment=z_image_cdm"], "the planner cannot plan Z-Image"),
        (["gpus=1x80", "experiment=toy2d_cdm"], "pipelines of diffusers"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planner.plan(arguments)


def test_a_shipped_architecture_tells_all_sizes() -> None:
    """Nothing is asked of the hub: 77 tokens of CLIP and 256 of T5, and SD3-Medium's 2.03 billion weights."""
    backbone = build(compose(["experiment=sd3_cdm", "output_dir=."]), "module").backbone
    frozen = hollow(backbone)
    blank, network = backbone.blank_conditioning(2), backbone.build_network()
    assert {name: value.shape for name, value in blank.items()} == {
        "prompt_embeds": (2, 333, 4096),
        "pooled": (2, 2048),
    }
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(2.03e9, rel=0.01)
    assert backbone.time_embedding_width == backbone.feature_width == 1536
    assert frozen.vae == 83819683
    assert "folder" not in backbone.shared


# ---- against a real step


class Remembered:
    """A text cache of one text, so that no text encoder runs in the step that is measured."""

    def __init__(self, cond) -> None:
        self.cond = cond

    def encode(self, prompts):
        return {name: value.repeat_interleave(len(prompts), 0) for name, value in self.cond.items()}

    def to(self, device) -> None:
        pass


class Meter(L.Callback):
    """Peak bytes of iterations 0 to 3, beside all that rests between iterations, and FLOPs of 4 and 5.

    Not both at once: hooks of `FlopCounterMode` keep recomputed activations alive.
    """

    def __init__(self) -> None:
        self.peaks, self.flops = [], []

    def on_train_batch_start(self, trainer, module, *_) -> None:
        known = [tensor for network in every_network(module.networks) for tensor in storages(network)]
        for optimizer in trainer.optimizers:
            known += [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        self.live, self.counter = LiveBytes(known), FlopCounterMode(display=False)
        self.mode = self.live if len(self.peaks) < 4 else self.counter
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.mode.__exit__(None, None, None)
        self.peaks.append(self.live.timeline.peak(0))
        self.flops.append(self.counter.get_total_flops())


def data_of(config, module):
    return build(config, "data", groups=module.groups.of, images=module.objective.needs_latents)


def measure(config) -> Meter:
    module, meter = build(config, "module"), Meter()
    shape = module.backbone.latent_shape
    module.backbone.encode_images = lambda images: torch.zeros(len(images), *shape)  # the plan leaves this work out
    module.backbone.setup(torch.device("cpu"))
    module.backbone.use_text_cache(Remembered(module.backbone.encode_prompts(["a red circle"])))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        max_epochs=-1,
        callbacks=[meter],
        logger=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data_of(config, module))
    return meter


@pytest.fixture(scope="session")
def larger_sd3(tmp_path_factory) -> Path:
    from cdm_lightning.pretraining.tiny_sd3 import build_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "larger_sd3"
    build_pipeline(seed=0, heads=4, layers=6).save_pretrained(folder)
    return folder


CHECKPOINTED = "compute.gradient_checkpointing=true"
PLAIN = "compute.gradient_checkpointing=false"


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("sd3", [PLAIN]),
        pytest.param("sd3", [CHECKPOINTED], marks=pytest.mark.slow),
        pytest.param("larger_sd3", [PLAIN], marks=pytest.mark.slow),
        pytest.param("larger_sd3", [CHECKPOINTED], marks=pytest.mark.slow),
        pytest.param(
            "larger_sd3",
            ["compute.gradient_checkpointing=0.5", "compute.recompute_attention=false"],
            marks=pytest.mark.slow,
        ),
        ("sd3", [PLAIN, "lora=lora", "lora.student.rank=8", "lora.fake_score.rank=8"]),
        pytest.param("sd3", [PLAIN, "objective=dmd"], marks=pytest.mark.slow),
        pytest.param("larger_sd3", [PLAIN, "compute.accumulate=2"], marks=pytest.mark.slow),
        pytest.param("longcat", [PLAIN], marks=pytest.mark.slow),
        ("longcat", [CHECKPOINTED]),
    ],
)
def test_the_plan_is_within_ten_percent_of_a_real_step(
    family: str, overrides: list[str], tiny_folder, larger_sd3: Path, tmp_path: Path, monkeypatch
) -> None:
    """Of rollouts of two steps that are all trained on at the second: every sample walks one."""
    monkeypatch.setattr(StepRandom, "index", lambda rng, purpose, high: torch.full((len(rng),), high - 1))
    folder = larger_sd3 if family == "larger_sd3" else tiny_folder(family)
    config = compose(
        [
            f"experiment={'longcat' if family == 'longcat' else 'sd3'}_cdm",
            f"backbone.pretrained={folder}",
            "backbone.teacher_dtype=float32",
            "backbone.text_dtype=float32",
            "module.compute_dtype=float32",
            *(["backbone.height=64", "backbone.width=64"] if family == "longcat" else []),
            "schedule=fixed",
            "schedule.sigmas=[1.0,0.5]",
            f"data.batch_size={BATCH}",
            "data.num_workers=0",
            f"output_dir={tmp_path}",
            *overrides,
        ]
    )
    meter = measure(config)
    recipe = read_recipe(build(config, "module"), text_cached=True)
    planned = phase_peaks(recipe.sizes, Layout("single"), BATCH, config.compute.accumulate)
    between, student = max(planned["rollout"], planned["fake_score"]), max(planned.values())
    print(family, overrides, "memory", between / meter.peaks[2], student / meter.peaks[3])
    assert between == pytest.approx(meter.peaks[2], rel=0.1)
    assert student == pytest.approx(meter.peaks[3], rel=0.1)
    work = recipe.work
    call = work.rollout / work.rollout_calls
    fake_score, student_turn = work.updates["fake_score"], 2 * work.updates["student"]
    expected = [BATCH * (calls * call + fake_score) for calls in (3, 1)]  # both walk in the first iteration
    expected[1] += BATCH * student_turn
    print("flops", [one / measured for one, measured in zip(expected, meter.flops[4:])])
    assert expected == pytest.approx(meter.flops[4:], rel=0.01)


OTHERS = {  # what the two iterations of a cycle do: (student's calls of a rollout of two steps, whether it is updated)
    "consistency": [(2, True), (2, True)],
    "dmd2": [(3, False), (1, True)],  # both iterations walk in the first
    "adaptive": [(2, False), (2, True)],  # each walks for itself
    "level_aware": [(3, False), (1, True)],
}


ADAPTED = (CHECKPOINTED, "lora=lora", "lora.student.rank=8", "lora.fake_score.rank=8")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("adaptive", (PLAIN,)),
        ("dmd2", (PLAIN,)),
        ("level_aware", ADAPTED),
        pytest.param("consistency", (PLAIN,), marks=pytest.mark.slow),
        pytest.param("level_aware", (PLAIN,), marks=pytest.mark.slow),
        pytest.param("dmd2", ADAPTED, marks=pytest.mark.slow),
    ],
)
def test_an_objective_that_the_planner_does_not_know_is_planned_as_well(
    name: str, form: tuple[str, ...], tiny_folder, tmp_path: Path, monkeypatch
) -> None:
    """Memory within 10 % and operations within 1 % of real iterations, whatever roles and updates an objective has."""
    monkeypatch.setattr(StepRandom, "index", lambda rng, purpose, high: torch.full((len(rng),), high - 1))
    config = compose(
        [
            f"hydra.searchpath=[file://{Path(__file__).parent}/other_objectives/conf]",
            f"experiment={name}",
            *(["objective.tolerance=0", "objective.longest=2"] if name == "adaptive" else []),
            "backbone=sd3",
            f"backbone.pretrained={tiny_folder('sd3')}",
            "schedule=fixed",
            "schedule.sigmas=[1.0,0.5]",
            f"data.batch_size={BATCH}",
            f"output_dir={tmp_path}",
            *form,
        ]
    )
    meter = measure(config)
    recipe = read_recipe(build(config, "module"), text_cached=True)
    planned = phase_peaks(recipe.sizes, Layout("single"), BATCH)
    call = recipe.work.rollout / recipe.work.rollout_calls
    of_student = recipe.work.updates["student"]
    others = sum(recipe.work.updates.values()) - of_student
    turns = sum(updated for _, updated in OTHERS[name])
    for number, (calls, updated) in enumerate(OTHERS[name]):
        peaks = [peak for phase, peak in planned.items() if updated or phase not in ("student", "optimizer step")]
        flops = BATCH * (calls * call + others + updated * of_student * 2 / turns)
        print(name, form, "memory", max(peaks) / meter.peaks[2 + number], "flops", flops / meter.flops[4 + number])
        assert max(peaks) == pytest.approx(meter.peaks[2 + number], rel=0.1)
        assert flops == pytest.approx(meter.flops[4 + number], rel=0.01)


def test_tables_of_positions_are_counted_apart(tiny_folder) -> None:
    for overrides, roles in ([], 4), (["lora=lora"], 1):
        config = compose(
            ["experiment=sd3_cdm", f"backbone.pretrained={tiny_folder('sd3')}", "output_dir=.", *overrides]
        )
        config.backbone.teacher_dtype = "float32"
        sizes_now = read_recipe(build(config, "module"), text_cached=True).sizes
        assert sum(sizes_now.buffers.values()) == roles * 4 * 8 * 8 * 32  # float32, (side of the table)^2, width


def test_optimizers_show_what_they_keep() -> None:
    """Adam keeps two numbers a weight; it steps on a copy of all weights unless it is fused."""
    for fused, copy in (("true", 0), ("null", 4)):
        config = compose(["experiment=sd3_cdm", "output_dir=.", f"optim.student.optimizer.fused={fused}"])
        state, copies = optimizer_bytes(build(config, "module").updates.recipes["student"])
        assert state == pytest.approx(8, rel=1e-3)
        assert copies == copy


def test_the_command_plans_a_folder_and_writes_json(tiny_folder, tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "plan.json"
    arguments = ["experiment=sd3_cdm", f"backbone.pretrained={tiny_folder('sd3')}", "gpus=1x24,8x80", f"json={file}"]
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    planner.main()
    text, plans = capsys.readouterr().out, json.loads(file.read_text())
    assert "fits" in text
    assert [p["strategy"] for p in plans] == ["single", "fsdp2"]
    for one in plans:
        assert sum(one["bytes_by_part"].values()) == pytest.approx(one["bytes"], abs=10)
        assert one["rollout_calls"] == 7.75
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("overrides", [[PLAIN], [CHECKPOINTED]])
def test_the_plan_is_within_ten_percent_of_a_real_gpu(dtype: str, overrides: list[str], larger_sd3: Path) -> None:
    from benchmarks.plan_check import check

    found = check(
        [
            "experiment=sd3_cdm",
            f"backbone.pretrained={larger_sd3}",
            f"module.compute_dtype={dtype}",
            "data.num_workers=0",
            "data.batch_size=64",
            *overrides,
        ]
    )
    assert found.planned == pytest.approx(found.measured, rel=0.1), found


PAGE = Path(__file__).parents[1] / "docs" / "planning.md"


@pytest.mark.slow
def test_the_page_shows_what_the_planner_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    ((command, shown),) = re.findall(
        r"^```sh\n(python -m cdm_lightning\.plan [^\n]*)\n```\n\n```text\n(.*?)\n```", page, re.M | re.S
    )
    assert "\n\n".join(map(str, planner.plan(command.split()[3:]))) == shown
    commands = page.split("The commands are:")[1].split("```")[1].splitlines()[1:]
    plans = [str(plan) for line in commands for plan in planner.plan(line.split()[3:])]
    rows = [line for line in page.splitlines() if re.match(r"\| `(sd3|longcat)_cdm", line)]
    assert rows == [row_of(plan) for plan in plans]


def row_of(plan: str) -> str:
    """The row of the page's table for a printed plan."""

    def find(pattern: str) -> str:
        found = re.search(pattern, plan)
        return found[1] if found else "-"

    name, gpus, strategy, batch = re.match(r"(\w+) on (.* GB), strategy=(\w+), (\d+) prompts", plan).groups()
    hours, iterations = find(r"iterations: ([\d.]+) hours"), find(r"(\d+) iterations:")
    cells = [
        f"`{name}`" + (" with a text cache" if "text encoders  " not in plan else ""),
        f"{gpus}, `{strategy}`",
        batch,
        find(r"sum +([\d.]+ GB of [\d.]+) usable").replace(" GB", ""),
        "no" if "does NOT fit" in plan else "yes",
        find(r"largest batch of a GPU (\d+)"),
        find(r"all of these: saves [\d.]+ GB, then the largest batch is (\d+)"),
        find(r"a checkpoint ([\d.]+) GB"),
        f"{hours} ({iterations} iterations)",
    ]
    return "| " + " | ".join(cells) + " |"
