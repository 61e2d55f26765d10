"""The order of instances within an epoch, as a pure function of (seed, epoch, position).

`permute` needs no memory; `olmo` repeats the original's shuffle and needs an index of N numbers.
"""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Protocol

import numpy as np

from olmo_jax.data.index_file import index_array
from olmo_jax.data.token_files import TokenFile
from olmo_jax.errors import UserError

_MASK = (1 << 64) - 1
_ROUNDS = 8
_CHUNK = 1 << 24


class Order(Protocol):
    """`order(epoch, i)`: which instance comes i-th (from 0) in an epoch (counted from 0)."""

    def __call__(self, epoch: int, i: int) -> int: ...

    def instances(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The same for first <= i < last at once, (last - first,) int64."""
        ...

    def positions(self, epoch: int, instances_N: np.ndarray) -> np.ndarray:
        """The inverse: where in the epoch each instance comes, (N,) int64; -1: it does not."""
        ...


class Sequential:
    """File order, every epoch."""

    def __call__(self, epoch: int, i: int) -> int:
        return i

    def instances(self, epoch: int, first: int, last: int) -> np.ndarray:
        return np.arange(first, last, dtype=np.int64)

    def positions(self, epoch: int, instances_N: np.ndarray) -> np.ndarray:
        return instances_N


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
        key = self._key(epoch)
        while True:
            i = self._forwards(key, i)
            # The network permutes range(a * b); following it from a value below `size` until the
            # next such value permutes range(size).
            if i < self._size:
                return i

    def instances(self, epoch: int, first: int, last: int) -> np.ndarray:
        return self._walk(self._forwards, epoch, np.arange(first, last, dtype=np.uint64))

    def positions(self, epoch: int, instances_N: np.ndarray) -> np.ndarray:
        return self._walk(self._backwards, epoch, instances_N.astype(np.uint64))

    def _key(self, epoch: int) -> int:
        return _mix(_mix(_mix(self._seed) ^ self._stream) ^ epoch)

    def _forwards(self, key, x):
        """The network, of an integer or of an array of uint64."""
        a, b = self._a, self._b
        left, right = divmod(x, b)
        for round_ in range(0, _ROUNDS, 2):
            left = (left + _mix(key ^ _mix(right * _ROUNDS + round_)) % a) % a
            right = (right + _mix(key ^ _mix(left * _ROUNDS + round_ + 1)) % b) % b
        return left * b + right

    def _backwards(self, key, y):
        """The inverse of the network."""
        a, b = self._a, self._b
        left, right = divmod(y, b)
        for round_ in reversed(range(0, _ROUNDS, 2)):
            right = (right + (b - _mix(key ^ _mix(left * _ROUNDS + round_ + 1)) % b)) % b
            left = (left + (a - _mix(key ^ _mix(right * _ROUNDS + round_)) % a)) % a
        return left * b + right

    def _walk(self, network, epoch: int, x_N: np.ndarray) -> np.ndarray:
        key = self._key(epoch)
        out_N = network(key, x_N)
        while len(outside := np.flatnonzero(out_N >= self._size)):
            out_N[outside] = network(key, out_N[outside])
        return out_N.astype(np.int64)


class Olmo:
    """The original's order: PCG64(seed + epoch) shuffles arange(size, uint32).

    `first_epoch` is what the original calls our epoch 0: 0 in the OLMo repository
    (`IterableDataset`), 1 in OLMo-core (`NumpyFSLDataLoader`). The index of an epoch is built once
    and memory-mapped from `index_dir`; or it is what the original wrote, one of `files` each epoch.
    `chunk` neighbours stay together: with max_target_sequence_length, so many times T, OLMo-core
    (1.1.0 to 3.0.0 at least) shuffles stretches of that length.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        first_epoch: int,
        index_dir: Path,
        files: Sequence[TokenFile] = (),
        chunk: int = 1,
    ):
        if size >= np.iinfo(np.uint32).max:
            raise UserError(
                f"order 'olmo' numbers at most {np.iinfo(np.uint32).max - 1} instances, the data "
                f"has {size}; use order 'permute'"
            )
        self._size, self._seed, self._first_epoch = size, seed, first_epoch
        self._index_dir, self._files, self._chunk = index_dir, files, chunk

    def __call__(self, epoch: int, i: int) -> int:
        return int(self.instances(epoch, i, i + 1)[0])

    def instances(self, epoch: int, first: int, last: int) -> np.ndarray:
        found_N = np.asarray(self._index(epoch)[first:last], np.int64)
        if self._files:
            file = self._files[epoch]
            if len(found_N) < last - first or found_N.max(initial=0) >= self._size:
                raise UserError(
                    f"{file.path}: orders {file.size} instances, up to number "
                    f"{found_N.max(initial=0)} at position {first}, but the data has {self._size}: "
                    "it is of other token files, or of another sequence_length"
                )
        return found_N

    def positions(self, epoch: int, instances_N: np.ndarray) -> np.ndarray:
        index = self._index(epoch)
        slot = np.zeros(self._size, bool)
        slot[instances_N] = True
        hits: list[np.ndarray] = []
        for start in range(0, len(index), _CHUNK):
            hits.append(start + np.flatnonzero(slot[index[start : start + _CHUNK]]))
        at_M = np.concatenate(hits)
        ids_M = np.concatenate([index[i : i + 1] for i in at_M.tolist()] or [[]])
        where = dict(zip(ids_M.tolist(), at_M.tolist(), strict=True))
        return np.array([where.get(i, -1) for i in instances_N.tolist()], np.int64)

    def _index(self, epoch: int):
        if self._files:
            if epoch >= len(self._files):
                raise UserError(
                    f"Data.global_indices orders {len(self._files)} epochs, and this is the "
                    f"{epoch + 1}.; give its file too"
                )
            return self._files[epoch].tokens
        seed = self._seed + self._first_epoch + epoch
        name = f"olmo-{self._size}-{seed}" + (f"-{self._chunk}" if self._chunk > 1 else "")
        build = lambda: olmo_indices(self._size, seed, self._chunk)  # noqa: E731
        return index_array(self._index_dir, name, build)


def olmo_indices(size: int, seed: int, chunk: int = 1) -> np.ndarray:
    """The shuffled instance numbers of one epoch, (size,) uint32; `seed` is seed + epoch."""
    assert size % chunk == 0
    firsts = np.arange(size // chunk, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed)).shuffle(firsts)
    if chunk == 1:
        return firsts
    return (firsts[:, None] * np.uint32(chunk) + np.arange(chunk, dtype=np.uint32)).ravel()


def _mix(x):
    """splitmix64's finaliser (Steele et al. 2014), of a Python integer or an array of uint64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
