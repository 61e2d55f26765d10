"""What every format that can be written has in common.

A format is one function `write(folder, source, options)`: it fills the empty folder with the
source's model, tensor by tensor, and raises UserError, before it writes anything, where it cannot
hold the model. That the folder appears whole or not at all is export.py's business.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olmo_jax.convert.safetensors_io import DTYPES, Planned, Progress, common_dtype
from olmo_jax.convert.source import Source
from olmo_jax.convert.table import Row, weight_shapes


@dataclass(frozen=True)
class Options:
    """How to write a model."""

    dtype: str | None = None
    """Type of every weight ("float32", "bfloat16", "float16"); None keeps each as it is stored."""
    max_shard_bytes: int = 5 * 10**9
    """Tensors of more bytes than this are spread over several files, where a format can."""
    progress: Progress | None = None
    """Called with the bytes written, and of how many."""


Write = Callable[[Path, Source, Options], None]


def planned(source: Source, rows: Iterable[Row], options: Options) -> list[Planned]:
    """The tensors of a format, in its table's order, to be read from `source` one by one."""
    config = source.config

    def reader(row: Row, at: tuple[int, ...]) -> Callable[[], np.ndarray]:
        return lambda: row.assemble([source.read(path, *at) for path in row.ours], config)

    return [
        Planned(
            name,
            row.shape(config),
            options.dtype or stored_dtype(source, row.ours),
            reader(row, at),
        )
        for row in rows
        for name, at in row.places(config)
    ]


def weight_bytes(source: Source, dtype: str | None) -> int:
    """Bytes of all weights in `dtype` (None: as they are stored)."""
    return sum(
        math.prod(shape) * DTYPES[dtype or source.dtype(path)].itemsize
        for path, shape in weight_shapes(source.config).items()
    )


def stored_dtype(source: Source, paths: Iterable[str]) -> str:
    """The type in which the weights of these paths can be kept as they are."""
    return common_dtype(source.dtype(path) for path in paths)
