"""Steps to documents and documents to steps are inverses; the originals' own loaders agree."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_jax.data import DataConfig, open_dataset
from olmo_jax.data.order import Olmo, Permute
from olmo_jax.data.trace import Trace
from olmo_jax.errors import UserError

GOLDEN = json.loads(Path(__file__).with_name("olmo_order.json").read_text())
T, BATCH, SIZES = 16, 8, (37 * 16 + 5, 22 * 16 + 9)  # of tests/oracles/make_olmo_order.py
OLMO = {"seed": 6198, "first_epoch": 0}
CORE = {"seed": 34521, "first_epoch": 1}


def olmo_dataset(folder, **options):
    """The token files that the golden values were made with: 0, 1, 2, …"""
    start, paths = 0, []
    for k, size in enumerate(SIZES):
        paths.append(str(folder / f"part-{k}.npy"))
        np.arange(start, start + size, dtype=np.uint16).tofile(paths[-1])
        start += size
    config = DataConfig(
        paths=tuple(paths), dtype="uint16", sequence_length=T, batch_size=BATCH, order="olmo"
    )
    return open_dataset(DataConfig(**vars(config) | options), 1000)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("olmo", OLMO),
        ("core", CORE),
        ("core_longest_64", CORE | {"max_target_sequence_length": 4 * T}),
    ],
)
@pytest.mark.parametrize("processes", ["1", "4"])
def test_each_step_is_the_originals_for_two_epochs(tmp_path, name, options, processes):
    dataset = olmo_dataset(tmp_path, index_dir=str(tmp_path), **options)
    epochs = GOLDEN[name][processes]
    steps = [step for epoch in epochs for step in epoch]
    trace = Trace(dataset, len(steps))
    for step, ranks in enumerate(steps, 1):
        tokens_BT = trace.batch(step).tokens_BT
        for rank, first_tokens in enumerate(ranks):
            mine_BT = tokens_BT[rank :: int(processes)]
            assert mine_BT[:, 0].tolist() == first_tokens
            assert (mine_BT - mine_BT[:, :1] == np.arange(T)).all()
        in_one = 1 + (step > len(epochs[0]))
        assert {row.epoch for row in trace.rows(step)} == {in_one}


def test_the_originals_own_global_indices_give_its_batches(tmp_path):
    paths = []
    for epoch, content in enumerate(GOLDEN["global_indices"]):
        paths.append(str(tmp_path / f"global_indices_{epoch}.npy"))
        Path(paths[-1]).write_bytes(bytes.fromhex(content))
    from_files = olmo_dataset(tmp_path, global_indices=tuple(paths))
    from_seed = olmo_dataset(tmp_path, **OLMO)
    n = 2 * len(from_seed)
    assert [from_files.instance_id(i) for i in range(n)] == [
        from_seed.instance_id(i) for i in range(n)
    ]
    assert from_files.fingerprint != from_seed.fingerprint
    with pytest.raises(UserError, match="orders 2 epochs, and this is the 3"):
        from_files.instance_id(n)
    np.arange(1000, 1100, dtype=np.uint32).tofile(paths[0])
    other = olmo_dataset(tmp_path, global_indices=tuple(paths))
    with pytest.raises(UserError, match=r"indices_0.npy: orders 100 .* other token files"):
        other.instance_id(0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 10), st.integers(0, 5))
def test_permute_at_once_and_back(size, seed, epoch, stream):
    order = Permute(size, seed, stream)
    instances = order.instances(epoch, 0, size)
    assert instances.tolist() == [order(epoch, i) for i in range(size)]
    assert order.positions(epoch, instances).tolist() == list(range(size))


def test_olmo_order_back(tmp_path):
    order = Olmo(1000, 3, 1, tmp_path)
    ids = np.array([5, 999, 0, 5])
    at = order.positions(2, ids)
    assert [order(2, int(i)) for i in at] == ids.tolist()


DATASETS = {
    "permute": {},
    "olmo": {"order": "olmo"},
    "sequential": {"order": "sequential"},
    "packed": {"instances": "packed", "group_size": 2},
    "mixture": {"sources": ("a", "b"), "order": "olmo"},
}


@pytest.mark.parametrize("kind", DATASETS)
def test_documents_and_steps_are_inverses(tmp_path, write_tokens, kind):
    options = dict(DATASETS[kind])
    files = {
        name: str(write_tokens(f"{name}.npy", lengths, seed))
        for seed, (name, lengths) in enumerate({"a": [90, 3, 41, 200], "b": [30] * 9}.items())
    }
    if options.pop("sources", None):
        options |= {"sources": {name: (path,) for name, path in files.items()}}
        options |= {"weights": {"a": 0.3, "b": 0.7}}
    else:
        options["paths"] = tuple(files.values())
    schedule = ((4, 3), (9, 5))
    config = DataConfig(sequence_length=32, batch_size=2, batch_size_schedule=schedule, **options)
    dataset = open_dataset(config, 1000)
    trace = Trace(dataset, last=20, first=1, data_from_step=2)
    read: dict[str, list] = {}  # document -> (step, row, which of its tokens)
    for step in range(2, 21):
        tokens_BT = trace.batch(step).tokens_BT
        for row in trace.rows(step):
            at = 0
            for place in row.places:
                for d in place.documents:
                    start, end = max(place.start, d.start), min(place.end, d.end)
                    offset = at + start - place.start
                    read.setdefault(d.id, []).append((step, row.row, start, end, offset, row.epoch))
                at += place.end - place.start
            stored = [np.fromfile(p.path, np.uint16)[p.start : p.end] for p in row.places]
            assert tokens_BT[row.row, :at].tolist() == np.concatenate(stored).tolist()
    everything = [f"a.npy-{k}" for k in range(4)] + [f"b.npy-{k}" for k in range(9)]
    for name in everything:
        [found] = trace.document(name)
        sightings = [(s.step, s.row, s.start, s.end, s.at, s.epoch) for s in found.sightings]
        assert sorted(sightings) == sorted(read.get(name, []))
    seen = trace.seen()
    assert sum(row["instances"] for row in seen) == trace.last_n - trace.first_n
    assert sum(row["documents"] for row in seen) == len(read)


def test_mistakes_are_named(tmp_path, write_tokens):
    path = write_tokens("a.npy", [90, 33, 41])
    config = DataConfig(paths=(str(path),), sequence_length=32, batch_size=2)
    trace = Trace(open_dataset(config, 1000), last=3)
    with pytest.raises(UserError, match="step 4: there are steps 1 to 3"):
        trace.rows(4)
    with pytest.raises(UserError, match="row 2: step 1 has rows 0 to 1"):
        trace.rows(1, [2])
    with pytest.raises(UserError, match=r"--document=a.npy-7: no document .* similar are a.npy-"):
        trace.document("a.npy-7")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="no document of 1 token files has this id; they have no"):
        trace.document("a.npy-1")
    (tmp_path / "a.csv.gz").unlink()
    with pytest.raises(UserError, match=r"none of the 1 token files has a .csv.gz"):
        trace.document("a.npy-1")
