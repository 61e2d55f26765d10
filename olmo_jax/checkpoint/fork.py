"""Starts a new run from a checkpoint of another, on purpose with another configuration."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from olmo_jax import storage
from olmo_jax.checkpoint.checksums import MANIFEST, write_manifest
from olmo_jax.checkpoint.reader import METADATA, CheckpointReader
from olmo_jax.checkpoint.run_folder import RunFolder
from olmo_jax.errors import UserError
from olmo_jax.files import write_bytes, write_error


def fork(run_dir: Path | str, new_run_dir: Path | str, step: int | None = None) -> int:
    """Makes a new run folder with one checkpoint of another (the newest without a step), whole or
    not at all.

    The next `olmo-jax train` there goes on from that step with whatever configuration it is given.
    Returns the step. Raises UserError for a missing or damaged checkpoint, or a folder in use.
    """
    old, new = RunFolder(run_dir), RunFolder(new_run_dir)
    reader = CheckpointReader(old.checkpoints)
    step = reader.latest() if step is None else step
    if step is None:
        raise UserError(f"{run_dir}: there is no complete checkpoint to fork from")
    metadata = reader.metadata(step)
    reader.verify(step)
    in_use = new.path.exists() and (not new.path.is_dir() or any(new.path.iterdir()))
    if storage.listing(new.path) if storage.is_remote(new.path) else in_use:
        raise UserError(f"{new_run_dir}: is there already and not empty; give a new folder")
    metadata |= {"forked_from": {"run": str(old.path), "step": step}, "permanent": True}
    if storage.is_remote(old.path) or storage.is_remote(new.path):
        _copy_by_files(reader.path(step), CheckpointReader(new.checkpoints).path(step), metadata)
        return step
    unfinished = RunFolder(new.path.with_name(f".{new.path.name}.{uuid.uuid4().hex[:8]}.tmp"))
    copied = CheckpointReader(unfinished.checkpoints).path(step)
    try:
        shutil.copytree(reader.path(step), copied)
        write_bytes(copied / METADATA, json.dumps(metadata, indent=1).encode())
        write_manifest(copied)
        os.replace(unfinished.path, new.path)
    except shutil.Error as error:  # a list of (from, to, why), one for each file
        raise write_error(new.path, OSError(None, error.args[0][0][2])) from None
    except OSError as error:
        raise write_error(new.path, error) from None
    finally:
        shutil.rmtree(unfinished.path, ignore_errors=True)
    return step


def _copy_by_files(old: Path, new: Path, metadata: dict[str, Any]) -> None:
    """Copies a checkpoint from or to a bucket; the manifest, written last, makes it complete."""
    try:
        if not storage.is_remote(new):
            for name in storage.listing(old):
                (new / name).parent.mkdir(parents=True, exist_ok=True)

        def copy(name: str) -> None:
            write_bytes(new / name, storage.read(old / name))

        names = [name for name in storage.listing(old) if name not in (MANIFEST, METADATA)]
        storage.map_files(copy, names, [old, new])
        write_bytes(new / METADATA, json.dumps(metadata, indent=1).encode())
        write_manifest(new)
    except OSError as error:
        raise write_error(new, error) from None
