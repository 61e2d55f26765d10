"""Fingerprints: has the data changed? Cheap for terabytes, because large files are sampled.

A file counts by its name, size and contents, not by its folder, so a copied data set is the same.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

import xxhash

from olmo_jax.data.token_files import TokenFile

_WHOLE = 16 << 20  # bytes; smaller files are hashed whole, in about a millisecond a MB
_BLOCK, _BLOCKS = 64 << 10, 64


def fingerprint(value: Any) -> str:
    """32 hex digits of a JSON value."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def fingerprint_files(files: Iterable[TokenFile], with_documents: bool) -> str:
    """32 hex digits of the files, in order; with their .csv.gz where those decide the instances."""
    parts: list[Any] = []
    for file in files:
        parts.append([os.path.basename(file.path), file.dtype, _contents(file.path)])
        if with_documents and os.path.exists(file.documents_path):
            parts.append(_contents(file.documents_path))
    return fingerprint(parts)


def _contents(path: str) -> list[Any]:
    """Size and hash: of the whole file, or of 64 blocks spread over it, head and tail included."""
    size = os.path.getsize(path)
    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        if size <= _WHOLE:
            digest.update(f.read())
        else:
            for k in range(_BLOCKS):
                f.seek((size - _BLOCK) * k // (_BLOCKS - 1))
                digest.update(f.read(_BLOCK))
    return [size, digest.hexdigest()]
