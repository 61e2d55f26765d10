"""Packing: no token lost, documents whole, as tight as OLMo-core's."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_jax.data import DataConfig, open_dataset
from olmo_jax.data.packing import PackedInstances, best_fit_decreasing, cut


def bins(lengths, capacity):
    bin_of = best_fit_decreasing(lengths, capacity)
    found = [[] for _ in range(bin_of.max() + 1)]
    for item in np.argsort(-lengths, kind="stable"):
        found[bin_of[item]].append(int(lengths[item]))
    return found


# OLMo-core's `InstancePacker(T).pack_documents` (src/olmo_core/data/utils.py at fa6c501, its three
# classes taken out of the file with `ast`) on the same lengths: instances, tokens, and the sha256
# of repr(lengths of each instance's documents, in its order).
@pytest.mark.parametrize(
    "seed, capacity, n, scale, n_instances, n_tokens, digest",
    [
        (0, 256, 400, 3, 144, 36683, "f0d64ea007db3883"),
        (1, 64, 300, 6, 55, 3465, "d3ea8b6d02093d0e"),
    ],
)
def test_the_same_instances_as_olmo_core(seed, capacity, n, scale, n_instances, n_tokens, digest):
    rng = np.random.Generator(np.random.PCG64(seed))
    lengths = np.minimum(capacity, 1 + rng.geometric(scale / capacity, n))
    assert lengths.sum() == n_tokens
    found = bins(lengths, capacity)
    assert len(found) == n_instances
    assert hashlib.sha256(repr(found).encode()).hexdigest().startswith(digest)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 37), min_size=1, max_size=80))
def test_best_fit_fits_by_brute_force(lengths):
    capacity, free, counts = 37, [], 0
    for length in sorted(lengths, reverse=True):
        rooms = [r for r in free if r >= length]
        if rooms:
            free.remove(min(rooms))
            free.append(min(rooms) - length)
        else:
            counts += 1
            free.append(capacity - length)
    bin_of = best_fit_decreasing(lengths, capacity)
    loads = np.bincount(bin_of, weights=lengths)
    assert len(loads) == counts and sorted(capacity - loads) == sorted(free)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 40))
def test_cut_covers_each_document_once(lengths, length):
    ends = np.cumsum(lengths)
    pieces = cut(np.stack([ends - lengths, ends], 1), length)
    assert (pieces[:, 1] - pieces[:, 0] <= length).all()
    covered = np.concatenate([np.arange(a, b) for a, b in pieces])
    assert np.array_equal(covered, np.arange(sum(lengths)))


@pytest.mark.parametrize("with_csv", [True, False])
@pytest.mark.parametrize("group_size", [1, 2])
def test_packed_instances_lose_no_token_and_keep_documents_whole(
    write_tokens, tmp_path, with_csv, group_size
):
    rng = np.random.default_rng(0)
    lengths = [[*(1 + rng.geometric(1 / 40, 150)).tolist(), 300] for _ in range(3)]
    files = [write_tokens(f"{k}.npy", n, seed=k) for k, n in enumerate(lengths)]
    if not with_csv:
        for file in files:
            file.with_suffix(".csv.gz").unlink()
    config = DataConfig(
        paths=tuple(map(str, files)),
        sequence_length=128,
        instances="packed",
        group_size=group_size,
        eos_token_id=0,
        document_masking=True,
        order="sequential",
    )
    dataset = open_dataset(config, 1000)
    expected, total, whole = {}, 0, 0
    for file in files:
        tokens = np.fromfile(file, np.uint16)
        for start, end in zip(*_spans(tokens), strict=True):
            expected[str(file), start] = tokens[start:end].tolist()
            total += end - start
    for n in range(len(dataset)):
        row = dataset.instance(n)
        for segment, place in enumerate(dataset.where(n), 1):
            mine = row.tokens_T[row.segment_ids_T == segment].tolist()
            whole += len(mine)
            if (place.path, place.start) in expected:
                document = expected[place.path, place.start]
                assert mine == document[:128] and (len(mine) == len(document) or len(mine) == 128)
    assert whole == total
    assert len(dataset) * 128 / total < 1.02  # under 2 % padding, of few documents


def _spans(tokens):
    ends = np.flatnonzero(tokens == 0) + 1
    return np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist()


def test_an_index_file_is_written_once_and_follows_the_data(write_tokens, tmp_path):
    rng = np.random.default_rng(0)
    lengths = (1 + rng.geometric(1 / 5, 60_000)).tolist()
    file = write_tokens("a.npy", lengths)
    config = DataConfig(
        paths=(str(file),),
        sequence_length=64,
        instances="packed",
        index_dir=str(tmp_path / "index"),
    )
    first = open_dataset(config, 1000)
    fingerprint = first.fingerprint
    (index,) = (tmp_path / "index").iterdir()
    written = index.stat().st_mtime_ns
    assert len(open_dataset(config, 1000)) == len(first)
    assert index.stat().st_mtime_ns == written
    write_tokens("a.npy", [*lengths[::-1], 7])
    assert open_dataset(config, 1000).fingerprint != fingerprint
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_each_of_many_small_files_is_packed_once(write_tokens, tmp_path, monkeypatch):
    paths = tuple(str(write_tokens(f"{k}.npy", [3, 4, 5], seed=k)) for k in range(70))
    built = []
    build = PackedInstances._build

    def counted(self, group):
        built.append(group)
        return build(self, group)

    monkeypatch.setattr(PackedInstances, "_build", counted)
    config = DataConfig(paths=paths, sequence_length=8, instances="packed", eos_token_id=0)
    dataset = open_dataset(config, 1000)
    for instance_id in range(len(dataset)):
        dataset.row(instance_id)
    assert len(built) == 70
