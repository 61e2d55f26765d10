"""Reads the tensors of PyTorch's own files (`model.pt`, `pytorch_model.bin`) without PyTorch.

Such a file is a zip whose members are stored, not compressed: NAME/data.pkl, a pickle in which each
tensor is a call of torch._utils._rebuild_tensor_v2 on a persistent id ("storage", class, key,
device, elements); NAME/data/KEY, that storage's bytes; NAME/byteorder. Only the pickle is
interpreted, through an allow-list; the rest is mapped, and pages in as it is read.
"""

import io
import math
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from olmo_jax.convert.safetensors_io import weight_map
from olmo_jax.convert.torch_pickle import Allowed, unpickle
from olmo_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
"""numpy's type for each torch.dtype that a checkpoint may hold."""

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""The torch.dtype that each of torch's storage classes holds."""


class MappedFile:
    """A local file as an array of bytes, mapped and not read. UserError when there is none."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, "u1")
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; fetch the checkpoint again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies in a file."""

    data: np.ndarray
    """The file's bytes."""
    offset: int
    """The byte at which its first element begins."""
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements, as torch counts."""
    swapped: bool = False
    """Written on a machine of the other byte order."""

    def read(self) -> np.ndarray:
        """The tensor as a read-only view of the file; nothing is read until it is touched."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        width = self.dtype.itemsize
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        flat = self.data[self.offset : self.offset + (last + 1) * width].view(self.dtype)
        strides = tuple(s * width for s in self.strides)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        if not self.swapped:
            return view
        return np.ascontiguousarray(view).view(f"u{width}").byteswap().view(self.dtype)


class TorchTensors:
    """The tensors of a folder's `name` (model.pt, pytorch_model.bin), or of the shards that its
    index `name`.index.json lists."""

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        index = folder / f"{name}.index.json"
        self._refs: dict[str, TensorRef] = {}
        if not index.is_file():
            self._refs = read_state_dict(folder / name)
            return
        wanted = weight_map(index)
        for shard in sorted(set(wanted.values())):
            there = read_state_dict(folder / shard)
            for tensor, file in wanted.items():
                if file == shard:
                    if tensor not in there:
                        raise UserError(
                            f"{folder / shard}: has no tensor {tensor}, which the index wants"
                        )
                    self._refs[tensor] = there[tensor]

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._refs)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._refs[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it ("bfloat16" is ml_dtypes')."""
        return self._refs[name].dtype.name

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor as it is stored, or some of its first axis; a view of the mapped file."""
        values = self._refs[name].read()
        return values if rows is None else values[rows]


def read_state_dict(path: Path) -> dict[str, TensorRef]:
    """The tensors of a .pt or .bin file, by name. UserError for anything but a state dict."""
    file = MappedFile(path)
    state = read_archive(file.data, str(path))
    if isinstance(state, dict) and all(isinstance(v, TensorRef) for v in state.values()):
        return {str(name): ref for name, ref in state.items()}
    raise UserError(f"{path}: is no state dict (a dictionary of tensors and nothing else)")


def read_archive(data: np.ndarray, where: str, start: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote, with a `TensorRef` for each tensor.

    `start` and `length` pick a zip that lies inside a larger file. Raises UserError, which names
    `where`.
    """
    length = data.size - start if length is None else length
    if start < 0 or length < 0 or start + length > data.size:
        raise UserError(f"{where}: is cut short: its {data.size} bytes end before what it lists")
    window = data[start : start + length]
    head = bytes(window[:4])
    if head[:1] == b"\x80":
        raise UserError(
            f"{where}: is in PyTorch's format of before 1.6, which is not read; load it with torch "
            "and save it again"
        )
    if head != b"PK\x03\x04":
        raise UserError(f"{where}: is no file of torch.save (it does not begin as a zip)")
    try:
        archive = zipfile.ZipFile(_Window(window))  # type: ignore[arg-type]
        members = {info.filename: info for info in archive.infolist()}
    except Exception as error:  # zipfile raises several on damage
        raise UserError(f"{where}: is cut short or damaged ({error}); fetch it again") from None
    root = next((n[: -len("data.pkl")] for n in members if n.endswith("/data.pkl")), None)
    if root is None:
        raise UserError(f"{where}: is a zip, but holds no data.pkl: not a file of torch.save")

    def span(name: str) -> tuple[int, int]:
        """First byte in `data`, and length, of a member."""
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{where}: {name} is compressed, which torch.save never does: refused")
        local = bytes(window[info.header_offset : info.header_offset + 30])
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise UserError(f"{where}: {name} is cut short or damaged; fetch it again")
        # The local header's own lengths: its padding differs from the central directory's.
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        first = info.header_offset + 30 + name_length + extra_length
        if first + info.file_size > length:
            raise UserError(f"{where}: {name} runs past the end of the file; fetch it again")
        return start + first, info.file_size

    def content(name: str) -> bytes:
        first, size = span(name)
        return bytes(data[first : first + size])

    order = content(root + "byteorder") if root + "byteorder" in members else b"little"
    allowed = _allowed(_Tensors(data, where, order == b"big"))

    def storage(pid: Any) -> "_Storage":
        kind, dtype, key, _, elements = pid
        name = f"{root}data/{key}"
        if kind != "storage" or name not in members:
            raise UserError(f"{where}: the storage {key!r} is missing")
        first, size = span(name)
        if size != elements * DTYPES[dtype].itemsize:
            raise UserError(f"{where}: storage {key!r} has {size} bytes, not {elements} {dtype}")
        return _Storage(first, dtype, elements)

    return unpickle(io.BytesIO(content(root + "data.pkl")), allowed, where, storage)


@dataclass(frozen=True)
class _Storage:
    offset: int
    dtype: str
    elements: int


@dataclass(frozen=True)
class _Tensors:
    """Stands for torch._utils._rebuild_tensor_v2."""

    data: np.ndarray
    where: str
    swapped: bool

    def __call__(self, storage: _Storage, offset: int, shape, strides, *_unused) -> TensorRef:
        shape, strides = tuple(shape), tuple(strides)
        sane = len(shape) == len(strides) and min((offset, *shape, *strides)) >= 0
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=False))
        if not sane or (math.prod(shape) and last >= storage.elements):
            raise UserError(
                f"{self.where}: a tensor of shape {shape} reaches outside its storage of "
                f"{storage.elements} elements"
            )
        dtype = DTYPES[storage.dtype]
        first = storage.offset + offset * dtype.itemsize
        return TensorRef(self.data, first, dtype, shape, strides, self.swapped)


def _allowed(tensors: _Tensors) -> Allowed:
    return {
        ("torch._utils", "_rebuild_tensor_v2"): tensors,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_unused: data,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): tuple,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
        **{("torch.storage", name): dtype for name, dtype in STORAGES.items()},
    }


class _Window(io.RawIOBase):
    """An array of bytes as a file, for zipfile; only what is asked for is read."""

    def __init__(self, data: np.ndarray):
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._data.size)[whence]
        if self._at < 0:
            raise OSError("seek before the start")
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._data.size if size is None or size < 0 else self._at + size
        piece = bytes(self._data[self._at : end])
        self._at += len(piece)
        return piece
