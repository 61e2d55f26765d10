"""Files written whole or not at all, and what to tell a person when one could not be written.

Every room may import this file: it imports nothing of ours but such files.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from olmo_jax import storage
from olmo_jax.errors import UserError
from olmo_jax.numerals import size_text


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends: a reader, or a kill at any
    moment, finds the old content or all of the new. Nothing is left of a block that raises.

    Several threads or processes may do it at once. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file as `replacing` does, or an object of a bucket. Raises OSError."""
    if storage.is_remote(path):
        storage.write(path, content)
        return
    with replacing(path) as file:
        file.write(content)


def write_file(path: Path, text: str) -> None:
    """`write_bytes` for what a person asked for: raises UserError."""
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise write_error(path, error) from None


def make_folder_of(path: Path) -> None:
    """Before the work whose result a person wants in this file: a failure at its end would lose it.
    Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from None


def jsonl_lines(path: Path) -> Iterator[bytes]:
    """The lines of a run's log, or of its parts where it lies in a bucket (`train.parts`)."""
    if storage.is_remote(path):
        parts = parts_folder(path)
        names = sorted(storage.listing(parts))
        addresses = [parts / name for name in names]
        for content in storage.map_files(storage.read, addresses, addresses):
            yield from content.splitlines()
    elif path.exists():
        with open(path, "rb") as file:
            yield from file


def parts_folder(path: Path) -> Path:
    """Where the parts of a log in a bucket lie, in the order of their names."""
    return path.with_name(f"{path.name}.parts")


def sync_folder(folder: Path) -> None:
    """Forces a folder's entries (renames, new names) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the operating system or of tensorstore means that no space is left."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text


def write_error(path: Path, error: OSError) -> UserError:
    """The one-line explanation of a write that failed."""
    if is_disk_full(error):
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
        free = size_text(shutil.disk_usage(folder).free)
        return UserError(
            f"cannot write {path}: the disk is full ({free} free); free some space there, or give "
            "another folder"
        )
    return UserError(
        f"cannot write {path}: {error.strerror or error}; give a folder on a disk that you can "
        "write to"
    )
