"""The order of instances within an epoch, as a pure function of (seed, epoch, position).

`permute` needs no memory; `olmo` repeats the original's shuffle and needs an index of N numbers.
"""

from math import isqrt
from pathlib import Path
from typing import Protocol

import numpy as np

from olmo_jax.data.index_file import index_array
from olmo_jax.errors import UserError

_MASK = (1 << 64) - 1
_ROUNDS = 8


class Order(Protocol):
    """`order(epoch, i)`: which instance comes i-th (from 0) in an epoch (counted from 0)."""

    def __call__(self, epoch: int, i: int) -> int: ...


class Sequential:
    """File order, every epoch."""

    def __call__(self, epoch: int, i: int) -> int:
        return i


class Permute:
    """A keyed pseudo-random permutation of range(size), another one each epoch.

    An unbalanced Feistel network over Z_a x Z_b with a*b just above `size` (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002, the FE1 form) and cycle walking for the few
    values above it: O(1) memory and time whatever the size.
    """

    def __init__(self, size: int, seed: int, stream: int = 0):
        assert size > 0
        self._size = size
        self._a = isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        self._seed, self._stream = seed, stream

    def __call__(self, epoch: int, i: int) -> int:
        assert 0 <= i < self._size
        key = _mix(_mix(_mix(self._seed) ^ self._stream) ^ epoch)
        a, b, x = self._a, self._b, i
        while True:
            left, right = divmod(x, b)
            for round_ in range(0, _ROUNDS, 2):
                left = (left + _mix(key ^ _mix(right * _ROUNDS + round_))) % a
                right = (right + _mix(key ^ _mix(left * _ROUNDS + round_ + 1))) % b
            x = left * b + right
            # The network permutes range(a * b); following it from a value below `size` until the
            # next such value permutes range(size).
            if x < self._size:
                return x


class Olmo:
    """The original's order: PCG64(seed + epoch) shuffles arange(size, uint32).

    `first_epoch` is what the original calls our epoch 0: 0 in the OLMo repository
    (`IterableDataset`), 1 in OLMo-core (`NumpyFSLDataLoader`). The index of an epoch is built once
    and memory-mapped from `index_dir`.
    """

    def __init__(self, size: int, seed: int, first_epoch: int, index_dir: Path):
        if size >= np.iinfo(np.uint32).max:
            raise UserError(
                f"order 'olmo' numbers at most {np.iinfo(np.uint32).max - 1} instances, the data "
                f"has {size}; use order 'permute'"
            )
        self._size, self._seed, self._first_epoch = size, seed, first_epoch
        self._index_dir = index_dir

    def __call__(self, epoch: int, i: int) -> int:
        seed = self._seed + self._first_epoch + epoch
        name = f"olmo-{self._size}-{seed}"
        return int(index_array(self._index_dir, name, lambda: olmo_indices(self._size, seed))[i])


def olmo_indices(size: int, seed: int) -> np.ndarray:
    """The shuffled instance numbers of one epoch, (size,) uint32; `seed` is seed + epoch."""
    indices = np.arange(size, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed)).shuffle(indices)
    return indices


def _mix(x: int) -> int:
    """splitmix64's finaliser (Steele et al. 2014), on Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
