"""The arrays of a checkpoint by tensorstore alone: how they lie in a bucket, and how they are read.

Orbax 0.12.8 writes to gs:// and not to s3://, and its OCDBT databases, one a process, are merged by
one process that reads and writes their manifests again and again. In a bucket each array is a zarr
array of its own, as Orbax writes without OCDBT (and reads): each piece of it an object that one
process writes once.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
import xxhash

from olmo_jax import storage

CHUNK_BYTES = 64 * 2**20
"""One array is stored in pieces of at most this, so that a slice of a big one can be read alone."""


class Writes(NamedTuple):
    """What was started: futures, and the digest of each file (by its path in the checkpoint)."""

    futures: list[Any]
    digests: dict[str, str]


def start_writes(folder: storage.PathLike, trees: Mapping[str, dict]) -> Writes:
    """Starts writing this process's share of each item's nested dict of arrays.

    Raises what tensorstore raises; the futures wait for the bucket, with retries.
    """
    writes = Writes([], {})
    for item, tree in trees.items():
        leaves = {
            ".".join(key.key for key in keys): leaf
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        store = ts.KvStore.open(storage.kvstore(f"{folder}/{item}")).result()

        def write(name: str, content: bytes, store=store, item=item) -> None:
            writes.futures.append(store.write(name, content))
            writes.digests[f"{item}/{name}"] = xxhash.xxh3_64_hexdigest(content)

        for name, leaf in leaves.items():
            _write_array(write, name, leaf)
        if jax.process_index() == 0:
            shapes = {name.replace(".", "/"): leaf.shape for name, leaf in leaves.items()}
            write("_METADATA", json.dumps(tree_metadata(shapes, use_ocdbt=False)).encode())
    return writes


def _write_array(write, name: str, array: jax.Array) -> None:
    dtype = array.dtype
    chunks = _chunks(array.sharding.shard_shape(array.shape), dtype.itemsize)
    if jax.process_index() == 0:
        metadata = {
            "zarr_format": 2,
            "shape": array.shape,
            "chunks": chunks,
            "dtype": "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).str,
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "order": "C",
        }
        write(f"{name}/.zarray", json.dumps(metadata).encode())
    for shard in array.addressable_shards:
        if shard.replica_id:  # another device's copy is written
            continue
        values = np.asarray(shard.data)
        starts = [span.start or 0 for span in shard.index]
        counts = (range(n // c) for n, c in zip(values.shape, chunks, strict=True))
        for at in itertools.product(*counts):
            piece = values[
                tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunks, strict=True))
            ]
            where = (i + s // c for i, s, c in zip(at, starts, chunks, strict=True))
            write(f"{name}/{'.'.join(map(str, where)) or '0'}", piece.tobytes())


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """A shard's shape, its first axes divided evenly until a piece is small enough."""
    chunks = list(shape)
    for axis, length in enumerate(shape):
        if prod(chunks) * itemsize > CHUNK_BYTES:
            across = prod(chunks) // length * itemsize
            most = max(1, CHUNK_BYTES // across)
            chunks[axis] = next(n for n in range(min(most, length), 0, -1) if length % n == 0)
    return tuple(chunks)


def open_arrays(folder: Any, names: Iterable[str]) -> dict[str, ts.TensorStore]:
    """Opens an item's arrays ("layers/attention/wq"), as Orbax or `start_writes` wrote them."""
    # Files are mapped: with one copy less, OLMo 2 1B (3 GB) went to transformers' format in 3.5
    # and 5.7 s against 5.2 and 5.5 s (two runs each, on a machine whose figures vary so).
    context = ts.Context({"file_io_mode": {"mode": "memmap"}})
    base = storage.kvstore(folder)
    is_ocdbt = storage.exists(folder / "manifest.ocdbt")

    def kvstore(name: str) -> dict[str, Any]:
        if is_ocdbt:
            return {"driver": "ocdbt", "base": base, "path": name}
        return base | {"path": f"{base['path']}{name}/"}

    opened = {
        name: ts.open(
            {"driver": "zarr", "kvstore": kvstore(name.replace("/", "."))},
            open=True,
            context=context,
        )
        for name in names
    }
    return {name: future.result() for name, future in opened.items()}


def read_arrays(stores: Mapping[str, ts.TensorStore], abstract: Mapping[str, Any]) -> dict:
    """The arrays on the devices of `abstract`'s shardings; each process reads what its devices
    hold, all at once."""
    reads = {}
    for name, leaf in abstract.items():
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        spans = sharding.addressable_devices_indices_map(leaf.shape)
        wanted = {_key(index, leaf.shape): index for index in spans.values()}
        futures = {key: stores[name][index].read() for key, index in wanted.items()}
        reads[name] = (leaf.shape, sharding, futures)

    def place(shape, sharding, futures) -> jax.Array:
        def part(index):
            return np.asarray(futures[_key(index, shape)].result())

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(*read) for name, read in reads.items()}


def _key(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(span.indices(n) for span, n in zip(index, shape, strict=True))


def tree_metadata(shapes: Mapping[str, Iterable[int]], use_ocdbt: bool) -> dict[str, Any]:
    """Orbax's description of a tree of nested dicts, by the shapes of its arrays ("a/b")."""

    def entry(keys: list[str], shape: Iterable[int]) -> dict[str, Any]:
        return {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: of a dict
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }

    tree = {
        str(tuple(name.split("/"))): entry(name.split("/"), shape)
        for name, shape in sorted(shapes.items())
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": use_ocdbt,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
