"""Compares what was written with what it was written from, slice by slice."""

import numpy as np

from olmo_jax.convert.average import refuse_other_model
from olmo_jax.convert.safetensors_io import DTYPES, Progress
from olmo_jax.convert.source import Source
from olmo_jax.convert.table import slices
from olmo_jax.convert.target import weight_bytes
from olmo_jax.errors import UserError


def verify(
    source: Source, written: Source, dtype: str | None = None, progress: Progress | None = None
) -> tuple[int, int]:
    """Compares every weight, bit by bit, after rounding the source's to `dtype` (None: as stored).

    `progress(done, total)` counts bytes. Returns how many slices and bytes were compared. Raises
    UserError with the first that differs, also of the architecture.
    """
    refuse_other_model(written.config, source.config, "verification failed")
    count = done = 0
    total = weight_bytes(source, dtype)
    for path, at in slices(source.config):
        wanted = source.read(path, *at)
        wanted = wanted.astype(DTYPES[dtype or source.dtype(path)], copy=False)
        found = written.read(path, *at)
        place = f"{path}{list(at) if at else ''}"
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise UserError(
                f"verification failed: {place} is {found.dtype}{list(found.shape)}, and should be "
                f"{wanted.dtype}{list(wanted.shape)}"
            )
        bits = f"u{wanted.dtype.itemsize}"
        if not np.array_equal(found.view(bits), wanted.view(bits)):
            raise UserError(f"verification failed: {place} does not have the source's values")
        count, done = count + 1, done + wanted.nbytes
        if progress:
            progress(done, total)
    return count, done
