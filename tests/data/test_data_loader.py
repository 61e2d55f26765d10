"""Batches: the same tokens whatever the workers, the hosts or the step one starts from."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from olmo_jax.data import Batch, DataConfig, load_batches, open_dataset
from olmo_jax.data.steps import Steps
from olmo_jax.errors import UserError

SCHEDULE = ((3, 12), (6, 6))


@pytest.fixture
def dataset(write_tokens, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(3):
        write_tokens(f"{k}.npy", (1 + rng.geometric(1 / 20, 40)).tolist(), seed=k)

    def open_(**settings):
        config = DataConfig(
            paths=(str(tmp_path / "*.npy"),),
            sequence_length=32,
            eos_token_id=0,
            batch_size=6,
            batch_size_schedule=SCHEDULE,
            seed=11,
            **settings,
        )
        return open_dataset(config, 1000)

    return open_


def same(a, b):
    assert [s for s, _ in a] == [s for s, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        for field, one, other in zip(Batch._fields, x, y, strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other), field


def test_batches_are_the_instances_in_order_over_the_epochs(dataset):
    data = dataset(document_masking=True)
    batches = list(load_batches(data, 0, 30))
    assert [len(b.tokens_BT) for _, b in batches[:7]] == [6, 6, 6, 12, 12, 12, 6]
    ids = np.concatenate([b.instance_ids_B for _, b in batches])
    assert ids.tolist() == [data.instance_id(n) for n in range(len(ids))]
    epochs = len(ids) // len(data)
    assert epochs >= 2
    for epoch in range(epochs):  # each instance once an epoch, in another order each time
        assert sorted(ids[epoch * len(data) : (epoch + 1) * len(data)]) == list(range(len(data)))
    assert ids[: len(data)].tolist() != ids[len(data) : 2 * len(data)].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_and_any_workers_give_the_same_rest(dataset, workers):
    whole = list(load_batches(dataset(), 0, 12))
    data = dataset(workers=workers)
    for first in (0, 5, 11) if not workers else (4,):
        same(whole[first:], list(load_batches(data, first, 12)))
    assert list(load_batches(data, 12, 12)) == []


def test_the_rows_that_processes_read_are_those_of_the_whole_batch(dataset):
    data = dataset(document_masking=True, instances="packed")
    whole = list(load_batches(data, 2, 8))
    for rows in ([0, 1, 2, 3, 4, 5], [4], [1, 2, 5]):
        mine = {6: np.array(rows), 12: np.array([*rows, 11])}
        parts = list(load_batches(data, 2, 8, mine))
        for (step, part), (same_step, batch) in zip(parts, whole, strict=True):
            assert step == same_step
            # Everyone knows the ids of the whole batch.
            assert np.array_equal(part.instance_ids_B, batch.instance_ids_B)
            for some, every in zip(part[:-1], batch[:-1], strict=True):
                assert np.array_equal(some, every[mine[len(every)]])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_token_met_while_reading_names_file_and_offset(dataset, tmp_path, workers):
    data = dataset(workers=workers, order="sequential")
    tokens = np.memmap(tmp_path / "1.npy", np.uint16, "r+")
    tokens[77] = 1000
    tokens.flush()
    with pytest.raises(UserError, match=r"1\.npy: token 1000 at token offset 77 "):
        list(load_batches(data, 0, 20))


def test_steps_and_positions_are_inverse():
    steps = Steps(6, SCHEDULE)
    n = 0
    for step in range(20):
        assert steps.first_n(step) == n
        for _ in range(steps.batch_size(step)):
            assert steps.step_of(n) == step
            n += 1


def test_the_order_and_the_row_shapes(dataset):
    data = dataset(document_masking=True, order="sequential")
    row = data.instance(0)
    tokens = np.fromfile(data.sources[0].files[0].path, np.uint16)[:32].astype(np.int32)
    assert np.array_equal(row.tokens_T, tokens)
    assert np.array_equal(row.targets_T[:-1], tokens[1:])
    assert row.loss_mask_T.tolist() == [True] * 31 + [False]
    segment, position = 1, 0
    for t, token in enumerate(tokens):
        assert (row.segment_ids_T[t], row.positions_T[t]) == (segment, position)
        segment, position = (segment + 1, 0) if token == 0 else (segment, position + 1)
    assert segment > 1


def test_documents_from_the_csv_mask_as_those_from_the_eos(dataset, write_tokens, tmp_path):
    with_eos = dataset(document_masking=True)
    config = DataConfig(
        paths=(str(tmp_path / "*.npy"),), sequence_length=32, document_masking=True, seed=11
    )
    with_csv = open_dataset(config, 1000)
    for n in range(len(with_eos)):
        for a, b in zip(with_eos.instance(n), with_csv.instance(n), strict=True):
            assert np.array_equal(a, b)


def test_padding_of_a_packed_row_is_masked(write_tokens):
    file = write_tokens("a.npy", [5, 4])
    config = DataConfig(
        paths=(str(file),), sequence_length=16, instances="packed", document_masking=True
    )
    row = open_dataset(config, 1000).instance(0)
    assert row.segment_ids_T.tolist() == [1] * 5 + [2] * 4 + [0] * 7
    assert row.positions_T[:9].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    # As in OLMo-core, an eos still predicts the next document's first token; padding is no target.
    assert row.loss_mask_T.tolist() == [True] * 8 + [False] * 8
    assert row.targets_T[4] == row.tokens_T[5]


def test_olmo_epochs_end_where_a_batch_would_not_be_full(dataset):
    # Both originals drop what does not fill a batch and shuffle anew.
    data = dataset(order="olmo", first_epoch=0)
    n_instances = len(data.sources[0].instances)
    assert n_instances % 6 != 0 and len(data) == n_instances - n_instances % 6
    shuffled = np.arange(n_instances, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(11 + 1)).shuffle(shuffled)
    assert [data.instance_id(len(data) + i) for i in range(6)] == shuffled[:6].tolist()


def test_reading_threads_that_need_the_same_index_file_at_once_all_get_it(tmp_path):
    np.zeros(800_000, np.uint8).tofile(tmp_path / "a.npy")
    config = DataConfig(
        paths=(str(tmp_path / "a.npy"),),
        sequence_length=2,
        batch_size=50,
        order="olmo",
        index_dir=str(tmp_path / "index"),
    )
    data = open_dataset(config, 256)
    # 400,000 instances are more than is kept in memory; step 8000 begins the second epoch.
    batches = dict(load_batches(data, 7990, 8010))
    assert [batches[step].instance_ids_B[0] for step in range(7990, 8010)] == [
        data.instance_id(step * 50) for step in range(7990, 8010)
    ]
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_the_fingerprint_follows_content_and_order_and_not_the_folder(dataset, tmp_path):
    first = dataset().fingerprint
    assert dataset().fingerprint == dataset(workers=2, prefetch=9).fingerprint == first
    assert dataset(order="sequential").fingerprint != first
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("*.npy"):
        (moved / file.name).write_bytes(file.read_bytes())
    config = dataset().config
    settings = {f: getattr(config, f) for f in config.__dataclass_fields__}
    copy = DataConfig(**(settings | {"paths": (str(moved / "*.npy"),)}))
    assert open_dataset(copy, 1000).fingerprint == first
    tokens = np.memmap(moved / "2.npy", np.uint16, "r+")
    tokens[100] ^= 1
    tokens.flush()
    assert open_dataset(copy, 1000).fingerprint != first


def test_importing_the_room_imports_no_jax():
    code = "import sys, olmo_jax.data, olmo_jax.data.tokenize, olmo_jax.data.inspect as i;"
    code += "print([m for m in ('jax', 'grain') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"[]\n"


TRAIN = """
import sys
from olmo_jax.data import DataConfig, load_batches, open_dataset
if __name__ == "__main__":
    config = DataConfig(paths=(sys.argv[1],), sequence_length=32, batch_size=6, workers=2)
    for step, batch in load_batches(open_dataset(config, 1000), 0, 10**9):
        print(step, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_killed_parent(dataset, tmp_path):
    dataset()
    (tmp_path / "train.py").write_text(TRAIN)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "*.npy")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout.readline() == b"0\n"
    parent.stdin.write(b"\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == b"1\n"  # both workers have started: one gave each batch
    children = _children(parent.pid)
    assert len(children) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    alive, deadline = children, time.monotonic() + 60
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [pid for pid in alive if _state(pid) not in (None, "Z")]
    assert not alive


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        direct = [int(p) for p in f.read().split()]
    tasks = os.listdir(f"/proc/{pid}/task")
    for task in tasks:
        with open(f"/proc/{pid}/task/{task}/children") as f:
            direct += [int(p) for p in f.read().split()]
    return sorted(set(direct))


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None
