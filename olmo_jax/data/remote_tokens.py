"""Token files in a bucket or on the web: read by ranges, in blocks of which so many are kept.

Reading only; one cache for each process, so worker processes share nothing. In memory: a permuted
order meets a block again after a share of the epoch that only a copy of all data would span, and 16
instances a host and step are 4 MiB to read, a block each.
"""

import threading
from collections import OrderedDict

import numpy as np

from olmo_jax import storage
from olmo_jax.errors import UserError

# An instance is some 10 KiB and a request takes as long as hundreds of them, so neighbours come
# along; data that fits is read once. More than _DIRECT at once is nobody's instance: not kept.
_BLOCK, _BLOCKS, _DIRECT = 256 << 10, 1024, 16 << 20

_blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
_lock = threading.Lock()  # reading threads share the blocks


class RemoteTokens:
    """The tokens of a file elsewhere; a slice of it is a read and gives an array."""

    def __init__(self, path: str, dtype: str, size: int):
        self._path, self._dtype, self._size = path, np.dtype(dtype), size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice) -> np.ndarray:
        """Raises UserError when no answer comes in spite of retries."""
        first, last, _ = span.indices(self._size)
        start, end = (at * self._dtype.itemsize for at in (first, max(first, last)))
        try:
            content = self._direct(start, end) if end - start > _DIRECT else self._read(start, end)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read: {error.strerror or error}") from None
        return np.frombuffer(content, self._dtype)

    def _direct(self, start: int, end: int) -> bytes:
        pieces = range(start, end, _DIRECT)
        return b"".join(storage.read(self._path, at, min(at + _DIRECT, end)) for at in pieces)

    def _read(self, start: int, end: int) -> bytes:
        if start == end:
            return b""
        numbers = range(start // _BLOCK, (end - 1) // _BLOCK + 1)
        with _lock:
            kept = {k: _blocks.get((self._path, k)) for k in numbers}
            for k in numbers:
                if kept[k] is not None:
                    _blocks.move_to_end((self._path, k))
        missing = [k for k in numbers if kept[k] is None]
        if missing:  # one request, whatever lies between
            low = missing[0] * _BLOCK
            high = min((missing[-1] + 1) * _BLOCK, self._size * self._dtype.itemsize)
            came = storage.read(self._path, low, high)
            for k in range(missing[0], missing[-1] + 1):
                kept[k] = came[k * _BLOCK - low : (k + 1) * _BLOCK - low]
        with _lock:
            for k in missing:
                _blocks[self._path, k] = kept[k] or b""
            while len(_blocks) > _BLOCKS:
                _blocks.popitem(last=False)
        content = b"".join(kept[k] or b"" for k in numbers)
        offset = numbers[0] * _BLOCK
        return content[start - offset : end - offset]
