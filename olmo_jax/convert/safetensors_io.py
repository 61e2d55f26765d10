"""safetensors folders, read and written piece by piece.

The format is a JSON header, then raw little-endian arrays. So a reader can map the file and hand
out views, and a writer can write the header before any tensor is made: a model is never whole in
memory. (The library's own writer wants all of a file's tensors at once, its reader copies.)
"""

import json
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from olmo_jax.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# The format's other types, which buffers have (Pythia's causal masks): bytes of an element.
_OTHERS = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
_OTHERS |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_NAMES = {code: name for name, code in _CODES.items()}
_BLOCK_BYTES = 32 * 2**20
# Two runs of OLMo 2 1B (3 GB) from our format took 6.9 and 7.5 s without, 5.2 and 5.5 with these.
_AHEAD = 2

Progress = Callable[[int, int], None]
"""Called with the bytes done, and of how many."""


class Planned(NamedTuple):
    """A tensor to be written: its name, shape and type, and how to get its values when it is due
    (of any type and strides: `blocks` makes them the type's contiguous bytes)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """The values row by row in C order, as contiguous arrays of at most about 32 MiB."""
        values, dtype = self.read(), DTYPES[self.dtype]
        assert values.shape == self.shape, (self.name, values.shape, self.shape)
        if not values.shape:
            values = values.reshape(1)
        rows = max(1, _BLOCK_BYTES // max(1, dtype.itemsize * math.prod(values.shape[1:])))
        for start in range(0, len(values), rows):
            yield contiguous(values[start : start + rows].astype(dtype, copy=False))


def blocks_ahead(tensors: Iterable[Planned]) -> Iterator[np.ndarray]:
    """The blocks of all tensors, read in a thread while those before are used: at most `_AHEAD`
    of them (and the tensors that they are views of) wait."""
    blocks = (block for tensor in tensors for block in tensor.blocks())
    with ThreadPoolExecutor(1, "read") as pool:
        waiting = deque(pool.submit(next, blocks, None) for _ in range(_AHEAD))
        while (block := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, blocks, None))
            yield block


def common_dtype(names: Iterable[str]) -> str:
    """The one type of several tensors that keeps them as they are: float32 where they differ."""
    kinds = set(names)
    return kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES) else "float32"


def contiguous(a: np.ndarray) -> np.ndarray:
    """`a` in C order; itself where it is already.

    NumPy copies a transposed matrix of 2-byte numbers at 0.18 GB/s, and 16 of its rows at a time,
    which keeps the lines that it writes to in the cache, at 0.86.
    """
    if a.flags.c_contiguous or a.ndim != 2:
        return np.ascontiguousarray(a)
    out = np.empty(a.shape, a.dtype)
    for start in range(0, a.shape[1], 16):
        out[:, start : start + 16] = a[:, start : start + 16]
    return out


def write_folder(
    folder: Path,
    tensors: Iterable[Planned],
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Writes tensors, in this order, as one file or as shards with an index.

    `progress(done, total)` counts bytes. Raises OSError.
    """
    shards: list[list[Planned]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    done = 0
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / name, "wb") as file:
            write_file(file, shard, progress and _from(done, total, progress))
        done += sum(tensor.nbytes for tensor in shard)
        index |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def write_file(file: BinaryIO, tensors: list[Planned], progress: Progress | None = None) -> None:
    """Writes tensors, in this order, as one safetensors file."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    file.write(_header(tensors))
    for block in blocks_ahead(tensors):
        file.write(block.view(np.uint8).data)
        done += block.nbytes
        if progress:
            progress(done, total)


def _from(start: int, total: int, progress: Progress) -> Progress:
    return lambda done, _: progress(start + done, total)


def _header(tensors: list[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


class SafetensorsFile:
    """One file, mapped. UserError when it is missing, cut short or something else."""

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(size - 8, _MAX_HEADER_BYTES):
                    raise ValueError(f"its header has {length:,} bytes, the file {size:,}")
                self.entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
            self.entries.pop("__metadata__", None)
            self._start = 8 + length
            for name, entry in self.entries.items():
                self._check(name, entry, size)
            self._data = np.memmap(path, np.uint8, "r")
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; fetch the checkpoint again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise UserError(
                f"{path}: is no safetensors file, or a damaged one ({error}); fetch it again"
            ) from None

    def _check(self, name: str, entry: dict[str, Any], size: int) -> None:
        start, end = entry["data_offsets"]
        code = entry["dtype"]
        width = DTYPES[_NAMES[code]].itemsize if code in _NAMES else _OTHERS[code]
        if not 0 <= start <= end or end - start != math.prod(entry["shape"]) * width:
            raise ValueError(f"{name} has bytes {start} to {end} and shape {entry['shape']}")
        if self._start + end > size:
            raise UserError(
                f"{self.path}: is cut short: {name} ends at byte {self._start + end:,}, the file "
                f"has {size:,}; fetch it again"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it ("bfloat16" is ml_dtypes'). UserError when it is none
        that weights have."""
        code = self.entries[name]["dtype"]
        if code not in _NAMES:
            raise UserError(
                f"{self.path}: {name} has type {code}: weights are read of {', '.join(_NAMES)}"
            )
        return _NAMES[code]

    def read(self, name: str) -> np.ndarray:
        """A tensor as a view of the file: nothing is read until it is looked at."""
        start, end = (self._start + offset for offset in self.entries[name]["data_offsets"])
        return self._data[start:end].view(DTYPES[self.dtype(name)]).reshape(self.shape(name))


class SafetensorsFolder:
    """The tensors of a folder with one model.safetensors, or shards and an index.

    Raises UserError when a file is missing, cut short, damaged, or not what the index says.
    """

    def __init__(self, folder: Path):
        if (folder / INDEX).is_file():
            index = weight_map(folder / INDEX)
        elif (folder / SINGLE).is_file():
            index = None
        else:
            raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        self._where: dict[str, SafetensorsFile] = {}
        for file_name in sorted(set(index.values())) if index else [SINGLE]:
            file = SafetensorsFile(folder / file_name)
            if twice := sorted(self._where.keys() & file.entries.keys()):
                other = self._where[twice[0]].path.name
                raise UserError(f"{folder / file_name}: has tensor {twice[0]}, as {other} has")
            self._where |= dict.fromkeys(file.entries, file)
        for name, file_name in (index or {}).items():
            if name not in self._where:
                raise UserError(f"{folder / file_name}: has no tensor {name}, which {INDEX} names")

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._where[name].shape(name)

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it, without reading it."""
        return self._where[name].dtype(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor as it is stored, or only some of its rows (axis 0); a view of the file."""
        values = self._where[name].read(name)
        return values if rows is None else values[rows]


def weight_map(index: Path) -> dict[str, str]:
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
