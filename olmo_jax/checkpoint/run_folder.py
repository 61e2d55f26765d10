"""The run folder: where each file of a run lies, and the only way in which files are written there.

Every write is either whole or not there at all (temporary file, fsync, rename), except for lines
appended to logs. What the files mean is the business of the rooms that write them.
"""

import errno
import fcntl
import os
import shutil
import uuid
from pathlib import Path
from typing import IO

from olmo_jax.errors import UserError


def sync_folder(folder: Path) -> None:
    """Forces a folder's entries (renames, new names) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file atomically: a reader finds the old content or the new, never a part.

    Raises OSError; `RunFolder` and `Checkpointer` turn it into a UserError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the operating system or of tensorstore means that no space is left."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text


def size_text(count: int) -> str:
    """A number of bytes for people: 999 bytes, 12.3 MB, 4.5 GB (decimal units)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def write_error(path: Path, error: OSError) -> UserError:
    """The one-line explanation of a write that failed."""
    if is_disk_full(error):
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
        free = size_text(shutil.disk_usage(folder).free)
        return UserError(
            f"cannot write {path}: the disk is full ({free} free); free some space there, or give "
            "another run folder"
        )
    return UserError(
        f"cannot write {path}: {error.strerror}; give a run folder on a disk that you can write to"
    )


# Never closed: closing any file object of a locked file drops a POSIX lock.
_locks: dict[Path, IO[str]] = {}


class RunFolder:
    """The paths of a run, and atomic writes. Making one touches nothing; `open_for_writing` does.

    A read-only use (report, generate) needs no more than the constructor.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser().absolute()

    @property
    def config_gin(self) -> Path:
        return self.path / "config.gin"

    @property
    def config_json(self) -> Path:
        return self.path / "config.json"

    @property
    def environment_json(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def instances_jsonl(self) -> Path:
        return self.path / "instances.jsonl"

    @property
    def samples_jsonl(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def data_json(self) -> Path:
        return self.path / "data.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open_for_writing(self) -> None:
        """Makes the folder, tries a write, and claims it for this process until it ends.

        With several processes the first alone calls this.

        Raises UserError, before anything else was done, when the place is read-only or full or is
        not a folder, or when another process is training in it.
        """
        probe = self.path / f".probe.{os.getpid()}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            # 64 KiB: an empty file can be made on a full disk.
            write_bytes(probe, bytes(64 * 1024))
            probe.unlink()
            lock = _locks.get(self.path)
            if lock is None:
                lock = _locks[self.path] = open(self.path / ".lock", "w")  # noqa: SIM115
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"the run folder {self.path} cannot be made: a file with that name, or on the way "
                "to it, is not a folder; give another run folder"
            ) from None
        except OSError as error:
            raise write_error(self.path, error) from None
        try:
            # A POSIX lock: gone with the process, even under SIGKILL, and not inherited by the
            # data workers that it forks.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # this file system has no locks: go on without
            raise UserError(
                f"another process is writing the run folder {self.path}; wait for it to end, or "
                "give another run folder"
            ) from None
        for leftover in self.path.glob(".*.tmp"):  # of writes that were killed
            leftover.unlink(missing_ok=True)

    def write_text(self, path: Path, text: str) -> None:
        """Writes a whole file atomically (old or new, never a part). Raises UserError."""
        self.write_bytes(path, text.encode())

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Writes a whole file atomically (old or new, never a part). Raises UserError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
        except OSError as error:
            raise write_error(path, error) from None

    def append_text(self, path: Path, text: str) -> None:
        """Appends whole lines to a log. Raises UserError.

        Not synced: a kill may lose the last line or leave a part of it, a resume cuts the log at
        its checkpoint anyway.
        """
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise write_error(path, error) from None
