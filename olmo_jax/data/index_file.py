"""Index files: arrays that take long to compute, built once, written whole, memory-mapped after.

The name carries the fingerprint of what the array was computed from; a stale one is never met.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from olmo_jax.errors import UserError
from olmo_jax.files import replacing

# Arrays up to this size stay in memory, up to this sum (bytes): no folder is written for a
# laptop-sized run.
_IN_MEMORY, _IN_MEMORY_SUM = 1 << 20, 64 << 20
_OPEN_FILES = 64

_in_memory: dict[tuple[str, str], np.ndarray] = {}
_mapped: dict[tuple[str, str], np.ndarray] = {}
_lock = threading.Lock()  # reading threads meet the end of an epoch together


def default_index_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "olmo_jax" / "data"


def index_array(index_dir: Path, name: str, build: Callable[[], np.ndarray]) -> np.ndarray:
    """The array called `name`: memory-mapped from `index_dir`, or built, and kept there if large.

    `name` must determine the array. One thread of a process builds it while the others wait; two
    processes that build at once both succeed. Raises UserError when the folder cannot be written.
    """
    key = (str(index_dir), name)
    with _lock:
        for kept in (_in_memory, _mapped):
            if (array := kept.get(key)) is not None:
                return array
        path = index_dir / f"{name}.npy"
        if not path.exists():
            array = build()
            in_memory = sum(other.nbytes for other in _in_memory.values()) + array.nbytes
            if array.nbytes <= _IN_MEMORY and in_memory <= _IN_MEMORY_SUM:
                _in_memory[key] = array
                return array
            _save(path, array)
        while len(_mapped) >= _OPEN_FILES:  # orders of epochs long past
            del _mapped[next(iter(_mapped))]
        _mapped[key] = _load(path)
        return _mapped[key]


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: unreadable index file ({e}); delete it, it is rebuilt") from None


def _save(path: Path, array: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.save(file, array, allow_pickle=False)
    except OSError as e:
        raise UserError(
            f"{path}: index file cannot be written ({e.strerror}); set Data.index_dir"
        ) from None
