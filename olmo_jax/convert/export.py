"""Writes a model as a folder for another program, or for this one: whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Literal

from olmo_jax.checkpoint.run_folder import write_error
from olmo_jax.convert import hf_files, olmo_files, orbax
from olmo_jax.convert.safetensors_io import Progress
from olmo_jax.convert.source import open_source
from olmo_jax.convert.target import Options, Write
from olmo_jax.errors import UserError

FORMATS: dict[str, Write] = {
    "hf": hf_files.write,
    "olmo": olmo_files.write,
    "orbax": orbax.write,
}


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "hf",
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    step: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> None:
    """Writes the model in `src` (see `load`) to the new folder `dst`, whole or not at all.

    `to` is one of `FORMATS`. Tensors pass through one at a time, in the type in which they are
    stored unless `dtype` gives another. `progress(done, total)` counts bytes. Raises UserError.
    """
    if to not in FORMATS:
        raise UserError(f"--to={to}: this version writes {', '.join(FORMATS)}")
    dst = Path(dst).expanduser().absolute()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is there already and not empty; give a new folder")
    unfinished = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    with open_source(src, step) as source:
        try:
            unfinished.mkdir(parents=True)
            FORMATS[to](unfinished, source, Options(dtype, max_shard_bytes, progress))
            os.replace(unfinished, dst)
        except OSError as error:
            raise write_error(dst, error) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
