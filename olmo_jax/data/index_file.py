"""Index files: arrays that take long to compute, built once, written whole, memory-mapped after.

The name carries the fingerprint of what the array was computed from; a stale one is never met.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from olmo_jax.errors import UserError

# Smaller arrays are kept in memory: no folder is written for a laptop-sized run.
_IN_MEMORY = 1 << 20


def default_index_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "olmo_jax" / "data"


def index_array(index_dir: Path, name: str, build: Callable[[], np.ndarray]) -> np.ndarray:
    """The array called `name`: memory-mapped from `index_dir`, or built, and kept there if large.

    `name` must determine the array. Two processes that build at once both succeed.
    Raises UserError when the folder cannot be written.
    """
    key = (str(index_dir), name)
    if (array := _open_arrays.get(key)) is not None:
        return array
    path = index_dir / f"{name}.npy"
    if path.exists():
        array = _load(path)
    else:
        array = build()
        if array.nbytes > _IN_MEMORY:
            _save(path, array)
            array = _load(path)
    while len(_open_arrays) >= 64:  # orders of epochs long past
        _open_arrays.pop(next(iter(_open_arrays)), None)
    _open_arrays[key] = array
    return array


_open_arrays: dict[tuple[str, str], np.ndarray] = {}


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: unreadable index file ({e}); delete it, it is rebuilt") from None


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            np.save(f, array, allow_pickle=False)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: index file cannot be written ({e.strerror}); set Data.index_dir"
        ) from None
