"""Random streams: a function of (seed, purpose, iteration, slot), and nothing else."""

import math
import time

import pytest
import torch

from cdm_lightning.core.lengths import FixedLength
from cdm_lightning.core.levels import CappedUniformLevels, LogitNormalLevels, UniformLevels
from cdm_lightning.core.rng import FeistelPermutation, StepRandom, _hash, evaluation_noise, permutation, stream
from cdm_lightning.core.schedules import FixedSchedule, RandomSchedule


def draws(rng: StepRandom) -> list[torch.Tensor]:
    return [
        rng.uniform("a"),
        rng.uniform("b", 5),
        rng.normal("c", (4, 8, 8)),
        rng.gaussian("d"),
        rng.index("e", 1000),
    ]


def test_the_same_whatever_the_number_of_processes():
    whole = draws(StepRandom(1, 7, range(8), "cpu"))
    halves = zip(draws(StepRandom(1, 7, range(4), "cpu")), draws(StepRandom(1, 7, range(4, 8), "cpu")))
    for all_slots, parts in zip(whole, halves):
        assert torch.equal(all_slots, torch.cat(parts))


def test_shared_streams_do_not_depend_on_slots():
    one, two = (StepRandom(1, 7, slots, "cpu").shared("k") for slots in ([0, 1], [6, 7]))
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=two))


def test_a_repeat_draws_anew_and_the_first_is_the_plain_one():
    rng = StepRandom(3, 5, [0, 1], "cpu")
    assert torch.equal(rng.again(0).normal("x", (4,)), rng.normal("x", (4,)))
    draws = [rng.again(repeat).normal("x", (4,)) for repeat in range(3)]
    assert not any(torch.isclose(draws[a], draws[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(rng.again(2).uniform("x"), StepRandom(3, 5, [0, 1], "cpu", 2).uniform("x"))
    assert len({rng.again(repeat).shared("length").initial_seed() for repeat in range(3)}) == 3


@pytest.mark.parametrize("other", [(2, 7, "a"), (1, 8, "a"), (1, 7, "b")], ids=["seed", "iteration", "purpose"])
def test_each_argument_changes_all_draws(other):
    seed, iteration, purpose = other
    one, two = (
        StepRandom(1, 7, range(64), "cpu").uniform("a"),
        StepRandom(seed, iteration, range(64), "cpu").uniform(purpose),
    )
    assert (one != two).all()
    assert one.unique().numel() == 64


def test_shapes_types_and_ranges():
    uniform, rows, normal, scalar, index = draws(StepRandom(1, 7, range(3), "cpu"))
    assert (uniform.shape, rows.shape, normal.shape, scalar.shape, index.shape) == (
        (3,),
        (3, 5),
        (3, 4, 8, 8),
        (3,),
        (3,),
    )
    assert uniform.dtype == rows.dtype == normal.dtype == scalar.dtype == torch.float32
    assert index.dtype == torch.int64
    assert StepRandom(1, 7, range(3), "cpu").uniform("b", 0).shape == (3, 0)


def test_distributions():
    rng = StepRandom(0, 0, range(4000), "cpu")
    uniform, normal, index = rng.uniform("u"), rng.normal("n", (4,)), rng.index("i", 7)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 / (12 * 4000) ** 0.5
    assert abs(normal.mean()) < 4 / 16000**0.5
    assert abs(normal.var() - 1) < 4 * (2 / 16000) ** 0.5
    # neighbouring slots and neighbouring elements are unrelated
    assert abs((normal[1:] * normal[:-1]).mean()) < 4 / 16000**0.5
    counts = torch.bincount(index, minlength=7)
    assert counts.numel() == 7
    assert ((counts - 4000 / 7).abs() < 4 * (4000 / 7) ** 0.5).all()


def test_keys_are_told_apart():
    streams = [(0, "a"), (0, "a", 1), (0, "a", 1, 2), (0, "a", 12), (0, "a 1", 2), (0, "a", 2, 1)]
    assert len({torch.rand((), generator=stream(*key)).item() for key in streams}) == len(streams)


def test_evaluation_noise_depends_on_the_prompt_index_only():
    whole = evaluation_noise(5, range(6), (4, 8, 8), "cpu")
    assert whole.shape == (6, 4, 8, 8)
    assert torch.equal(whole[[4, 1]], evaluation_noise(5, [4, 1], (4, 8, 8), "cpu"))
    assert torch.equal(whole[3:4], evaluation_noise(5, torch.tensor([3]), (4, 8, 8), "cpu"))
    assert (whole[0] != whole[1]).all()
    assert (whole != evaluation_noise(6, range(6), (4, 8, 8), "cpu")).all()


def test_a_draw_for_32_samples_takes_few_milliseconds():
    rng, seconds = StepRandom(0, 0, range(32), "cpu"), []
    for _ in range(9):
        start = time.perf_counter()
        rng.uniform("a")
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[4] < 5e-3  # about 0.1 ms on an idle core


def test_draws_are_a_splitmix64_sequence():
    """Against the published generator in whole numbers of Python; its first output for seed 1234567 is well known."""
    mask = (1 << 64) - 1

    def split_mix(key: int, n: int) -> int:
        z = (key + n * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    assert split_mix(1234567, 1) == 6457827717110365317
    rng, key = StepRandom(1, 7, [0, 5], "cpu"), _hash(1, "a", 7)
    numbers = [[split_mix(key, slot * 2**32 + n) for n in range(3)] for slot in (0, 5)]
    assert torch.equal(rng.uniform("a", 3), torch.tensor([[(z >> 40) * 2**-24 for z in row] for row in numbers]))
    assert rng.index("a", 1000).tolist() == [(row[0] >> 33) * 1000 >> 31 for row in numbers]
    radius = [(-2 * math.log(((row[0] >> 32) + 1) * 2**-32)) ** 0.5 for row in numbers]
    angle = [(row[0] & 0xFFFFFFFF) * 2**-32 * 2 * math.pi for row in numbers]
    expected = torch.tensor([[r * math.cos(a), r * math.sin(a)] for r, a in zip(radius, angle)])
    torch.testing.assert_close(rng.normal("a", (2,)), expected, rtol=1e-5, atol=1e-6)


def test_normal_draws_have_the_normal_distribution():
    """Kolmogorov-Smirnov at 1e-4 and fourth moment, and no correlation between elements, slots or iterations."""
    draws = torch.stack([StepRandom(0, n, range(50), "cpu").normal("a", (4, 5, 5)) for n in range(20)]).double()
    ordered = draws.flatten().sort().values
    share = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    n = len(ordered)
    assert (share - torch.arange(n) / n).abs().max() < 2.23 / n**0.5
    assert abs(draws.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    flat = draws.flatten(2)
    for one, two in ((flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1]), (flat[..., 50:], flat[..., :50])):
        assert abs((one * two).mean()) < 4 / one.numel() ** 0.5


# ---- orders that take no memory


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 1024, 1025])
def test_a_computed_order_has_every_number_once(size):
    order = FeistelPermutation(size, key=7)
    assert sorted(order[place] for place in range(size)) == list(range(size))
    assert len(order) == size
    for outside in (-1, size):
        with pytest.raises(IndexError):
            order[outside]


def test_computed_orders_differ_by_key_and_are_not_the_identity():
    orders = [[FeistelPermutation(1000, key)[place] for place in range(1000)] for key in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    fixed = sum(order[place] == place for order in orders for place in range(1000))
    assert 5 <= fixed <= 45  # 20 expected of uniform orders, standard deviation 4.5


def test_a_computed_order_looks_random():
    size = 1 << 17
    order = FeistelPermutation(size, key=3)
    numbers = torch.tensor([order[place] for place in range(4096)]).double() / size
    assert abs(numbers.mean() - 0.5) < 0.02  # standard error 0.0045
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.06  # 0.016
    counts = torch.histc(numbers, 64, 0, 1)
    assert ((counts - 64) ** 2 / 64).sum() < 120  # chi-square of 63 degrees of freedom: 103 is exceeded once in 1000


def test_orders_depend_on_all_arguments_small_and_large():
    for size in (50, 10_000_000):
        base = [int(permutation(size, 1, "a", 2)[place]) for place in range(50)]
        again = [int(permutation(size, 1, "a", 2)[place]) for place in range(50)]
        others = [permutation(size, *arguments) for arguments in ((2, "a", 2), (1, "b", 2), (1, "a", 3))]
        assert base == again
        assert all([int(other[place]) for place in range(50)] != base for other in others)
    assert isinstance(permutation(50, 1, "a"), torch.Tensor)
    assert isinstance(permutation(10_000_000, 1, "a"), FeistelPermutation)


def test_uniform_and_gaussian_draws_stay_on_the_host_until_they_are_placed():
    """Sigmas are shifted on the host: a draw that is on the device already would have to come back."""
    rng = StepRandom(1, 7, range(3), "meta")
    assert rng.uniform("a").device.type == rng.gaussian("b").device.type == rng.index("c", 4).device.type == "cpu"
    assert rng.place(rng.uniform("a")).device.type == rng.normal("d", (2,)).device.type == "meta"


@pytest.mark.parametrize("space", ["before_shift", "after_shift"])
def test_a_sigma_is_moved_to_the_device_once(space):
    placed = []

    class Watched(StepRandom):
        def place(self, values):
            placed.append(values)
            return super().place(values)

    def shift(sigmas):
        assert sigmas.device.type == "cpu"
        return 3 * sigmas / (1 + 2 * sigmas)

    rng, ceiling = Watched(1, 7, range(3), "meta"), torch.ones(3, device="meta")
    draws = [
        lambda: RandomSchedule(FixedLength(4), space=space).sample(rng, shift),
        lambda: FixedSchedule(space=space).sample(rng, shift),
        lambda: UniformLevels(space=space).sample(rng, "a", ceiling, shift),
        lambda: LogitNormalLevels(space=space).sample(rng, "a", ceiling, shift),
        lambda: CappedUniformLevels().sample(rng, "a", ceiling, shift),
    ]
    for number, draw in enumerate(draws, start=1):
        assert draw().device.type == "meta"
        assert len(placed) == number
