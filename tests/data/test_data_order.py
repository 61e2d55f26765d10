"""The orders: permute is a permutation in O(1) memory; olmo is the original's to the number."""

import hashlib
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_jax.data.order import Olmo, Permute, olmo_indices


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 10), st.integers(0, 5))
def test_permute_is_a_permutation(size, seed, epoch, stream):
    permute = Permute(size, seed, stream)
    assert sorted(permute(epoch, i) for i in range(size)) == list(range(size))


def test_permute_differs_by_seed_epoch_and_stream():
    def head(seed, stream, epoch):
        permute = Permute(10**6, seed, stream)
        return tuple(permute(epoch, i) for i in range(20))

    heads = {head(s, t, e) for s in range(4) for t in range(4) for e in range(4)}
    assert len(heads) == 64


def test_permute_looks_random():
    # Neighbours land apart and every tenth of the range gets its share: a bad round function that
    # leaves structure fails one of these by a wide margin (4 standard errors).
    size = 10**12
    permute = Permute(size, 3)
    x = np.array([permute(0, i) for i in range(20_000)]) / size
    counts = np.histogram(x, 10, (0, 1))[0]
    assert abs(counts - 2000).max() < 4 * np.sqrt(2000)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / np.sqrt(20_000)


def test_permute_takes_the_same_memory_for_any_size():
    def peak(size):
        tracemalloc.start()
        permute = Permute(size, 1)
        seen = {permute(0, i) for i in range(200)}
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(seen) == 200 and max(seen) < size
        return found

    peak(10**3)
    assert peak(10**12) < peak(10**3) + 4096


# What the originals' own code gives: `_build_global_indices` of OLMo's `IterableDataset`
# (olmo/data/iterable_dataset.py at 59a53e3) and of OLMo-core's `NumpyFSLDataLoader`
# (src/olmo_core/data/data_loader.py at fa6c501), taken out of the files with `ast` and called with
# self = SimpleNamespace(dataset=range(20), shuffle=True, seed=…, epoch=…, …). 6198 is the seed of
# OLMo 1's and OLMo 2 7B's configurations, 34521 of OLMo-core's data loaders.
# fmt: off
OLMO_6198 = {
    0: [17, 4, 14, 3, 5, 12, 6, 15, 18, 13, 10, 11, 2, 19, 0, 16, 7, 9, 8, 1],
    1: [19, 8, 9, 11, 4, 5, 17, 6, 15, 14, 2, 12, 16, 1, 18, 3, 10, 13, 0, 7],
}
CORE_34521 = {
    1: [15, 1, 3, 2, 17, 6, 0, 11, 12, 5, 13, 16, 9, 18, 7, 8, 10, 14, 4, 19],
    2: [15, 5, 13, 11, 6, 4, 3, 14, 18, 8, 19, 9, 16, 17, 7, 0, 12, 2, 1, 10],
}
# fmt: on


def test_olmo_order_is_the_originals(tmp_path):
    for first_epoch, seed, golden in ((0, 6198, OLMO_6198), (1, 34521, CORE_34521)):
        order = Olmo(20, seed, first_epoch, tmp_path)
        for epoch, indices in golden.items():
            assert [order(epoch - first_epoch, i) for i in range(20)] == indices


def test_olmo_order_of_a_million_is_the_originals():
    # sha256 of the originals' uint32 arrays, same calls with a million instances
    for seed, start in ((6198 + 0, "915d7b77f7a55b8b"), (34521 + 1, "9c0fd2cee409f936")):
        indices = olmo_indices(1_000_000, seed)
        assert indices.dtype == np.uint32
        assert hashlib.sha256(indices.tobytes()).hexdigest().startswith(start)


def test_a_long_olmo_order_is_kept_in_an_index_file(tmp_path):
    order = Olmo(400_000, 5, 1, tmp_path)
    first = [order(0, i) for i in range(50)]
    (file,) = tmp_path.iterdir()
    assert np.array_equal(np.load(file), olmo_indices(400_000, 6))
    assert first == olmo_indices(400_000, 6)[:50].tolist()
