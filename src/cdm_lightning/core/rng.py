"""Random numbers as functions of (seed, purpose, iteration, slot), so that no random state must be saved or restored.

A purpose is a short name of what the numbers are for, such as "rollout.noise". A slot is a sample's index in the global
batch (over all processes), so the numbers do not depend on how many processes share the batch. They are computed on the
CPU, so they do not depend on the device either. Noise is moved to the device at once; sigmas are moved (by `place`) after
they have been shifted, so that the host never waits for the device.

Element n of a slot's draw is number (slot, n) of a SplitMix64 sequence (Steele, Lea and Flood, OOPSLA 2014). The start of
the sequence is a hash of seed, purpose and iteration. SplitMix64 computes each number from its position, so all samples
are drawn at once and no sample needs its own generator.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cdm_lightning.core.flow import Rows
from cdm_lightning.core.transfer import send

GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the constants of SplitMix64
ELEMENTS = 1 << 32  # how many numbers of the sequence belong to one slot
SHUFFLED_IN_MEMORY = 1 << 16  # larger permutations are not stored: each of their numbers is computed when it is needed
ROUNDS = 4  # of the Feistel network: Luby and Rackoff (1988) need four for a strong pseudo-random permutation


def stream(seed: int, purpose: str, *key: int) -> torch.Generator:
    """Return a CPU generator whose seed is a hash of all arguments; it has 32 bits, since torch's CPU generator keeps no more."""
    return torch.Generator().manual_seed(_hash(seed, purpose, *key) % (1 << 32))


def permutation(size: int, seed: int, purpose: str, *key: int) -> "Tensor | FeistelPermutation":
    """Return a pseudo-random permutation of 0..size-1, a function of all arguments; `[place]` gives the number at a place.

    Up to 2^16 numbers are shuffled in memory by `torch.randperm`. A larger permutation is not stored (`FeistelPermutation`).
    """
    if size <= SHUFFLED_IN_MEMORY:
        return torch.randperm(size, generator=stream(seed, purpose, *key))
    return FeistelPermutation(size, _hash(seed, purpose, *key))


class FeistelPermutation:
    """A pseudo-random permutation of 0..size-1 that takes no memory: each number is computed from its place.

    A Feistel network permutes all numbers with an even number of bits that is large enough for `size`. A result that is
    not below `size` is permuted again until it is ("cycle walking": Black and Rogaway, 2002), fewer than four times on
    average.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [_mixed(key + number * GAMMA) for number in range(1, ROUNDS + 1)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        """Return the number at `place`; raises IndexError outside 0..size-1."""
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} is out of range for a permutation of {self.size} numbers")
        number = self._network(place)
        while number >= self.size:
            number = self._network(number)
        return number

    def _network(self, number: int) -> int:
        mask = (1 << self._half) - 1
        left, right = number >> self._half, number & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(key + right * GAMMA) & mask)
        return left << self._half | right


class StepRandom:
    """The random numbers of one iteration for the samples in `slots` (B): functions of (seed, purpose, iteration, slot).

    The same purpose always gives the same numbers, so every use needs its own purpose or its own `repeat` (see `again`).
    `device` is where `normal` and `place` put their results; all other draws stay on the CPU.
    """

    def __init__(
        self, seed: int, iteration: int, slots: Sequence[int] | Tensor, device: torch.device | str, repeat: int = 0
    ) -> None:
        self.seed = seed
        self.iteration = iteration
        self.repeat = repeat
        self.slots = torch.as_tensor(slots, dtype=torch.int64, device="cpu")
        self.device = torch.device(device)

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.slots)

    def again(self, repeat: int) -> "StepRandom":
        """Return a copy that gives other numbers for the same purposes, for optimizer steps that an iteration repeats.

        `repeat` counts the repetitions from 0; `again(0)` gives the numbers of the first step.
        """
        return type(self)(self.seed, self.iteration, self.slots, self.device, repeat)

    def select(self, rows: Rows) -> "StepRandom":
        """Return a copy for the samples `rows` only, with the numbers that they have here."""
        return type(self)(self.seed, self.iteration, self.slots[rows], self.device, self.repeat)

    def shared(self, purpose: str) -> torch.Generator:
        """Return a generator that is the same for all samples and processes, such as for the number of steps of a rollout.

        Processes that share one network must agree on draws that decide how often it is called.
        """
        return stream(self.seed, purpose, *self._count)

    def uniform(self, purpose: str, n: int | None = None) -> Tensor:
        """Draw from U[0, 1): float32, (B,), or (B, n) if `n` is given, on the CPU; `place` moves the result to the device."""
        draws = _bits(self._key(purpose), self.slots, 1 if n is None else n) >> 40 & 0xFFFFFF
        return (draws[:, 0] if n is None else draws).float().mul_(2**-24)

    def gaussian(self, purpose: str) -> Tensor:
        """Draw one standard normal number for each sample: float32, (B,), on the CPU like the draws of `uniform`."""
        return _normal(self._key(purpose), self.slots, ())

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers for each sample: float32, (B, *shape), on `device`."""
        return self.place(_normal(self._key(purpose), self.slots, shape))

    def index(self, purpose: str, high: int) -> Tensor:
        """Draw integers from 0 to high - 1: int64, (B,), all equally likely if high is far below 2^31.

        They stay on the CPU, because the host decides by them which network calls to make.
        """
        draws = _bits(self._key(purpose), self.slots, 1)[:, 0] >> 33 & 0x7FFFFFFF
        return draws * high >> 31

    def place(self, values: Tensor) -> Tensor:
        """Return the values on `device`, where the networks compute."""
        return send(values, self.device)

    def _key(self, purpose: str) -> int:
        return _hash(self.seed, purpose, *self._count)

    @property
    def _count(self) -> tuple[int, ...]:
        return (self.iteration, self.repeat) if self.repeat else (self.iteration,)


def evaluation_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Return the starting noise (N, *shape), float32, of images of the prompts with these N indices.

    It is a function of (seed, prompt index) only, so that all samplers and all iterations start from the same noise.
    """
    rows = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
    return send(_normal(_hash(seed, "evaluation noise"), rows, shape), device)


def _hash(seed: int, purpose: str, *key: int) -> int:
    """Return a 64-bit hash of all arguments."""
    text = repr((int(seed), purpose, *map(int, key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(value: int) -> int:
    """Return the 64 random bits that SplitMix64 gives for this state."""
    value &= (1 << 64) - 1
    value = (value ^ value >> 30) * MIX_1 & (1 << 64) - 1
    value = (value ^ value >> 27) * MIX_2 & (1 << 64) - 1
    return value ^ value >> 31


def _signed(value: int) -> int:
    """Return the int64 with the same bits as an unsigned 64-bit number; int64 arithmetic wraps around, as SplitMix64 needs."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _bits(key: int, rows: Tensor, n: int) -> Tensor:
    """Return the first n numbers of each of the slots `rows` (B,), of the sequence that starts at `key`.

    The result is (B, n), int64, with 64 random bits in each number.
    """
    counter = rows[:, None] * ELEMENTS + torch.arange(n, device="cpu")
    z = counter.mul_(_signed(GAMMA)).add_(_signed(key))
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        z ^= z >> shift & (1 << 64 - shift) - 1  # >> repeats the sign bit, and the mask removes the copies
        z *= _signed(factor)
    return z


def _normal(key: int, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw standard normal numbers by the Box-Muller method: float32, (B, *shape).

    The two halves of each 64 bits give the radius and the angle of two normal numbers.
    """
    size = math.prod(shape)
    bits = _bits(key, rows, (size + 1) // 2)
    low = 0xFFFFFFFF
    radius = ((bits >> 32 & low) + 1).float().mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = (bits & low).float().mul_(2 * math.pi * 2**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size].reshape(len(rows), *shape)
