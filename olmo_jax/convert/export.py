"""Writes a model as a folder for another program, or for this one: whole or not at all."""

import errno
import glob
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from olmo_jax.convert import core_files, hf_files, olmo_files, orbax
from olmo_jax.convert.average import open_mean
from olmo_jax.convert.safetensors_io import Progress
from olmo_jax.convert.source import open_source
from olmo_jax.convert.target import Options, Write
from olmo_jax.convert.verify import verify as compare
from olmo_jax.errors import UserError
from olmo_jax.files import is_disk_full, write_error
from olmo_jax.numerals import size_text

FORMATS: dict[str, Write] = {
    "hf": hf_files.write,
    "olmo": olmo_files.write,
    "olmo_core": core_files.write,
    "orbax": orbax.write,
}


def convert(
    src: str | Path | Sequence[str | Path],
    dst: str | Path,
    to: str = "hf",
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    step: int | None = None,
    revision: str | None = None,
    rows: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    verify: bool = False,
    progress: Progress | None = None,
) -> str | None:
    """Writes the model in `src` (see `load`) to the new folder `dst`, whole or not at all.

    `to` is one of `FORMATS`. Of several sources the mean is written, in float32. Tensors pass
    through one at a time, in the type in which they are stored unless `dtype` gives another. `rows`
    of the embedding, if given, are cut off or filled with zeros (see rows.py).
    `progress(done, total)` counts bytes. With `verify`, what was written is read again and compared
    before it gets its name (as many bytes again), and what was compared is returned in words.
    Raises UserError.
    """
    if to not in FORMATS:
        raise UserError(f"--to={to}: this version writes {', '.join(FORMATS)}")
    if "://" in str(dst):
        raise UserError(f"{dst}: conversions are written to this machine; give a folder here")
    dst = Path(dst).expanduser().absolute()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is there already and not empty; give a new folder")
    for left in dst.parent.glob(f".{glob.escape(dst.name)}.*.tmp"):
        if not _runs(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    with open_mean(src, step, revision, rows) as source:
        report = None
        try:
            unfinished.mkdir(parents=True)
            writing, verifying = (_part(progress, i, 1 + verify) for i in (0, 1))
            FORMATS[to](unfinished, source, Options(dtype, max_shard_bytes, writing))
            if verify:
                with open_source(unfinished) as written:
                    count, size = compare(source, written, dtype, verifying)
                report = f"verified: {count:,} tensors, {size_text(size)}, are the source's"
            os.replace(unfinished, dst)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                raise write_error(dst, error) from None
            if is_disk_full(error):  # as tensorstore says it
                raise write_error(dst, OSError(errno.ENOSPC, str(error))) from None
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return report


def _runs(process_id: str) -> bool:
    """Whether there is such a process: one that was killed has left its unfinished folder."""
    try:
        os.kill(int(process_id), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass  # another user's
    return True


def _part(progress: Progress | None, i: int, of: int) -> Progress | None:
    """What tells of the part `i` of so many equal ones."""
    return progress and (lambda done, total: progress(i * total + done, of * total))
