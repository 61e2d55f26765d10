"""safetensors folders, read and written one tensor at a time.

The format (a JSON header, then raw little-endian arrays) lets the header be written before any
tensor is made, so that a model is never whole in memory; the library's own writer wants all of a
file's tensors at once.
"""

import json
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from olmo_jax.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {"float32": "F32", "bfloat16": "BF16"}
_NAMES = {code: name for name, code in _CODES.items()} | {"F16": "float16", "F64": "float64"}


class Planned(NamedTuple):
    """A tensor to be written: its name and shape, and how to get its values when it is due."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_folder(
    folder: Path,
    tensors: Iterable[Planned],
    dtype: str,
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes tensors, in this order, as one file or as shards with an index.

    `progress(done, total)` counts bytes. Raises OSError.
    """
    width = DTYPES[dtype].itemsize
    shards: list[list[Planned]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        size = int(np.prod(tensor.shape)) * width
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    total = sum(int(np.prod(t.shape)) * width for shard in shards for t in shard)
    done = 0
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(_header(shard, dtype, width))
            for tensor in shard:
                # ascontiguousarray: a transpose is a view, whose bytes are in the other order.
                values = np.ascontiguousarray(tensor.read().astype(DTYPES[dtype], copy=False))
                assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
                file.write(values.view(np.uint8).data)
                index[tensor.name] = name
                done += values.nbytes
                if progress:
                    progress(done, total)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _header(shard: list[Planned], dtype: str, width: int) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + int(np.prod(tensor.shape)) * width
        entries[tensor.name] = {
            "dtype": _CODES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


class SafetensorsFolder:
    """The tensors of a folder with one model.safetensors, or shards and an index."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        if (folder / INDEX).is_file():
            weight_map = _weight_map(folder / INDEX)
        elif (folder / SINGLE).is_file():
            weight_map = None
        else:
            raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        self._files = {}
        for name in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
            try:
                self._files[name] = stack.enter_context(safe_open(folder / name, "np"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / name}: cannot be read: {error}") from None
        self._where = weight_map or {n: SINGLE for n in self._files[SINGLE].keys()}  # noqa: SIM118

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it ("bfloat16" is ml_dtypes')."""
        code = self._files[self._where[name]].get_slice(name).get_dtype()
        return _NAMES.get(code, code)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor as it is stored, or only some of its rows (axis 0)."""
        try:
            file = self._files[self._where[name]]
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except SafetensorError as error:
            path = self.folder / self._where[name]
            raise UserError(f"{path}: has no readable tensor {name}: {error}") from None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to file name, as an index says; only files beside the index are taken."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert all(isinstance(name, str) for name in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{index}: is no index of tensors; write the folder again") from None
    outside = sorted(name for name in weight_map.values() if Path(name).name != name)
    if outside:
        raise UserError(f"{index}: names a file outside its folder, {outside[0]!r}: refused")
    return weight_map
