"""OLMo-core's distributed checkpoint folder (torch.distributed.checkpoint), without PyTorch.

.metadata is a pickle: for each tensor its shape, type and chunks, and for each chunk the file, the
byte and the length where it lies. There, in __RANK_N.distcp, is a whole zip as torch.save writes
it, of one tensor (or of one small object, such as an optimizer setting).
"""

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olmo_jax.convert.safetensors_io import Planned, Progress
from olmo_jax.convert.torch_files import DTYPES, MappedFile, TensorRef, read_archive
from olmo_jax.convert.torch_pickle import Allowed, Call, Instance, Name, Pairs, pickled, unpickle
from olmo_jax.convert.torch_write import Archive, content, tensor_call
from olmo_jax.errors import UserError

METADATA = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo")


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


class DistcpTensors:
    """The tensors of a checkpoint folder whose names begin with `prefix`, by the rest of the name.

    Opening reads .metadata and looks that every file is there in which they lie.
    """

    def __init__(self, folder: Path, prefix: str = "model."):
        self.folder = folder
        entries = _read_metadata(folder, prefix)
        self._prefix = prefix
        self._entries = {name[len(prefix) :]: entry for name, entry in entries.items()}
        self._files = {
            file: MappedFile(folder / file)
            for file in sorted({c.file for e in self._entries.values() for c in e.chunks})
        }

    def names(self) -> set[str]:
        """Names of all tensors, without the prefix."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it ("bfloat16" is ml_dtypes')."""
        return DTYPES[self._entries[name].dtype].name

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its first axis; only the chunks that hold them are read."""
        entry = self._entries[name]
        whole = len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.shape
        if whole:
            values = self._chunk(name, entry, entry.chunks[0])
            return values if rows is None else values[rows]
        first, last, _ = (rows or slice(None)).indices(entry.shape[0])
        out = np.empty((max(last - first, 0), *entry.shape[1:]), DTYPES[entry.dtype])
        for chunk in entry.chunks:
            low, high = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            begin, end = max(low, first), min(high, last)
            if begin >= end or 0 in chunk.sizes:
                continue
            rest = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            box = (slice(begin - first, end - first), *(slice(o, o + n) for o, n in rest))
            out[box] = self._chunk(name, entry, chunk)[begin - low : end - low]
        return out

    def _chunk(self, name: str, entry: _Entry, chunk: _Chunk) -> np.ndarray:
        where = f"{self.folder / chunk.file}: {self._prefix}{name}"
        ref = read_archive(self._files[chunk.file].data, where, chunk.start, chunk.length)
        if (
            not isinstance(ref, TensorRef)
            or ref.shape != chunk.sizes
            or ref.dtype != DTYPES[entry.dtype]
        ):
            raise UserError(f"{where}: is not the {entry.dtype} {chunk.sizes} that .metadata names")
        return ref.read()


def stored_files(metadata: Any, where: str, prefix: str = "model.") -> set[str]:
    """The names of the files beside .metadata (an open file) in which the tensors whose names
    begin with `prefix` lie. UserError."""
    saved = unpickle(metadata, _classes(), where)
    try:
        places = saved.state["storage_data"].items()
        chosen = [info.state for key, info in places if key.key()[0].startswith(prefix)]
        names = {place["relative_path"] for place in chosen}
        outside = sorted(name for name in names if Path(name).name != name)
    except Exception as error:  # a damaged pickle gives anything, of any shape
        raise UserError(f"{where}: its .metadata is damaged ({type(error).__name__})") from None
    if outside:
        raise UserError(f"{where}: names a file outside its folder, {outside[0]!r}: refused")
    return {METADATA, *names}


def _read_metadata(folder: Path, prefix: str) -> dict[str, _Entry]:
    path = folder / METADATA
    classes = _classes()
    tensor_class = classes[_CLASSES, "TensorStorageMetadata"]
    try:
        with open(path, "rb") as file:
            saved = unpickle(file, classes, str(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), so this is no OLMo-core checkpoint"
        ) from None
    try:
        places = {key.key(): info.state for key, info in saved.state["storage_data"].items()}
        return {
            str(name): _entry(folder, str(name), saved_entry.state, places)
            for name, saved_entry in saved.state["state_dict_metadata"].items()
            if isinstance(saved_entry, tensor_class) and str(name).startswith(prefix)
        }
    except UserError:
        raise
    except Exception as error:  # a damaged pickle gives anything, of any shape
        raise UserError(
            f"{path}: is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from None


def _entry(folder: Path, name: str, state: dict, places: dict) -> _Entry:
    path = folder / METADATA
    dtype, shape = state["properties"].state[0], tuple(state["size"])
    chunks = []
    for saved in state["chunks"]:
        offsets, sizes = tuple(saved.state["offsets"]), tuple(saved.state["sizes"])
        place = places.get((name, offsets))
        if place is None:
            raise UserError(f"{path}: says of no file that {name} at {offsets} lies in it")
        if place.get("transform_descriptors"):
            raise UserError(f"{path}: {name} is stored compressed, which is not read")
        file = place["relative_path"]
        if file != Path(file).name:
            raise UserError(f"{path}: names a file outside its folder, {file!r}: refused")
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: is missing, and {name} lies in it")
        inside = zip(offsets, sizes, shape, strict=True)
        if not all(o >= 0 and n >= 0 and o + n <= size for o, n, size in inside):
            raise UserError(f"{path}: a chunk of {name} lies outside its shape {shape}")
        chunks.append(_Chunk(offsets, sizes, file, place["offset"], place["length"]))
    held = sum(math.prod(chunk.sizes) for chunk in chunks)
    if held != math.prod(shape):
        raise UserError(f"{path}: the chunks of {name} hold {held} of {math.prod(shape)} elements")
    if len(chunks) > 1 and _overlap(chunks):
        raise UserError(f"{path}: chunks of {name} overlap, and others are missing")
    return _Entry(dtype, shape, tuple(chunks))


def _overlap(chunks: Sequence[_Chunk]) -> bool:
    """Whether two of a tensor's boxes share an element."""
    low_NA = np.array([chunk.offsets for chunk in chunks])
    high_NA = low_NA + [chunk.sizes for chunk in chunks]
    shared = [
        np.all(np.maximum(low_NA[i], low_NA[i + 1 :]) < np.minimum(high_NA[i], high_NA[i + 1 :]), 1)
        for i in range(len(chunks) - 1)
    ]
    return any(map(np.any, shared))


def _classes() -> Allowed:
    """What .metadata may name. Classes and functions are made anew for each file: a pickle can set
    their attributes, and must not reach the next one's, nor Python's own."""

    class Record:
        """Stands for a dataclass of torch's: takes its state and does nothing."""

        def __setstate__(self, state: Any) -> None:
            self.__dict__["state"] = state

    class Index(Record):
        """MetadataIndex, a dictionary's key; equal by name and offset."""

        def key(self) -> tuple:
            state = self.__dict__["state"]
            return state["fqn"], state.get("offset")

        def __hash__(self) -> int:
            return hash(self.key())

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Index) and self.key() == other.key()

    class Tensor(Record):
        """TensorStorageMetadata."""

    def path(*parts: str) -> str:
        return "/".join(parts)

    old = "torch.distributed._shard.sharded_tensor.metadata"  # torch 2.2 and before
    records = ("Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")
    return {
        **{(_CLASSES, name): Record for name in (*records, "StorageMeta")},
        (_CLASSES, "MetadataIndex"): Index,
        (_CLASSES, "TensorStorageMetadata"): Tensor,
        (_CLASSES, "_MEM_FORMAT_ENCODING"): int,
        (old, "TensorProperties"): Record,
        (old, "MEM_FORMAT_ENCODING"): int,
        _STORAGE_INFO: Record,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Record,  # torch's own writer
        ("torch.serialization", "_get_layout"): str,
        ("torch", "Size"): tuple,
        ("collections", "OrderedDict"): dict,
        ("pathlib", "PosixPath"): path,
        ("pathlib", "PurePosixPath"): path,
        **{("torch", name): name for name in DTYPES},
    }


def write_distcp(
    folder: Path,
    tensors: Sequence[Planned],
    max_file_bytes: int,
    progress: Progress | None = None,
    prefix: str = "model",
) -> None:
    """Writes tensors as a checkpoint folder that OLMo-core loads, in files of about
    `max_file_bytes`; .metadata comes last, so that a folder without it is no checkpoint.

    `progress(done, total)` counts bytes. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(t.nbytes for t in tensors)
    entries: dict[str, Instance] = {}
    storage: list[tuple[Any, Any]] = []
    done = at = number = 0
    file = open(folder / "__0_0.distcp", "wb")  # noqa: SIM115 (a new one when this is full)
    try:
        for tensor in tensors:
            if at and at + tensor.nbytes > max_file_bytes:
                file.close()
                number, at = number + 1, 0
                file = open(folder / f"__0_{number}.distcp", "wb")  # noqa: SIM115
            archive = Archive(file, "archive")
            archive.start(tensor_call(tensor, "0"))
            archive.add("data/0", content(tensor), tensor.nbytes)
            length = archive.finish()
            name = f"{prefix}.{tensor.name}"
            entries[name] = _tensor(tensor.shape, tensor.dtype)
            index = {"fqn": name, "index": 0, "offset": _size((0,) * len(tensor.shape))}
            place = {"relative_path": f"__0_{number}.distcp", "offset": at, "length": length}
            storage.append((_record("MetadataIndex", index), Instance(Name(*_STORAGE_INFO), place)))
            at += length
            done += tensor.nbytes
            if progress:
                progress(done, total)
    finally:
        file.close()
    # A name made from the content's, not a random one: the same tensors give the same bytes.
    save_id = str(uuid.uuid5(uuid.NAMESPACE_OID, "\n".join(entries)))
    meta: dict[str, Any] = {
        "checkpoint_id": None,
        "save_id": save_id,
        "load_id": None,
        "modules": [],
    }
    state = {
        "state_dict_metadata": entries,
        "planner_data": {name: (prefix, name[len(prefix) + 1 :]) for name in entries},
        "storage_data": Pairs(storage),
        "storage_meta": _record("StorageMeta", meta),
        "version": None,
    }
    (folder / METADATA).write_bytes(pickled(_record("Metadata", state)))


def _tensor(shape: tuple[int, ...], dtype: str) -> Instance:
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Call(Name(_CLASSES, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (Name("torch", dtype), layout, False, memory, False)
    chunk = {"offsets": _size((0,) * len(shape)), "sizes": _size(shape)}
    state = {
        "properties": _record("TensorProperties", properties),
        "size": _size(shape),
        "chunks": [_record("ChunkStorageMetadata", chunk)],
    }
    return _record("TensorStorageMetadata", state)


def _size(values: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (values,))


def _record(name: str, state: Any) -> Instance:
    return Instance(Name(_CLASSES, name), state)
