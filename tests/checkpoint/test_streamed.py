"""A checkpoint written piece by piece is one that Orbax wrote, to every reader."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointReader, streamed
from olmo_jax.checkpoint.checksums import first_damage

RNG = np.random.default_rng(0)
WEIGHTS = {
    "embed/weight": RNG.normal(size=(50, 8)).astype(np.float32),
    "layers/mlp/up/weight": RNG.normal(size=(3, 8, 21)).astype(jnp.bfloat16),
    "layers/experts/up/weight": RNG.normal(size=(2, 3, 8, 6)).astype(np.float16),
    "layers/norm/weight": np.zeros((3, 8), np.float32),
}
LEADING = {
    "embed/weight": 0,
    "layers/mlp/up/weight": 1,
    "layers/experts/up/weight": 2,
    "layers/norm/weight": 1,
}


def tree() -> dict:
    nested: dict = {}
    for name, values in WEIGHTS.items():
        *above, last = name.split("/")
        node = nested
        for key in above:
            node = node.setdefault(key, {})
        node[last] = values
    return {"params": nested}


@pytest.fixture(params=["C", "F"])
def written(request, tmp_path, monkeypatch) -> CheckpointReader:
    # Pieces of 100 bytes: tables and matrices are cut, and not into equal parts.
    monkeypatch.setattr(streamed, "CHUNK_BYTES", 100)
    monkeypatch.setattr(streamed, "_IN_FLIGHT_BYTES", 300)
    folder = tmp_path / "100%41 a|b"  # which would be another place in a URL
    checkpoint = streamed.StreamedCheckpoint(folder / "step0")
    for name, values in WEIGHTS.items():
        leading = LEADING[name]
        checkpoint.add(name, values.shape, str(values.dtype), leading, request.param)
        for at in np.ndindex(*values.shape[:leading]):
            part = values[at]
            checkpoint.write(name, at, np.asfortranarray(part) if request.param == "F" else part)
    checkpoint.commit({"step": 0, "permanent": True, "config": {}}, {"a.txt": b"kept"})
    return CheckpointReader(folder)


def test_orbax_restores_it_onto_any_sharding(written):
    assert first_damage(written.path(0)) is None
    assert written.read_file(0, "a.txt") == b"kept"
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    for spec in (PartitionSpec(), PartitionSpec(None, "x")):
        sharding = NamedSharding(mesh, spec)
        wanted = jax.tree.map(
            lambda a, s=sharding: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=s if a.shape[1] % mesh.size == 0 else None
            ),
            tree(),
        )
        restored = written.restore(0, wanted)
        jax.tree.map(np.testing.assert_array_equal, restored, tree())


def test_slices_are_read_alone(written):
    tensors = written.tensors(0)
    for name, values in WEIGHTS.items():
        np.testing.assert_array_equal(tensors[name][1].read().result(), values[1])
        first = (1,) * LEADING[name]
        assert tensors[name].chunk_layout.read_chunk.shape[: LEADING[name]] == first


def test_its_description_is_orbax_own(written, tmp_path):
    (tmp_path / "whole").mkdir()
    with Checkpointer(tmp_path / "whole", CheckpointConfig()) as checkpointer:
        checkpointer.save(0, jax.tree.map(jnp.asarray, tree()), {"config": {}})
    ours, theirs = (
        json.loads((folder / "step0" / "params" / "_METADATA").read_bytes())
        for folder in (written.folder, tmp_path / "whole")
    )
    assert ours == theirs


def test_a_damaged_piece_is_found(written):
    file = max((written.path(0) / "params" / "d").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "checksum" in (first_damage(written.path(0)) or "")
