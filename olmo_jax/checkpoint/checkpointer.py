"""Saves checkpoints in the background, commits them, and removes the ones no longer wanted.

A save is put together in `step{N}.tmp`, gets its manifest as its last file, and becomes `step{N}`
by one rename, which a local disk does as a whole or not at all. A bucket has no rename: there a
save is put together under its own name (arrays.py), and the manifest, written last, is by itself
the commit. An older checkpoint is removed only after that; it is first renamed away (in a bucket
its manifest goes first), so that a kill in the middle of the removal cannot leave a
complete-looking half. Reading is `CheckpointReader`'s.
"""

import asyncio
import errno
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from olmo_jax import storage
from olmo_jax.checkpoint.arrays import CHUNK_BYTES, Writes, start_writes
from olmo_jax.checkpoint.checksums import MANIFEST, write_manifest
from olmo_jax.checkpoint.reader import (
    METADATA,
    CheckpointReader,
    Name,
    item_trees,
    log,
    named_leaves,
)
from olmo_jax.checkpoint.run_folder import refuse_lost_claim
from olmo_jax.errors import UserError
from olmo_jax.files import is_disk_full, sync_folder, write_bytes
from olmo_jax.numerals import size_text

_BARRIER_MS = 20 * 60 * 1000
_barrier_number = itertools.count()
# Where one write of a save fails, that is raised, and reaches the person as one line. Others under
# way then fail too, and Orbax, which has closed their event loop, leaves it to Python to print each
# with a traceback: its threads through absl, futures that nobody waits for through asyncio, and
# tensorstore's reports to the closed loop through sys.unraisablehook.
logging.getLogger("absl").addFilter(
    lambda record: not record.pathname.endswith("orbax/checkpoint/_src/futures/future.py")
)
logging.getLogger("asyncio").addFilter(
    lambda record: "in OCDBT database at" not in str(record.exc_info and record.exc_info[1])
)


def _print_unraisable(what, print_others=sys.unraisablehook) -> None:
    if str(what.exc_value) != "Event loop is closed":
        print_others(what)


sys.unraisablehook = _print_unraisable


@dataclass(
    frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every: int = Field(default=1000, ge=1)
    """Steps between permanent checkpoints, which are never removed; OLMo's released ones are 1000
    steps apart."""

    ephemeral_every: int | None = Field(default=None, ge=1)
    """Steps between ephemeral checkpoints, of which only the newest few are kept; None: none."""

    keep_ephemeral: int = Field(default=1, ge=1)
    """How many ephemeral checkpoints are kept. One is enough: it is removed only once the next
    is complete."""

    fixed_steps: tuple[int, ...] = ()
    """Further steps with a permanent checkpoint (0: before the first step)."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.ephemeral_every is not None and self.ephemeral_every >= self.every:
            raise ValueError(
                f"ephemeral_every = {self.ephemeral_every} must be less than every = {self.every}"
            )
        if any(step < 0 for step in self.fixed_steps):
            raise ValueError(f"fixed_steps = {self.fixed_steps} must not be negative")
        return self

    def is_permanent(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept for ever."""
        return step in self.fixed_steps or (step > 0 and step % self.every == 0)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` finished steps."""
        ephemeral = self.ephemeral_every
        return self.is_permanent(step) or (
            ephemeral is not None and step > 0 and step % ephemeral == 0
        )


class Checkpointer(CheckpointReader):
    """Writes the checkpoints of a run; one process group at a time (`RunFolder` sees to that).

    Every process calls every method. The first process deletes, when this is made, what killed
    saves left behind. `files` are small files copied into each checkpoint, by name
    (tokenizer.json, config.gin).
    """

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig,
        files: Mapping[str, bytes] | None = None,
    ):
        super().__init__(folder)
        self.config = config
        self._files = dict(files or {})
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._runner = asyncio.Runner()
        self._pending: Future[None] | None = None
        self._in_bucket = storage.is_remote(self.folder)
        if jax.process_index() == 0:
            for path in self._left_behind():
                log.warning("removing %s, left by a save that was killed", path)
                storage.remove(path)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` finished steps."""
        return self.config.is_due(step)

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], permanent: bool | None = None
    ) -> None:
        """Starts saving `state`, a pytree of jax arrays with `params` at its top.

        Returns when the arrays were copied off the device (waiting for the save before, if that
        is not finished): `state` may be donated at once. `metadata` is JSON. `permanent` says
        that the checkpoint is never removed; None: as the configuration says. A step whose
        complete checkpoint is there already is not saved again. Raises UserError when the save
        before failed; what goes wrong with this one comes out of `check`, `wait` or the next save.
        """
        self.wait()
        if (self.path(step) / MANIFEST).is_file():
            return
        leaves = [(name, _detached(leaf)) for name, leaf in named_leaves(state)]
        # Otherwise the writes, once begun, take the cores from the copies (1.2 GB on
        # two busy cores: 2.8 s against 1.5).
        jax.block_until_ready(leaves)
        needed = sum(leaf.nbytes for _, leaf in leaves)
        content = {
            **metadata,
            "step": step,
            "permanent": self.config.is_permanent(step) if permanent is None else permanent,
            "arrays": {
                "/".join(name): {"shape": leaf.shape, "dtype": str(leaf.dtype)}
                for name, leaf in leaves
            },
        }
        content_json = json.dumps(content, indent=1).encode()
        # In the writer's thread, so that a caller with an event loop of its own (a notebook) can
        # save too. Its failure comes out of _finish, which no process may miss.
        started = self._writer.submit(
            self._runner.run, _start(self._temporary(step), leaves, needed)
        )
        self._pending = self._writer.submit(self._finish, step, started, content_json, needed)
        wait_for_futures([started])

    def check(self) -> None:
        """Raises UserError when the save in the background has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed and the older ones are dealt with.

        Raises UserError, once, when it failed; what it had written is gone by then.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and ends the background thread. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._writer.submit(self._runner.close)
            self._writer.shutdown()

    def _left_behind(self) -> list[Path]:
        if not self._in_bucket:
            return sorted(self.folder.glob("step*.tmp"))
        complete = set(self.steps())
        return [self.path(step) for step in self._all_steps() if step not in complete]

    def _temporary(self, step: int) -> Path:
        return self.path(step) if self._in_bucket else self.folder / f"step{step}.tmp"

    def _finish(self, step: int, started: Future[Writes], content_json: bytes, needed: int) -> None:
        """In the background: waits for the data, commits, and removes what is too old.

        Every process passes both barriers whatever went wrong before; the files tell the others.
        """
        writing = self._temporary(step)
        failure: Exception | None = None
        try:
            writes = started.result()
            _finish_all(writes.futures)
            digests = json.dumps(writes.digests).encode()
            write_bytes(_written(writing, jax.process_index()), digests)
        except Exception as error:
            failure = error
        _barrier()
        if jax.process_index() == 0 and failure is None:
            try:
                self._commit(step, content_json)
            except Exception as error:
                failure = error
        _barrier()
        if failure is None and not (self.path(step) / MANIFEST).is_file():
            failure = UserError(f"another process failed to save the checkpoint of step {step}")
        if failure is not None:
            raise self._failure(step, needed, failure)
        if jax.process_index() == 0:
            self._remove_old()

    def _commit(self, step: int, content_json: bytes) -> None:
        writing = self._temporary(step)
        known: dict[Path, str] = {}
        for process in range(jax.process_count()):
            path = _written(writing, process)
            digests = json.loads(path.read_bytes())
            known |= {writing / name: digest for name, digest in digests.items()}
            path.unlink()
        if not self._in_bucket:
            for item in list(writing.iterdir()):
                _orbax().finalize(epath.Path(item))  # merges what the processes wrote
        for name, data in self._files.items():
            write_bytes(writing / name, data)
        write_bytes(writing / METADATA, content_json)
        if self._in_bucket:
            refuse_lost_claim(self.folder.parent)
            write_manifest(writing, known)
            return
        write_manifest(writing)
        if self.path(step).exists():
            log.warning("replacing the half-written checkpoint %s", self.path(step))
            self._remove(step)
        os.rename(writing, self.path(step))
        sync_folder(self.folder)

    def _remove_old(self) -> None:
        ephemeral = []
        for step in self.steps():
            try:
                if not json.loads((self.path(step) / METADATA).read_bytes())["permanent"]:
                    ephemeral.append(step)
            except (OSError, ValueError, KeyError):
                log.warning("kept %s: its %s cannot be read", self.path(step), METADATA)
        for step in ephemeral[: -self.config.keep_ephemeral]:
            try:
                self._remove(step)
            except OSError as error:
                log.warning("could not remove %s: %s", self.path(step), error.strerror or error)

    def _remove(self, step: int) -> None:
        if self._in_bucket:
            (self.path(step) / MANIFEST).unlink()
            storage.remove(self.path(step))
            return
        leaving = self.folder / f"step{step}.removed.tmp"
        os.rename(self.path(step), leaving)
        shutil.rmtree(leaving)

    def _failure(self, step: int, needed: int, error: Exception) -> Exception:
        """Removes the half-written folder, so that it does not keep the disk full; says why.

        What is neither the disk's fault nor the system's is a bug, and stays as it is.
        """
        if jax.process_index() == 0:
            _remove_for_good(self._temporary(step))
        in_bucket = self._in_bucket and isinstance(error, ValueError)  # as tensorstore says it
        if not is_disk_full(error) and not isinstance(error, OSError) and not in_bucket:
            return error
        safe = self.steps()
        newest = f"the newest complete one is step {safe[-1]}" if safe else "there is no other"
        if is_disk_full(error) and not self._in_bucket:
            free = size_text(shutil.disk_usage(self.folder).free)
            reason = f"the disk is full (it needs about {size_text(needed)}, {free} are free)"
        else:
            reason = " ".join(str(error).split())
        return UserError(
            f"the checkpoint of step {step} could not be saved in {self.folder}: {reason}; {newest}"
        )


def _detached(leaf: Any) -> jax.Array:
    """The array as the background may keep it: on CPU a copy, elsewhere Orbax makes one.

    On CPU Orbax reads the array's own memory, and the next step, which is given that memory by
    donation, would stand still until the whole write is done.
    """
    array = jnp.asarray(leaf)
    return jnp.copy(array) if next(iter(array.devices())).platform == "cpu" else array


async def _start(writing: Path, leaves: list[tuple[Name, jax.Array]], needed: int) -> Writes:
    """Copies the arrays off their devices and starts writing them; gives the writes' futures.

    Raises OSError when the disk has less than `needed` bytes free.
    """
    trees = item_trees(leaves)
    if storage.is_remote(writing):
        return start_writes(writing, trees)
    try:
        if jax.process_index() == 0:
            shutil.rmtree(writing, ignore_errors=True)
            for item in trees:
                (writing / item).mkdir(parents=True)
            # Nothing is compressed, so the size is known; better than to find out half-way.
            if shutil.disk_usage(writing).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        _barrier()
    writes: list[Any] = []
    for item, tree in trees.items():
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
        arguments = ocp.args.PyTreeSave(tree, save_args)
        writes += await _orbax().async_save(epath.Path(writing / item), args=arguments) or []
    return Writes(writes, {})


def _remove_for_good(folder: Path) -> None:
    """Removes a folder into which tensorstore may still be writing, which makes it anew."""
    if storage.is_remote(folder):
        with suppress(OSError):  # what is left is half-written, and the next start removes it
            storage.remove(folder)
        return
    for _ in range(20):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _finish_all(writes: list[Any]) -> None:
    """Waits for every write, then raises the first failure.

    Not at the first failure: the folder is removed then, and a write still under way would make it
    anew.
    """
    failures = []
    for write in writes:
        try:
            write.result()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _orbax() -> ocp.PyTreeCheckpointHandler:
    # Uncompressed: zstd takes 8 % off float32 weights and makes the save four times as long.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _written(writing: Path, process: int) -> Path:
    return writing / f".written.{process}"


def _barrier() -> None:
    """Waits for all processes; through jax's coordination service, so usable in any thread."""
    key = f"olmo_jax/checkpoint/{next(_barrier_number)}"
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_BARRIER_MS)
