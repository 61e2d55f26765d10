"""Writes PyTorch's files (`model.pt`) without PyTorch, tensor after tensor, from front to back.

torch.load(weights_only=True) reads them, memory-mapped or not: the zip's members are stored and
begin at multiples of 64 bytes from the archive's start, as torch's own do.
"""

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from olmo_jax.convert.safetensors_io import Planned, Progress
from olmo_jax.convert.torch_files import STORAGES
from olmo_jax.convert.torch_pickle import Call, Name, Persistent, pickled

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64


def write_state_dict(
    path: Path, tensors: Sequence[Planned], progress: Progress | None = None
) -> None:
    """Writes a state dict: each tensor is asked for when it is due, and is then let go.

    `progress(done, total)` counts bytes. Raises OSError.
    """
    total, done = sum(t.nbytes for t in tensors), 0
    state = {t.name: tensor_call(t, str(i)) for i, t in enumerate(tensors)}
    with open(path, "wb") as file:
        archive = Archive(file, path.stem)
        archive.start(state)
        for i, tensor in enumerate(tensors):
            archive.add(f"data/{i}", content(tensor), tensor.nbytes)
            done += tensor.nbytes
            if progress:
                progress(done, total)
        archive.finish()


def tensor_call(tensor: Planned, key: str) -> Call:
    """What rebuilds a row-major tensor from the whole of the storage `key`."""
    shape, elements = tensor.shape, math.prod(tensor.shape)
    storage = ("storage", Name("torch", _STORAGE_OF[tensor.dtype]), key, "cpu", elements)
    strides = tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
    hooks = Call(Name("collections", "OrderedDict"), ())
    args = (Persistent(storage), 0, shape, strides, False, hooks)
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), args)


def content(tensor: Planned) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order, some MiB at a time."""
    for block in tensor.blocks():
        yield block.reshape(-1).view(np.uint8).data


class Archive:
    """torch's zip, written into `file` from its present position on, without seeking back."""

    def __init__(self, file: IO[bytes], root: str):
        self._file, self._root = _Forward(file), root
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]

    def start(self, value: Any) -> None:
        """Writes the pickle of `value` (see `pickled`) and the members that go before the data."""
        for name, content in (
            ("data.pkl", pickled(value)),
            (".format_version", b"1"),
            (".storage_alignment", str(_ALIGNMENT).encode()),
            ("byteorder", b"little"),
        ):
            self.add(name, [memoryview(content)], len(content))

    def add(self, name: str, content: Iterable[memoryview], size: int) -> None:
        """Writes a member of `size` bytes."""
        # A fixed date: the same tensors give the same bytes.
        info = zipfile.ZipInfo(f"{self._root}/{name}", (1980, 1, 1, 0, 0, 0))
        large = size >= 1 << 31  # zipfile then adds a field of 20 bytes of its own
        head = self._file.tell() + 30 + len(info.filename.encode()) + 4 + 20 * large
        padding = -head % _ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=large) as member:
            for piece in content:
                member.write(piece)

    def finish(self) -> int:
        """Closes the archive, not the file; returns the archive's length in bytes."""
        self.add("version", [memoryview(b"3\n")], 2)
        self._zip.close()
        return self._file.tell()


class _Forward:
    """A file as zipfile sees a stream: it starts at 0 and cannot seek."""

    def __init__(self, file: IO[bytes]):
        self._file, self._at = file, 0

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        if self._file.closed:  # writing failed, and now zipfile's destructor finishes the archive
            return len(data)
        self._at += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()
