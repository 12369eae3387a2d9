"""Random numbers as a function of (seed, purpose, iteration, slot): nothing to save, nothing to restore.

A slot is a sample's index inside the global batch, so the numbers do not depend on how many processes share the batch.
They are computed on the CPU, so they do not depend on the device either: noise is moved to the device at once, sigmas when
they have been shifted (`place`), so that the host never waits for the device. Element n of a slot's draw is number (slot, n)
of a SplitMix64 sequence (Steele, Lea and Flood, OOPSLA 2014) whose start is a hash of the rest: a counter, so all samples are
drawn at once and none needs a generator of its own.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cdm_lightning.core.flow import Rows

GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the constants of SplitMix64
ELEMENTS = 1 << 32  # a slot's share of the sequence
SHUFFLED_IN_MEMORY = 1 << 16  # orders of more than this many numbers are computed one by one
ROUNDS = 4  # of the Feistel network: what Luby and Rackoff (1988) need for a strong pseudo-random permutation


def stream(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator that depends on all of the arguments, through the 32 bits that torch keeps of a seed."""
    return torch.Generator().manual_seed(_hash(seed, purpose, *key) % (1 << 32))


def permutation(size: int, seed: int, purpose: str, *key: int) -> "Tensor | FeistelPermutation":
    """An order of 0..size-1 that depends on all of the arguments; `[place]` is the number at a place.

    Up to 2^16 numbers are shuffled in memory, every order equally likely; beyond it none is held (`FeistelPermutation`).
    """
    if size <= SHUFFLED_IN_MEMORY:
        return torch.randperm(size, generator=stream(seed, purpose, *key))
    return FeistelPermutation(size, _hash(seed, purpose, *key))


class FeistelPermutation:
    """A pseudo-random order of 0..size-1 that takes no memory: each number is computed from its place.

    A Feistel network permutes the numbers of the next even count of bits; a number beyond `size` is permuted again until
    it lies below ("cycle walking": Black and Rogaway, 2002), fewer than four times on average.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [_mixed(key + number * GAMMA) for number in range(1, ROUNDS + 1)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        """The number at `place`; IndexError outside 0..size-1."""
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} of {self.size}")
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
    """One iteration's random numbers for the samples in `slots` (B): functions of (seed, purpose, iteration, slot).

    Asking twice for the same purpose gives the same numbers: every use has a purpose of its own, or a `repeat` (`again`).
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
        """Other numbers for the same purposes of this iteration, for what is done more than once in it; 0 is the first time."""
        return type(self)(self.seed, self.iteration, self.slots, self.device, repeat)

    def select(self, rows: Rows) -> "StepRandom":
        """The numbers of some of these samples."""
        return type(self)(self.seed, self.iteration, self.slots[rows], self.device, self.repeat)

    def shared(self, purpose: str) -> torch.Generator:
        """A generator alike for all slots and processes: for whatever changes the number of network calls."""
        return stream(self.seed, purpose, *self._count)

    def uniform(self, purpose: str, n: int | None = None) -> Tensor:
        """Draws of U[0, 1), float32, (B,) or (B, n), on the CPU: sigmas are shifted there, then moved once by `place`."""
        draws = _bits(self._key(purpose), self.slots, 1 if n is None else n) >> 40 & 0xFFFFFF
        return (draws[:, 0] if n is None else draws).float().mul_(2**-24)

    def gaussian(self, purpose: str) -> Tensor:
        """One standard normal draw a sample, float32, (B,), on the CPU as those of `uniform`."""
        return _normal(self._key(purpose), self.slots, ())

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws (B, *shape), float32, on the device."""
        return self.place(_normal(self._key(purpose), self.slots, shape))

    def index(self, purpose: str, high: int) -> Tensor:
        """Whole numbers of [0, high), each equally likely (high far below 2^31): (B,) int64 on the CPU, to steer by."""
        draws = _bits(self._key(purpose), self.slots, 1)[:, 0] >> 33 & 0x7FFFFFFF
        return draws * high >> 31

    def place(self, values: Tensor) -> Tensor:
        """The values on the device that networks compute on."""
        return values.to(self.device)

    def _key(self, purpose: str) -> int:
        return _hash(self.seed, purpose, *self._count)

    @property
    def _count(self) -> tuple[int, ...]:
        return (self.iteration, self.repeat) if self.repeat else (self.iteration,)


def evaluation_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Starting noise (N, *shape) of the prompts with these indices: a function of (seed, prompt index) only."""
    rows = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
    return _normal(_hash(seed, "evaluation noise"), rows, shape).to(device)


def _hash(seed: int, purpose: str, *key: int) -> int:
    """64 bits."""
    text = repr((int(seed), purpose, *map(int, key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(value: int) -> int:
    """The 64 random bits of SplitMix64 at this state."""
    value &= (1 << 64) - 1
    value = (value ^ value >> 30) * MIX_1 & (1 << 64) - 1
    value = (value ^ value >> 27) * MIX_2 & (1 << 64) - 1
    return value ^ value >> 31


def _signed(value: int) -> int:
    """A 64-bit number as int64 holds it; int64 arithmetic wraps around, as that of SplitMix64 does."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _bits(key: int, rows: Tensor, n: int) -> Tensor:
    """Numbers 0..n-1 of the rows' (B,) shares of the sequence that starts at `key`: (B, n) int64 of 64 random bits."""
    counter = rows[:, None] * ELEMENTS + torch.arange(n, device="cpu")
    z = counter.mul_(_signed(GAMMA)).add_(_signed(key))
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        z ^= z >> shift & (1 << 64 - shift) - 1  # >> keeps the sign, the mask drops it
        z *= _signed(factor)
    return z


def _normal(key: int, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Box-Muller: the halves of each 64 bits give radius and angle of two normal draws. (B, *shape) float32."""
    size = math.prod(shape)
    bits = _bits(key, rows, (size + 1) // 2)
    low = 0xFFFFFFFF
    radius = ((bits >> 32 & low) + 1).float().mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = (bits & low).float().mul_(2 * math.pi * 2**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size].reshape(len(rows), *shape)
