"""Finding text: every place that the decoded tokens have it, whatever the tokens' borders are."""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from olmo_jax.data import text_index
from olmo_jax.data.text_index import TextIndex, TokenText
from olmo_jax.data.token_files import Document, open_token_file, write_token_file
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.errors import UserError

TEXT = "to-morrow and creeps in this petty pace from day to day — naïve été 鐘 12345 \n the"
WORDS = TEXT.split(" ")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens and index files of 24 blocks, so that texts cross all borders."""
    monkeypatch.setattr(text_index, "BLOCK", 16)
    monkeypatch.setattr(text_index, "_MOST", 16)
    monkeypatch.setattr(text_index, "_SEGMENT", 24)
    monkeypatch.setattr(text_index, "_AT_ONCE", 8)


@pytest.fixture
def made(tmp_path):
    """Two token files of random words, with their tokenizer."""
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, int(rng.integers(1, 60)))) for _ in range(120)]
    lines = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(documents)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer(
        [str(tmp_path / "text.jsonl")], tmp_path / "tokenizer.json", vocab_size=330
    )
    files = []
    for k in range(2):
        ids = [i for text in documents[k::2] for i in [*tokenizer.encode(text).ids, 0]]
        path = tmp_path / f"part-{k}.npy"
        write_token_file(path, np.array(ids), [Document(0, len(ids), "a", "b", 1)], "uint16")
        files.append(open_token_file(str(path), "uint16", 400))
    return files, tokenizer


def places(files, text: TokenText, string: str) -> list[tuple[int, int, int]]:
    """By looking at all of the text."""
    found = []
    for f, file in enumerate(files):
        content, ends = text.decode(file, 0, file.size)
        wanted = re.escape(string.encode())
        for match in re.finditer(b"(?=(%s))" % wanted, content.tobytes()):
            first = np.searchsorted(ends, match.start(1), side="right")
            last = np.searchsorted(ends, match.end(1) - 1, side="right")
            found.append((f, int(first), int(last) + 1))
    return found


def test_every_place_is_found(made, tmp_path, small_blocks):
    files, tokenizer = made
    text = TokenText(tokenizer, 400)
    for file in files:  # the bytes are the tokenizer's own text
        ids = file.tokens[:].tolist()
        content = text.decode(file, 0, file.size)[0].tobytes()
        assert content.decode() == tokenizer.decode(ids, skip_special_tokens=False)
    index = TextIndex(files, text, tmp_path / "index")
    done = []
    index.build(lambda *counts: done.append(counts))
    assert done[-1] == (sum(file.size for file in files),) * 2
    assert [d for d, _ in done] == sorted(d for d, _ in done)
    content = text.decode(files[1], 0, files[1].size)[0].tobytes().decode()
    rng = np.random.default_rng(1)
    wanted = ["to-morrow", "morrow and", "orro", "鐘", "é", "234", "o", "<|endoftext|>", "tooo"]
    for length in (2, 3, 5, 9, 40, 200, 1500):
        wanted += [content[a : a + length] for a in rng.integers(0, len(content) - length, 12)]
    for string in wanted:
        hits = [tuple(hit) for hit in index.find(string, most=10**6)]
        assert hits == places(files, text, string), string
        assert hits or string == "tooo"
    assert len(list(index.find("o", most=7))) == 7


def test_an_index_is_built_once_and_names_few_blocks(made, tmp_path, monkeypatch):
    files, tokenizer = made
    long = np.tile(files[0].tokens[:], 600)
    zebra = tokenizer.encode(" zebra").ids
    long[-len(zebra) :] = zebra
    write_token_file(tmp_path / "long.npy", long, [], "uint16")
    file = open_token_file(str(tmp_path / "long.npy"), "uint16", 400)
    text = TokenText(tokenizer, 400)
    index = TextIndex([file], text, tmp_path / "index")
    index.build()
    [written] = (tmp_path / "index").iterdir()
    blocks = -(-file.size // text_index.BLOCK)
    assert written.stat().st_size == pytest.approx((blocks + 7) // 8 * (1 << 15), rel=0.01)
    assert list(index._candidates(0, b"zebra")) == [blocks - 2, blocks - 1]
    text_index.index_array.__globals__["_mapped"].clear()
    monkeypatch.setattr(TextIndex, "_signatures", None)  # to build again would fail
    again = TextIndex([file], text, tmp_path / "index")
    again.build()
    assert len(list(again.find("zebra", 10))) == 1


def test_mistakes_are_named(made, tmp_path):
    files, tokenizer = made
    index = TextIndex(files, TokenText(tokenizer, 400), tmp_path)
    with pytest.raises(UserError, match="empty string"):
        list(index.find("", 10))
    other = Tokenizer(models.BPE())
    other.decoder = decoders.Metaspace()
    with pytest.raises(UserError, match="byte-level"):
        TokenText(other, 400)
