"""Mixed prompts: exact shares, exact order and resume, for any number of workers and ranks."""

from collections import Counter
from types import SimpleNamespace

import pytest

from cdm_lightning.config import build, compose
from cdm_lightning.core.rng import FeistelPermutation
from cdm_lightning.data.batches import EndlessBatches, PromptBatch, ShuffledEpochs
from cdm_lightning.data.datamodule import PromptDataModule
from cdm_lightning.data.mixture import MixedOrder, MixedPrompts, whole_shares
from cdm_lightning.data.prompts import PromptFile, PromptList
from cdm_lightning.errors import UserError


def named(name: str, count: int) -> PromptList:
    return PromptList([f"{name}{number}" for number in range(count)])


def mixture(**weights: float) -> MixedPrompts:
    return MixedPrompts({"a": named("a", 5), "b": named("b", 11), "c": named("c", 3)}, weights or None)


def stream(prompts: MixedPrompts, count: int, seed: int = 0) -> list[str]:
    order = prompts.order(seed)
    return [prompts[order(position)] for position in range(count)]


def test_prompts_lie_one_source_after_the_other():
    prompts = mixture()
    texts = [prompts[i] for i in range(len(prompts))]
    assert texts == [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(11)), *(f"c{i}" for i in range(3))]
    for outside in (-1, 19):
        with pytest.raises(IndexError):
            prompts[outside]


def test_shares_are_exact_in_every_block():
    prompts = mixture(a=0.5, b=0.3, c=0.2)
    assert prompts.shares == [5, 3, 2]
    seen = stream(prompts, 400)
    for start in range(0, 400, 10):
        assert Counter(text[0] for text in seen[start : start + 10]) == {"a": 5, "b": 3, "c": 2}
    orders = {tuple(text[0] for text in seen[start : start + 10]) for start in range(0, 400, 10)}
    assert len(orders) > 30  # not one pattern again and again


def test_every_prompt_of_a_source_comes_equally_often():
    prompts = mixture(a=5, b=3, c=2)
    counts = Counter(stream(prompts, 10 * 5 * 11 * 3))  # whole epochs of all three
    assert {counts[f"a{i}"] for i in range(5)} == {5 * 165 // 5}
    assert {counts[f"b{i}"] for i in range(11)} == {3 * 165 // 11}
    assert {counts[f"c{i}"] for i in range(3)} == {2 * 165 // 3}


def test_without_weights_a_mixture_is_one_shuffled_set():
    prompts = mixture()
    seen = stream(prompts, 38)
    assert sorted(seen[:19]) == sorted(seen[19:]) == sorted(prompts[i] for i in range(19))
    assert seen[:19] != seen[19:]


def test_the_order_is_a_function_of_seed_and_position():
    straight = stream(mixture(a=1, b=2, c=1), 300)
    order = mixture(a=1, b=2, c=1).order(0)
    prompts = mixture(a=1, b=2, c=1)
    backwards = [prompts[order(position)] for position in reversed(range(300))]
    assert backwards[::-1] == straight
    assert stream(mixture(a=1, b=2, c=1), 300, seed=1) != straight


def test_shares_of_sources_of_millions_are_computed_not_held():
    order = MixedOrder([10_000_000, 300], [3, 1], seed=0)
    first, far = [order(position) for position in range(4000)], [order(10**15 + position) for position in range(4000)]
    for numbers in (first, far):
        assert sum(number < 10_000_000 for number in numbers) == 3000
        assert len({number for number in numbers if number < 10_000_000}) > 2990
    assert isinstance(order._orders[0]._numbers, FeistelPermutation)


def test_a_large_epoch_deals_every_prompt_once():
    size = 66_000  # more than are shuffled in memory
    order = ShuffledEpochs(size, seed=1)
    assert sorted(order(place) for place in range(size)) == list(range(size))
    assert [order(place) for place in range(50)] != [order(size + place) for place in range(50)]


def test_ranks_split_the_same_mixed_batch():
    prompts = mixture(a=1, b=2, c=1)

    def draws(batch_size: int, rank: int, world_size: int) -> list[list]:
        order = prompts.order(3)
        batches = EndlessBatches(len(prompts), batch_size, 3, rank=rank, world_size=world_size, order=order)
        return [batches.batch(number) for number in range(20)]

    ranks = zip(*(draws(2, rank, 3) for rank in range(3)))
    assert [a + b + c for a, b, c in ranks] == draws(6, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_with_workers(tmp_path, workers):
    for name, count in (("a", 7), ("b", 4)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(count)))

    def take(start: int, count: int, num_workers: int) -> list[PromptBatch]:
        sources = {name: PromptFile(tmp_path / f"{name}.txt") for name in "ab"}
        module = PromptDataModule(
            MixedPrompts(sources, {"a": 3, "b": 1}), named("v", 2), batch_size=4, seed=5, num_workers=num_workers
        )
        module.trainer = SimpleNamespace(global_step=start, global_rank=0, world_size=1, lightning_module=None)
        loader = iter(module.train_dataloader())
        return [next(loader) for _ in range(count)]

    straight = [batch.prompts for batch in take(0, 20, 0)]
    assert [batch.prompts for batch in take(8, 12, workers)] == straight[8:]
    assert Counter(text[0] for batch in straight for text in batch) == {"a": 60, "b": 20}


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"a": 0.7, "b": 0.3}, [7, 3]),
        ({"a": 0.1, "b": 0.2}, [1, 2]),
        ({"b": 6, "a": 9}, [3, 2]),
        ({"a": "1e-3", "b": 1}, [1, 1000]),
        ({"a": 1 / 3, "b": 2 / 3}, [1, 2]),
    ],
)
def test_weights_become_whole_numbers(weights, shares):
    assert whole_shares(["a", "b"], weights) == shares


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, "data.train.weights names a, but the sources are a, b"),
        ({"a": 1, "b": 0}, "must be positive"),
        ({"a": 1, "b": "many"}, "must be numbers"),
        ({"a": 1, "b": float("nan")}, "must be numbers"),
        ({"a": 0.123457, "b": 0.876543}, "round the weights to a simpler ratio, such as 7 to 3"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(UserError, match=message):
        whole_shares(["a", "b"], weights)
    with pytest.raises(UserError, match="at least one source"):
        MixedPrompts({})


def test_the_configuration_builds_a_mixture(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    overrides = [f"data.train.sources.first.path={tmp_path / 'a.txt'}", "data.train.weights.first=3"]
    data = build(compose(["experiment=sd3_cdm", "data=mixed", f"output_dir={tmp_path}", *overrides]), "data")
    assert data.train.shares == [3, 1]
    assert data.train.summary.startswith(f"75.00% {tmp_path / 'a.txt'}: 2 prompts, left out: 1 blank; 25.00% ")
    assert len(data.train) == 2 + 8192
