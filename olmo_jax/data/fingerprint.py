"""Fingerprints: has the data changed? Cheap for terabytes, because large files are sampled.

A file counts by its name, size and contents, not by its folder, so a copied data set is the same.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

import xxhash

from olmo_jax import storage
from olmo_jax.data.token_files import TokenFile

_WHOLE = 16 << 20  # bytes; smaller files are hashed whole, in about a millisecond a MB
_BLOCK, _BLOCKS = 64 << 10, 64


def fingerprint(value: Any) -> str:
    """32 hex digits of a JSON value."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def fingerprint_files(files: Iterable[TokenFile], with_documents: bool) -> str:
    """32 hex digits of the files, in order; with their .csv.gz where those decide the instances."""
    files = list(files)

    def parts(file: TokenFile) -> list[Any]:
        own = [[os.path.basename(file.path), file.dtype, contents(file.path)]]
        documents = with_documents and storage.exists(file.documents_path)
        return own + ([contents(file.documents_path)] if documents else [])

    found = storage.map_files(parts, files, [file.path for file in files])
    return fingerprint([part for file in found for part in file])


def contents(path: str) -> list[Any]:
    """Size and hash: of the whole file, or of 64 blocks spread over it, head and tail included."""
    size = storage.size(path)
    digest = xxhash.xxh3_128()
    if size <= _WHOLE:
        digest.update(storage.read(path))
    else:
        for k in range(_BLOCKS):
            start = (size - _BLOCK) * k // (_BLOCKS - 1)
            digest.update(storage.read(path, start, start + _BLOCK))
    return [size, digest.hexdigest()]
