"""The run folder: where the files of a run lie, and who may write there.

Every write is either whole or not there at all. What the files mean is the business of the rooms
that write them.
"""

import errno
import fcntl
import os
import socket
import uuid
from pathlib import Path
from typing import IO

from olmo_jax import storage
from olmo_jax.errors import UserError
from olmo_jax.files import write_bytes, write_error

_CLAIM = "claim.txt"
# What this process has written as the claim of a run folder in a bucket.
_claims: dict[str, bytes] = {}
# Never closed: closing any file object of a locked file drops a POSIX lock.
_locks: dict[Path, IO[str]] = {}


class RunFolder:
    """The paths of a run, and atomic writes. Making one touches nothing; `open_for_writing` does.

    A read-only use (report, generate) needs no more than the constructor.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = storage.location(path)

    @property
    def config_json(self) -> Path:
        return self.path / "config.json"

    @property
    def environment_json(self) -> Path:
        return self.path / "environment.json"

    @property
    def data_json(self) -> Path:
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open_for_writing(self) -> None:
        """Makes the folder, tries a write, and claims it for this process until it ends.

        With several processes the first alone calls this.

        Raises UserError, before anything else was done, when the place is read-only or full or is
        not a folder, or when another process is training in it.
        """
        if storage.is_remote(self.path):
            self._claim()
            return
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
            if leftover.is_file():  # a folder is a conversion's, which may still be going on
                leftover.unlink(missing_ok=True)

    def _claim(self) -> None:
        """Takes a run folder in a bucket over. There is no lock that ends with its process, so the
        last to come has the folder, and one before it that still runs is stopped when it next
        commits (`refuse_lost_claim`)."""
        claim = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex}".encode()
        try:
            storage.write(self.path / _CLAIM, claim)
            storage.read(self.path / _CLAIM)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; give a bucket that you can "
                "write to and read from"
            ) from None
        _claims[str(self.path)] = claim

    def write_text(self, path: Path, text: str) -> None:
        """Writes a whole file atomically (old or new, never a part). Raises UserError."""
        self.write_bytes(path, text.encode())

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Writes a whole file atomically (old or new, never a part). Raises UserError."""
        try:
            if not storage.is_remote(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
        except OSError as error:
            raise write_error(path, error) from None


def refuse_lost_claim(run_dir: Path) -> None:
    """Raises UserError when a later process has taken over a run folder in a bucket, which this one
    had claimed."""
    mine = _claims.get(str(run_dir))
    if mine is None:
        return
    now = storage.read(run_dir / _CLAIM)
    if now != mine:
        other = " ".join(now.decode(errors="replace").split()[:3])
        raise UserError(
            f"another process ({other}) has taken over the run folder {run_dir}; this one stops. "
            "Start one at a time, or give another run folder"
        )
