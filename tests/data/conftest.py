"""Token files for the tests: random documents that end with the eos, 0."""

from pathlib import Path

import numpy as np
import pytest

from olmo_jax.data import Document, write_token_file


@pytest.fixture
def write_tokens(tmp_path):
    """write_tokens(name, lengths, seed=0): a token file with documents of these lengths."""

    def write(name: str, lengths: list[int], seed: int = 0, dtype: str = "uint16") -> Path:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, 1000, sum(lengths))
        ends = np.cumsum(lengths)
        tokens[ends - 1] = 0
        rows = [
            Document(int(end - n), int(end), f"{name}-{k}", "a, b.jsonl", k + 1)
            for k, (n, end) in enumerate(zip(lengths, ends, strict=True))
        ]
        write_token_file(tmp_path / name, tokens, rows, dtype)
        return tmp_path / name

    return write
