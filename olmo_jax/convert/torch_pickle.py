"""PyTorch's pickles without PyTorch: read through an allow-list, and put together by hand.

A pickle is a program that may call anything by name. The reader here knows a handful of names and
refuses every other one before it is looked up; the writer emits only the opcodes that
torch.load(weights_only=True) takes (protocol 2). Zip files and tensors are torch_files.py's.
"""

import pickle
import struct
from dataclasses import dataclass
from typing import Any

from olmo_jax.errors import UserError

Allowed = dict[tuple[str, str], Any]
"""What each (module, name) that a pickle may name stands for."""


def unpickle(file: Any, allowed: Allowed, where: str, persistent_load: Any = None) -> Any:
    """The object in the pickle `file`, whose every name comes from `allowed`.

    `persistent_load(id)` resolves persistent ids. Raises UserError, which names `where`, for
    any other name and for a damaged pickle.
    """
    reader = _Unpickler(file, allowed, where)
    if persistent_load is not None:
        reader.persistent_load = persistent_load  # type: ignore[method-assign]
    try:
        return reader.load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{where}: its pickle is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, allowed: Allowed, where: str):
        super().__init__(file)
        self._allowed, self._where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UserError(
                f"{self._where}: its pickle names {module}.{name}, which no weights need: refused, "
                "nothing in it was run; give a file of tensors only, or safetensors"
            ) from None


@dataclass(frozen=True)
class Name:
    """A global, module.name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """function(*args), called when the pickle is read."""

    function: Name
    args: tuple


@dataclass(frozen=True)
class Instance:
    """An object of `kind`, made without its constructor and then given `state`."""

    kind: Name
    state: Any


@dataclass(frozen=True)
class Persistent:
    """A persistent id: how torch points at a storage."""

    id: Any


@dataclass(frozen=True)
class Pairs:
    """A dictionary whose keys may be marks of the kinds above, which have no hash of their own."""

    items: list[tuple[Any, Any]]


def pickled(value: Any) -> bytes:
    """Plain data and the marks above as a protocol-2 pickle; same value, same bytes."""
    out = bytearray(b"\x80\x02")
    _emit(value, out)
    return bytes(out + b".")


def _emit(value: Any, out: bytearray) -> None:
    match value:
        case None:
            out += b"N"
        case bool():
            out += b"\x88" if value else b"\x89"
        case int() if 0 <= value < 256:
            out += b"K" + bytes([value])
        case int() if -(1 << 31) <= value < 1 << 31:
            out += b"J" + struct.pack("<i", value)
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            out += b"\x8a" + bytes([len(data)]) + data
        case float():
            out += b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            out += b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            out += b"("
            for item in value:
                _emit(item, out)
            out += b"t"
        case list():
            out += b"]("
            for item in value:
                _emit(item, out)
            out += b"e"
        case dict():
            _emit(Pairs(list(value.items())), out)
        case Pairs(items):
            out += b"}("
            for key, item in items:
                _emit(key, out)
                _emit(item, out)
            out += b"u"
        case Name(module, name):
            out += f"c{module}\n{name}\n".encode()
        case Call(function, args):
            _emit(function, out)
            _emit(args, out)
            out += b"R"
        case Instance(kind, state):
            _emit(kind, out)
            out += b")\x81"
            _emit(state, out)
            out += b"b"
        case Persistent(id):
            _emit(id, out)
            out += b"Q"
        case _:
            raise TypeError(f"no pickle for a {type(value).__name__}")
