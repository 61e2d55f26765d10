"""Writes scalars as a TensorBoard event file: TFRecord frames around `Event` protocol buffers.

Not a general writer: scalars only, one event a row. It stands in for tensorboardX, which imports
torch wherever torch is installed (1.1 s and its memory), keeps up to two minutes of rows in a
queue that a kill loses, and writes over its own file when a run resumes within the same second.
Formats: tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto, and TFRecord,
with its masked CRC-32C.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path

from olmo_jax import storage
from olmo_jax.train.parts import Parts


class EventFile:
    """A new event file in `folder`. TensorBoard forgets what older files say from `resume_step` on.

    Rows reach the operating system unbuffered, in order; in a bucket, they go in parts.
    """

    def __init__(self, folder: Path, resume_step: int):

        def name() -> Path:  # TensorBoard reads a folder's files in the order of their names
            return folder / f"events.out.tfevents.{time.time_ns()}"

        head = _record(_bytes(3, b"brain.Event:2"), 0, time.time())
        self._parts: Parts | None = None
        if storage.is_remote(folder):
            self._parts = Parts(name, head)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(name(), "xb", buffering=0)  # noqa: SIM115 (closed by close)
            self._file.write(head)
        session_start = _bytes(7, _varint(1 << 3) + _varint(1))  # SessionLog.status = START
        self._write(session_start, resume_step + 1 if resume_step else 0, time.time())

    def write(self, scalars: Mapping[str, float], step: int, wall_time: float) -> None:
        """One point of each curve; `wall_time` in unix seconds."""
        values = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", value))
            for name, value in scalars.items()
        )
        self._write(_bytes(5, values), step, wall_time)

    def flush(self) -> None:
        """Returns when all rows so far are in the bucket; of a disk, it asks nothing."""
        if self._parts:
            self._parts.flush()

    def close(self) -> None:
        (self._parts or self._file).close()

    def _write(self, what: bytes, step: int, wall_time: float) -> None:
        record = _record(what, step, wall_time)
        if self._parts:
            self._parts.append(record)
        else:
            self._file.write(record)


def _record(what: bytes, step: int, wall_time: float) -> bytes:
    """An event in its frame."""
    event = b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + what
    length = struct.pack("<Q", len(event))
    return length + _masked_crc32c(length) + event + _masked_crc32c(event)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _bytes(field: int, value: bytes) -> bytes:
    """A length-delimited field of a protocol buffer: string, bytes or message."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli, reflected
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def _masked_crc32c(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
