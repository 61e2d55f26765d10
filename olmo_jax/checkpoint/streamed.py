"""Writes the weights of a checkpoint piece by piece, for models that do not fit in memory.

What results is what `Checkpointer.save` writes: Orbax's tree of weights, our metadata and manifest.
Orbax itself wants all arrays at once, so here tensorstore writes them, and the tree's description,
`_METADATA`, is written as Orbax writes it.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

from olmo_jax.checkpoint.arrays import CHUNK_BYTES, tree_metadata
from olmo_jax.checkpoint.checksums import digest, write_manifest
from olmo_jax.checkpoint.reader import METADATA
from olmo_jax.files import write_bytes

# Written and not yet in a file. OLMo 2 1B (3 GB) took 4.6 and 6.0 s with 64 MiB, 4.5 and 10.1 s
# with 256, 6.8 and 8.7 s with 512 (two runs each, the machine's figures vary so), at no more than
# 297, 556 and 779 MB of anonymous memory.
_IN_FLIGHT_BYTES = 64 * 2**20


class _Array(NamedTuple):
    store: ts.TensorStore
    split: int
    """The axis along which a slice is cut into pieces."""
    size: int
    """Its length in one piece."""


class StreamedCheckpoint:
    """One new checkpoint with weights alone, in `folder` (`…/step{N}`, which must not be there).

    It counts as complete after `commit`. One process. Raises OSError or tensorstore's ValueError
    when the disk is full.
    """

    def __init__(self, folder: Path):
        self.folder, self._params = folder, folder / "params"
        self._params.mkdir(parents=True)
        # No cache: it would hold every chunk written. And no file is forced to disk: what is
        # written here can be written again, and what a power cut takes fails its checksum.
        settings = {"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False}
        self._context = ts.Context(settings)
        self._arrays: dict[str, _Array] = {}
        self._pending: list[tuple[ts.WriteFutures, int]] = []
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="digest")
        self._digests: dict[Path, Future[str]] = {}

    def add(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        leading: int = 0,
        order: Literal["C", "F"] = "C",
    ) -> None:
        """Declares a weight ("layers/mlp/up/weight").

        Each index of the first `leading` axes (layer, expert) is stored apart from the others, in
        pieces of at most CHUNK_BYTES. `order` is that of the bytes in a piece: a matrix that comes
        as the transpose of a C-ordered one is written, and read so again, without being transposed
        (NumPy: 0.2 to 0.9 GB/s against 8). Readers that do not care see no difference.
        """
        numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        chunks, split = list(shape), leading if order == "C" else len(shape) - 1
        chunks[:leading] = [1] * leading
        across = prod(chunks) // chunks[split] * numpy_dtype.itemsize
        chunks[split] = min(chunks[split], max(1, CHUNK_BYTES // across))
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self._params}/"},
                "path": name.replace("/", "."),
            },
            "metadata": {
                "shape": list(shape),
                "chunks": chunks,
                "order": order,
                "compressor": None,
                "dtype": dtype if dtype == "bfloat16" else numpy_dtype.str,
            },
            # A piece of zeros is a piece, as in Orbax's own files.
            "store_data_equal_to_fill_value": True,
            "create": True,
        }
        array = ts.open(spec, context=self._context).result()
        self._arrays[name] = _Array(array, split, chunks[split])

    def write(self, name: str, at: tuple[int, ...], values: np.ndarray) -> int:
        """Writes a weight at an index of its leading axes, cast to its type; returns the bytes.

        `values` must not change any more: they are not copied, which takes OLMo 2 1B (3 GB) from
        8.8 and 5.6 s to 3.5 and 4.9 (two runs each).
        """
        array, split, size = self._arrays[name]
        dtype = array.dtype.numpy_dtype
        assert array.shape[len(at) :] == values.shape, (name, array.shape, values.shape)
        length = array.shape[split]
        for start in range(0, length, size):
            end = min(start + size, length)
            piece = (slice(None),) * (split - len(at)) + (slice(start, end),)
            block = values[piece].astype(dtype, copy=False)
            written = array[(*at, *piece)].write(block, can_reference_source_data_indefinitely=True)
            self._pending.append((written, block.nbytes))
            self._wait(_IN_FLIGHT_BYTES)
        return values.size * dtype.itemsize

    def commit(self, metadata: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Finishes: the description of the tree, `metadata` (JSON), small files by name, and last
        the manifest with every file's checksum."""
        self._wait(0)
        arrays = {name: array.store for name, array in self._arrays.items()}
        tree = tree_metadata({name: store.shape for name, store in arrays.items()}, use_ocdbt=True)
        write_bytes(self._params / "_METADATA", json.dumps(tree).encode())
        for name, content in files.items():
            write_bytes(self.folder / name, content)
        described = {
            f"params/{name}": {"shape": array.shape, "dtype": array.dtype.name}
            for name, array in arrays.items()
        }
        text = json.dumps({**metadata, "arrays": described}, indent=1)
        write_bytes(self.folder / METADATA, text.encode())
        known = {path: future.result() for path, future in self._digests.items()}
        write_manifest(self.folder, known)
        self.close()

    def close(self) -> None:
        """Ends what runs in the background. `commit` calls it; so must whoever gives up before:
        a write under way would make the folder anew after its removal."""
        for future, _ in self._pending:
            future.commit.exception()  # waits
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)

    def _wait(self, at_most: int) -> None:
        """Waits until no more than so many bytes are in flight; hashes the files that are new."""
        while self._pending and sum(size for _, size in self._pending) > at_most:
            self._pending.pop(0)[0].result()
            # OCDBT never touches a data file again; it appears under its name once it is whole.
            for path in (self._params / "d").glob("*"):
                if path not in self._digests and not path.name.endswith(".__lock"):
                    self._digests[path] = self._pool.submit(digest, path)
