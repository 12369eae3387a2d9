"""Random numbers as functions of seed, purpose, iteration and slot. No random state has to be saved or restored.

A purpose is a short name for the use of the numbers, such as "rollout.noise". A slot is the index of a sample in the
global batch, which is spread over all processes. The numbers are therefore the same for any number of processes. They
are computed on the CPU, so they are also the same for every device.

Noise is moved to the device as soon as it is drawn. Sigmas stay on the CPU until the timestep shift has been applied to
them, because diffusers applies it on the CPU; `place` then moves them. If they were moved first, they would have to be
copied back for the shift, and the host would wait for the device.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). It computes each number of a sequence directly from
the number's position, so the numbers of all samples are computed at once. The sequence starts at a hash of seed,
purpose and iteration. Number n of a slot has the position slot * 2^32 + n in the sequence.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cdm_lightning.core.flow import Rows
from cdm_lightning.core.transfer import send

GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the constants of SplitMix64
ELEMENTS = 1 << 32  # numbers of the sequence for each slot
SHUFFLED_IN_MEMORY = 1 << 16  # larger permutations are not stored; each number is computed when it is needed
ROUNDS = 4  # of the Feistel network: Luby and Rackoff (1988) need four for a strong pseudo-random permutation


def stream(seed: int, purpose: str, *key: int) -> torch.Generator:
    """Return a CPU generator whose seed is a 32-bit hash of all arguments.

    torch's CPU generator uses only 32 bits of a seed.
    """
    return torch.Generator().manual_seed(_hash(seed, purpose, *key) % (1 << 32))


def permutation(size: int, seed: int, purpose: str, *key: int) -> "Tensor | FeistelPermutation":
    """Return a pseudo-random permutation of 0..size-1. `result[place]` is the number at the position `place`.

    The permutation is a function of the arguments. Up to size 2^16 it is a tensor. A larger permutation is a
    `FeistelPermutation`, which takes no memory.
    """
    if size <= SHUFFLED_IN_MEMORY:
        return torch.randperm(size, generator=stream(seed, purpose, *key))
    return FeistelPermutation(size, _hash(seed, purpose, *key))


class FeistelPermutation:
    """A pseudo-random permutation of 0..size-1 that takes no memory: each number is computed from its position.

    A Feistel network permutes 0..2^n-1 for an even n with 2^n >= size. A result that is not below `size` is put through
    the network again ("cycle walking", Black and Rogaway, 2002). On average, the network is used fewer than four times
    for a number. `key` selects the permutation.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [_mixed(key + number * GAMMA) for number in range(1, ROUNDS + 1)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        """Return the number at `place`. Raises IndexError for a place outside 0..size-1."""
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
    """The random numbers of one iteration for B samples.

    `slots` (B,) are the indices of the samples in the global batch. The numbers of a sample depend only on `seed`,
    `iteration`, `repeat`, the sample's slot, and the `purpose` that is passed to a method. Two draws with the same
    `purpose` therefore give the same numbers, so every use of random numbers needs its own `purpose`. If a network is
    updated several times in the iteration, `repeat` is the index of the update, counted from 0 (see `again`). The
    method `normal` returns numbers on `device`. The other methods draw on the CPU, and `place` moves their numbers to
    `device`.
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
        """Return B, the number of samples."""
        return len(self.slots)

    def again(self, repeat: int) -> "StepRandom":
        """Return a copy for update number `repeat` of a network that is updated several times in one iteration.

        The copy for each update draws random numbers of its own. Updates count from 0, and `again(0)` draws the same
        numbers as a `StepRandom` that was made without `repeat`.
        """
        return type(self)(self.seed, self.iteration, self.slots, self.device, repeat)

    def select(self, rows: Rows) -> "StepRandom":
        """Return a copy for the samples that `rows` selects from the batch. Their random numbers stay the same."""
        return type(self)(self.seed, self.iteration, self.slots[rows], self.device, self.repeat)

    def shared(self, purpose: str) -> torch.Generator:
        """Return a CPU generator for numbers that all samples and all processes have in common.

        For example, the number of steps of a rollout is drawn with this generator, because processes that share one
        network must make the same number of network calls.
        """
        return stream(self.seed, purpose, *self._count)

    def uniform(self, purpose: str, n: int | None = None) -> Tensor:
        """Draw from U[0, 1) for each sample, on the CPU: float32, (B,), or (B, n) if `n` is given."""
        draws = _bits(self._key(purpose), self.slots, 1 if n is None else n) >> 40 & 0xFFFFFF
        return (draws[:, 0] if n is None else draws).float().mul_(2**-24)

    def gaussian(self, purpose: str) -> Tensor:
        """Draw one standard normal number for each sample: float32, (B,), on the CPU."""
        return _normal(self._key(purpose), self.slots, ())

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers for each sample: float32, (B, *shape), on `device`."""
        return self.place(_normal(self._key(purpose), self.slots, shape))

    def index(self, purpose: str, high: int) -> Tensor:
        """Draw an integer from 0 to high - 1 for each sample: int64, (B,), on the CPU.

        The integers are uniform if `high` is far below 2^31. They stay on the CPU, because the host needs them to
        decide which network calls to make.
        """
        draws = _bits(self._key(purpose), self.slots, 1)[:, 0] >> 33 & 0x7FFFFFFF
        return draws * high >> 31

    def place(self, values: Tensor) -> Tensor:
        """Return `values` on `device`. The host does not wait for the copy."""
        return send(values, self.device)

    def _key(self, purpose: str) -> int:
        return _hash(self.seed, purpose, *self._count)

    @property
    def _count(self) -> tuple[int, ...]:
        return (self.iteration, self.repeat) if self.repeat else (self.iteration,)


def evaluation_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Return the noise from which the images of N prompts are sampled: (N, *shape), float32, on `device`.

    `indices` are the numbers of the prompts. The noise of a prompt depends only on `seed` and the prompt's number, so
    all samplers start from the same noise, in every iteration.
    """
    rows = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
    return send(_normal(_hash(seed, "evaluation noise"), rows, shape), device)


def _hash(seed: int, purpose: str, *key: int) -> int:
    """Return a 64-bit hash of all arguments."""
    text = repr((int(seed), purpose, *map(int, key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(value: int) -> int:
    """Return the 64 random bits of SplitMix64 for the state `value`."""
    value &= (1 << 64) - 1
    value = (value ^ value >> 30) * MIX_1 & (1 << 64) - 1
    value = (value ^ value >> 27) * MIX_2 & (1 << 64) - 1
    return value ^ value >> 31


def _signed(value: int) -> int:
    """Return the int64 that has the same bits as an unsigned 64-bit number.

    Arithmetic of int64 wraps around on overflow, as SplitMix64 needs.
    """
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _bits(key: int, rows: Tensor, n: int) -> Tensor:
    """Return the first n random numbers of each slot in `rows` (B,): int64, (B, n), with 64 random bits each.

    `key` is the start of the SplitMix64 sequence.
    """
    counter = rows[:, None] * ELEMENTS + torch.arange(n, device="cpu")
    z = counter.mul_(_signed(GAMMA)).add_(_signed(key))
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        z ^= z >> shift & (1 << 64 - shift) - 1  # >> repeats the sign bit, and the mask removes the copies
        z *= _signed(factor)
    return z


def _normal(key: int, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw standard normal numbers for each slot in `rows` (B,) by the Box-Muller method: float32, (B, *shape).

    One half of each 64 random bits gives the radius and the other half the angle. Each pair of radius and angle gives
    two normal numbers.
    """
    size = math.prod(shape)
    bits = _bits(key, rows, (size + 1) // 2)
    low = 0xFFFFFFFF
    radius = ((bits >> 32 & low) + 1).float().mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = (bits & low).float().mul_(2 * math.pi * 2**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size].reshape(len(rows), *shape)
