"""Megatron's (GPT-NeoX's, Pythia's) token files: `.bin` holds tokens, `.idx` where documents are.

Only read here: a `.bin` is a raw array, as OLMo's token files are; its `.idx` takes the place of
the `.csv.gz`.
"""

import struct

import numpy as np

from olmo_jax import storage
from olmo_jax.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Tokens are never negative, so signed types are read as the unsigned ones of their width.
_DTYPES = {1: "uint8", 2: "uint8", 3: "uint16", 4: "uint32", 5: "uint64", 8: "uint16"}


def read_index(path: str) -> tuple[str, np.ndarray]:
    """The type of the tokens, and where documents end, (documents,), counted in tokens.

    Raises UserError for a file that is no such index.
    """
    try:
        content = storage.read(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise UserError(f"{path}: is no index of Megatron's (MMIDIDX)")
    _, version, code, n_sequences, n_documents = _HEADER.unpack_from(content)
    wanted = _HEADER.size + 12 * n_sequences + 8 * n_documents
    if version != 1 or code not in _DTYPES or len(content) < wanted:
        raise UserError(
            f"{path}: version {version}, type {code}, {len(content)} bytes; known are version 1, "
            f"types {', '.join(map(str, _DTYPES))}, and {wanted} bytes for what it says to hold"
        )
    lengths = np.frombuffer(content, "<i4", n_sequences, _HEADER.size)
    first = np.frombuffer(content, "<i8", n_documents, _HEADER.size + 12 * n_sequences)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if n_documents and not (first.min() >= 0 and first.max() <= n_sequences):
        raise UserError(f"{path}: names sequences that are not there")
    return _DTYPES[code], ends[first[1:]]
