"""Token files in buckets: the instances are those of local files, in spite of what goes wrong."""

import dataclasses

import numpy as np
import pytest

from olmo_jax.data import DataConfig, open_dataset, remote_tokens
from olmo_jax.data.loader import load_batches
from olmo_jax.data.token_files import Document, write_token_file
from olmo_jax.errors import UserError
from tests.buckets import BUCKET, SERVERS, faulty, files, forget

VOCAB, T = 60_000, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three token files with documents, the first longer than a block of the cache."""
    place = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for k, n in enumerate((300_000, 5_000, 7_001)):
        ends = np.unique(np.append(rng.integers(1, n, n // 100), n)).tolist()
        documents = [
            Document(start, end, f"{k}-{i}", "source", i + 1)
            for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]
        tokens = rng.integers(1, VOCAB, n)
        tokens[-1] = 1  # the emulator of GCS takes a line end for its own at the end of an upload
        write_token_file(place / f"part-{k}.npy", tokens, documents, "uint16")
    return place


@pytest.fixture(scope="module", params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(request, folder):
    """The protocol and the faults of a server that has the files, with this process led there."""
    with SERVERS[request.param]() as variables, faulty(variables) as (led, faults):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in led.items():
                patch.setenv(name, value)
            forget()
            there = files(request.param)
            for path in sorted(folder.iterdir()):
                there.put_file(str(path), f"{request.param}://{BUCKET}/data/{path.name}")
            yield f"{request.param}://{BUCKET}/data", faults
        forget()


@pytest.fixture
def sound(bucket):
    url, faults = bucket
    faults.kinds, faults.done = (), []
    remote_tokens._blocks.clear()
    yield url, faults
    faults.kinds = ()


def config(where, **values) -> DataConfig:
    return DataConfig(paths=(f"{where}/*.npy",), sequence_length=T, **values)


def same_batches(a, b, steps: int) -> None:
    for step in range(steps):
        for one, other in zip(a.batch(step), b.batch(step), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("instances", ["fixed", "packed"])
def test_instances_are_those_of_local_files(sound, folder, tmp_path, instances):
    url, _ = sound
    packed = dict(instances=instances, document_masking=True, index_dir=str(tmp_path))
    here = open_dataset(config(folder, **packed), VOCAB)
    there = open_dataset(config(url, **packed), VOCAB)
    assert there.fingerprint == here.fingerprint
    assert there.table() == here.table()
    same_batches(here, there, 5)
    found = [dataclasses.replace(place, path="") for place in there.where(7)]
    assert found == [dataclasses.replace(place, path="") for place in here.where(7)]


def test_errors_slow_answers_and_cut_connections_change_nothing(sound, folder):
    url, faults = sound
    here, there = (open_dataset(config(at), VOCAB) for at in (folder, url))
    remote_tokens._blocks.clear()
    faults.kinds = ("500", "cut", "slow")
    same_batches(here, there, 4)
    same_batches(here, open_dataset(config(url), VOCAB), 1)
    assert {kind for kind, _, _ in faults.done} == {"500", "cut", "slow"}


def test_what_is_kept_is_bounded_and_not_asked_for_again(sound, monkeypatch):
    url, faults = sound
    there = open_dataset(config(url), VOCAB)
    there.instance(0)
    before = faults.requests
    first = there.instance(0)
    assert faults.requests == before
    monkeypatch.setattr(remote_tokens, "_BLOCKS", 2)
    for n in range(40):
        there.instance(n)
        assert len(remote_tokens._blocks) <= 2
    np.testing.assert_array_equal(there.instance(0).tokens_T, first.tokens_T)


def test_worker_processes_read_a_bucket(sound, folder):
    url, _ = sound
    if url.startswith("gs"):
        pytest.skip("seconds for what differs in the library alone")
    here, there = (open_dataset(config(at, workers=w), VOCAB) for at, w in ((folder, 0), (url, 1)))
    for (_, one), (_, other) in zip(
        load_batches(here, 0, 3), load_batches(there, 0, 3), strict=True
    ):
        np.testing.assert_array_equal(one.tokens_BT, other.tokens_BT)


def test_what_is_missing_or_damaged_is_named(sound, tmp_path):
    url, _ = sound
    there = files(url.partition(":")[0])
    for path, content, message in (
        ("none-*.npy", None, "no file matches"),
        ("none.npy", None, "no such token file"),
        ("odd.npy", b"abc", "3 bytes is not a multiple of 2"),
        ("empty.npy", b"", "empty token file"),
    ):
        if content is not None:
            there.pipe_file(f"{url}/bad/{path}", content)
        with pytest.raises(UserError, match=f"^{url}/bad/{path}".replace("*", r"\*")) as error:
            open_dataset(DataConfig(paths=(f"{url}/bad/{path}",), sequence_length=T), VOCAB)
        assert message in str(error.value)
