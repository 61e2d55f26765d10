"""A model with more or fewer rows in its embedding (columns in its head) than it was saved with.

Programs pad the vocabulary differently: OLMo-core trains OLMo 3 with 100,352 rows, its transformers
folders have 100,278. What is added is zeros, what is dropped are rows that no token has.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from olmo_jax.convert.run_facts import RunFacts
from olmo_jax.convert.source import Source
from olmo_jax.errors import UserError

# The axis of the vocabulary.
_AXES = {"embed.weight": 0, "lm_head.weight": 1}


class WithRows:
    """A `Source` like another, of a vocabulary padded to `rows`. UserError when tokens would lose
    theirs."""

    def __init__(self, source: Source, rows: int):
        config = source.config
        if rows < config.vocab_size:
            raise UserError(
                f"{rows:,} rows of the embedding are too few for this model's vocabulary of "
                f"{config.vocab_size:,} tokens"
            )
        self._source, self._rows = source, rows
        self.config = replace(config, embedding_rows=rows)
        self.eos_token_id = source.eos_token_id
        self.files: Mapping[str, bytes] = source.files

    def dtype(self, path: str) -> str:
        return self._source.dtype(path)

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        values = self._source.read(path, layer, expert)
        if path not in _AXES:
            return values
        axis, had = _AXES[path], values.shape[_AXES[path]]
        if had >= self._rows:
            return values[: self._rows] if axis == 0 else values[:, : self._rows]
        more = [(0, 0), (0, 0)]
        more[axis] = (0, self._rows - had)
        return np.pad(values, more)

    def run_facts(self) -> RunFacts | None:
        return self._source.run_facts()


def with_rows(source: Source, rows: int | None) -> Source:
    """The source itself where it has so many rows already, or None is asked for."""
    return source if rows in (None, source.config.rows) else WithRows(source, rows)
