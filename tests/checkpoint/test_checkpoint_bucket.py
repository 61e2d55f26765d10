"""Checkpoints in buckets, written to real servers on loopback."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from olmo_jax import storage
from olmo_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointReader, RunFolder
from olmo_jax.checkpoint import arrays as checkpoint_arrays
from olmo_jax.checkpoint.checksums import MANIFEST
from olmo_jax.checkpoint.fork import fork
from olmo_jax.errors import UserError
from tests.buckets import BUCKET, SERVERS, faulty, forget

STATE = {
    "params": {
        "embed": {"weight": np.arange(96, dtype=np.float32).reshape(8, 12)},
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 3,
    },
    "step": np.int32(7),
    "zeros": np.zeros((4, 5), np.float32),
    "flags": np.array([True, False]),
}


@pytest.fixture(scope="module", params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(request):
    with SERVERS[request.param]() as variables, faulty(variables) as (led, faults):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in led.items():
                patch.setenv(name, value)
            patch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)
            forget()
            yield f"{request.param}://{BUCKET}", faults
        forget()


@pytest.fixture
def run(bucket, request):
    """A new run folder's address."""
    bucket[1].kinds = ()
    yield f"{bucket[0]}/{request.node.originalname}"
    bucket[1].kinds = ()


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save(run: str, *steps: int, **config) -> CheckpointReader:
    config = CheckpointConfig(**{"every": 1, **config})
    checkpoints = RunFolder(run).checkpoints
    with Checkpointer(checkpoints, config, {"config.gin": b"x = 1"}) as checkpointer:
        for step in steps:
            checkpointer.save(step, STATE, {"config": {}})
    return CheckpointReader(checkpoints)


def test_a_state_comes_back_in_spite_of_faults(bucket, run, monkeypatch):
    monkeypatch.setattr(checkpoint_arrays, "CHUNK_BYTES", 100)  # several pieces an array
    bucket[1].kinds, bucket[1].every = ("500", "cut", "slow"), 13
    reader = save(run, 1000)
    same(reader.restore(1000, abstract(STATE)), STATE)
    assert {kind for kind, _, _ in bucket[1].done} == {"500", "cut", "slow"}
    assert reader.read_file(1000, "config.gin") == b"x = 1"
    reader.verify(1000)
    weights = reader.tensors(1000)
    assert set(weights) == {"embed/weight", "half"}
    np.testing.assert_array_equal(
        weights["embed/weight"][2:4].read().result(), STATE["params"]["embed"]["weight"][2:4]
    )


def test_orbax_reads_a_copy(run, tmp_path):
    reader = save(run, 1)
    for name in storage.listing(reader.path(1)):
        path = tmp_path / "checkpoints" / "step1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.read(reader.path(1) / name))
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), STATE["params"])
    read = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(tmp_path / "checkpoints/step1/params"),
        args=ocp.args.PyTreeRestore(restore_args=kinds),
    )
    same(read, STATE["params"])
    copy = CheckpointReader(tmp_path / "checkpoints")
    same(copy.restore(1, abstract(STATE)), STATE)


def test_the_manifest_is_the_commit(run, caplog):
    reader = save(run, 5, 6)
    assert reader.latest() == 6
    (reader.path(6) / MANIFEST).unlink()
    assert reader.latest() == 5 and "half-written" in caplog.text
    reader = save(run, 7)  # the next start clears up
    assert reader.steps() == [5, 7]
    assert not storage.listing(reader.path(6))


def test_damage_is_refused_and_the_step_before_named(run):
    reader = save(run, 5, 6)
    name = next(n for n in storage.listing(reader.path(6)) if n.startswith("params/embed.weight/0"))
    content = bytearray(storage.read(reader.path(6) / name))
    content[3] ^= 1
    storage.write(reader.path(6) / name, bytes(content))
    with pytest.raises(UserError, match=r"is damaged: .*checksum.*take step 5"):
        reader.restore(6, abstract(STATE))


def test_old_ephemeral_ones_go(run):
    reader = save(run, 2, 4, 10, 12, every=10, ephemeral_every=2)
    assert reader.steps() == [10, 12]
    assert {name.partition("/")[0] for name in storage.listing(reader.folder)} == {
        "step10",
        "step12",
    }


def test_a_fork_is_a_copy_with_a_note(run):
    save(run, 3)
    assert fork(run, f"{run}_fork") == 3
    reader = CheckpointReader(RunFolder(f"{run}_fork").checkpoints)
    same(reader.restore(3, abstract(STATE)), STATE)
    assert reader.metadata(3)["forked_from"] == {"run": run, "step": 3}
    with pytest.raises(UserError, match="is there already and not empty"):
        fork(run, f"{run}_fork")


def test_who_comes_last_has_the_run_folder(run):
    folder = RunFolder(run)
    folder.open_for_writing()
    save(run, 1)
    storage.write(folder.path / "claim.txt", b"otherhost process 12 abcdef")
    with pytest.raises(UserError, match=r"another process \(otherhost process 12\) has taken over"):
        save(run, 2)
    assert CheckpointReader(folder.checkpoints).steps() == [1]


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    at = bucket[0].replace(BUCKET, "nobucket") + "/run"
    with pytest.raises(UserError, match=f"^cannot write {at}: .*give a bucket") as error:
        RunFolder(at).open_for_writing()
    assert "\n" not in str(error.value)
