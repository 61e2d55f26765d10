"""Logs of a run folder in a bucket, where nothing can be appended to: written in parts.

The newest part is written again, whole, as it grows, and a new one begins when it is large; a
reader finds each part as it was at one of those moments (`files.jsonl_lines` reads them back).
"""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from olmo_jax import storage
from olmo_jax.errors import UserError
from olmo_jax.files import parts_folder

_PART_BYTES, _SECONDS = 1 << 20, 60.0


class Parts:
    """A growing log. `name()` gives each new part its path; each begins with `head`.

    What was appended is in the bucket after `flush`, and otherwise a minute later. Nothing but
    `flush` and `close` waits; what goes wrong in the background comes out of the next call.
    """

    def __init__(self, name: Callable[[], Path], head: bytes = b""):
        self._name, self._head = name, head
        self._path, self._content, self._written = name(), head, head
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._pending: Future[None] | None = None
        self._last = time.monotonic()

    def append(self, content: bytes) -> None:
        """Adds whole records. Raises UserError when an earlier part could not be written."""
        self._content += content
        if time.monotonic() - self._last > _SECONDS and (not self._pending or self._pending.done()):
            self._start()

    def flush(self) -> None:
        """Returns when all is in the bucket. Raises UserError."""
        self._start()
        self._wait()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._pool.shutdown()

    def _start(self) -> None:
        self._wait()
        self._last = time.monotonic()
        if self._content == self._written:
            return
        self._pending = self._pool.submit(storage.write, self._path, self._content)
        self._written = self._content
        if len(self._content) >= _PART_BYTES:
            self._path, self._content, self._written = self._name(), self._head, self._head

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        try:
            if pending:
                pending.result()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path.parent}: {error.strerror or error}; start the same "
                "command again to resume from the newest checkpoint"
            ) from error


class PartsLog:
    """`metrics.JsonlLog` in a bucket: one JSON object per line, each with its "step"."""

    def __init__(self, path: Path, resume_step: int):
        self._folder, self._number = parts_folder(path), 0
        try:
            self._cut_after(resume_step)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; give a bucket that can be "
                "written to"
            ) from error
        self._parts = Parts(self._next_name)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds `row` (JSON types; "step" among its keys)."""
        self._parts.append(json.dumps(row, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """Returns when all rows so far are in the bucket."""
        self._parts.flush()

    def close(self) -> None:
        self._parts.close()

    def _next_name(self) -> Path:
        self._number += 1
        return self._folder / f"{self._number:08d}.jsonl"

    def _cut_after(self, resume_step: int) -> None:
        """Drops the rows after `resume_step`, the latest parts first: a kill leaves no gap."""
        for name in sorted(storage.listing(self._folder), reverse=True):
            path = self._folder / name
            lines = storage.read(path).splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= resume_step]
            if not kept or resume_step == 0:
                path.unlink()
                continue
            if len(kept) < len(lines):
                storage.write(path, b"".join(line + b"\n" for line in kept))
            self._number = max(self._number, int(name.partition(".")[0]))
