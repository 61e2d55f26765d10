"""Megatron's .bin and .idx are read as token files with their documents."""

import struct

import numpy as np
import pytest

from olmo_jax.data import DataConfig, open_dataset
from olmo_jax.data.token_files import open_token_file
from olmo_jax.errors import UserError

LENGTHS = [5, 9, 3, 20, 7]  # sequences; a document is one or more of them
DOCUMENTS = [0, 1, 3, 5]


def write(folder, code=8, dtype="uint16", lengths=LENGTHS):
    """As Megatron's MMapIndexedDataset lays them out."""
    tokens = np.random.default_rng(0).integers(1, 90, sum(LENGTHS)).astype(dtype)
    (folder / "text_document.bin").write_bytes(tokens.tobytes())
    pointers = np.cumsum([0, *lengths[:-1]]) * tokens.itemsize
    (folder / "text_document.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(DOCUMENTS))
        + np.array(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(DOCUMENTS, "<i8").tobytes()
    )
    return str(folder / "text_document.bin"), tokens


@pytest.mark.parametrize(("code", "dtype"), [(8, "uint16"), (4, "uint32"), (3, "uint16")])
def test_tokens_and_documents_are_read(tmp_path, code, dtype):
    path, tokens = write(tmp_path, code, dtype)
    file = open_token_file(path, dtype, 100)
    assert np.array_equal(file.tokens, tokens)
    rows = file.documents()
    assert [(row.start, row.end, row.id) for row in rows] == [
        (0, 5, "0"),
        (5, 17, "1"),
        (17, 44, "2"),
    ]
    config = DataConfig(
        paths=(path,), sequence_length=8, batch_size=1, dtype=dtype, order="sequential"
    )
    [piece] = open_dataset(config, 100).where(1)
    assert [(d.start, d.end) for d in piece.documents] == [(5, 17)]


def test_mistakes_are_named(tmp_path):
    path, _ = write(tmp_path, code=4)
    with pytest.raises(UserError, match=r"its .idx says uint32, not uint16"):
        open_token_file(path, "uint16", 100)
    write(tmp_path, lengths=[*LENGTHS[:-1], 70])
    with pytest.raises(UserError, match=r"text_document.bin: truncated: it holds 44 .*\.idx"):
        open_token_file(path, "uint16", 100).documents()
    for content in (b"", b"MMIDIDX\x00\x00", b"x" * 80, b"MMIDIDX\x00\x00" + b"\xff" * 60):
        (tmp_path / "text_document.idx").write_bytes(content)
        with pytest.raises(UserError, match=r"text_document.idx"):
            open_token_file(path, "uint16", 100)
