"""Starts a new run from a checkpoint of another, on purpose with another configuration."""

import json
import os
import shutil
import uuid
from pathlib import Path

from olmo_jax.checkpoint.checksums import write_manifest
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
    if new.path.exists() and (not new.path.is_dir() or any(new.path.iterdir())):
        raise UserError(f"{new_run_dir}: is there already and not empty; give a new folder")
    metadata |= {"forked_from": {"run": str(old.path), "step": step}, "permanent": True}
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
