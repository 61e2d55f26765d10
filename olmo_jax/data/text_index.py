"""Finding a string in the text of token files, by an index that is built once.

What is found: every place where the decoded tokens have the string, as bytes of UTF-8, whatever the
tokens' borders are (a text alone is often cut into other tokens than in its context). The index is
a signature of each block of tokens: which hashes of 4 neighbouring bytes its text has (Cox,
"Regular expression matching with a trigram index", 2012, with blocks for files and bits for lists).
It names the blocks that may have the string; those are decoded and searched. A byte a token on
disk, 32 MiB of memory, time in proportion to the text.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from olmo_jax.data.fingerprint import fingerprint_files
from olmo_jax.data.index_file import index_array
from olmo_jax.data.token_files import TokenFile, check_ids
from olmo_jax.errors import UserError

BLOCK = 4096  # tokens; its text has some 5,000 to 9,000 different grams
_BUCKETS = 1 << 15  # bits of a signature: a fifth of them set
_SEGMENT = 8192  # blocks of an index file: 32 MiB
# Bytes of a gram, and of the string that the index looks at: no more than a block's tokens, so that
# they lie in one block or two.
_GRAM, _MOST = 4, 256
_AT_ONCE = 64  # blocks hashed together


class TokenText:
    """The bytes of text that each token of a byte-level tokenizer stands for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Raises UserError for a tokenizer of another kind."""
        other = UserError("finding text needs a byte-level tokenizer, as those of OLMo are")
        if "ByteLevel" not in str(tokenizer.decoder):
            raise other
        self.tokenizer = tokenizer
        self.key = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
        added = tokenizer.get_added_tokens_decoder()
        of_letter = str.maketrans({letter: chr(byte) for byte, letter in _letters().items()})
        texts = [b"\xff"] * vocab_size  # padding of the vocabulary: no byte of any text
        for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
            if i < vocab_size and i in added:
                texts[i] = added[i].content.encode()
            elif i < vocab_size:
                try:
                    texts[i] = token.translate(of_letter).encode("latin-1")
                except UnicodeEncodeError:
                    raise other from None
        self._vocab_size = vocab_size
        self._sizes = np.array([len(text) for text in texts], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)

    def decode(self, file: TokenFile, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The text of tokens [start, end) of a file as bytes, and where in it each token ends."""
        tokens = file.tokens[start:end]
        check_ids(tokens, self._vocab_size, file, start)
        sizes = self._sizes[tokens]
        ends = np.cumsum(sizes)
        shift = np.repeat(self._starts[tokens] - (ends - sizes), sizes)
        return self._bytes[np.arange(len(shift)) + shift], ends

    def encode(self, text: str) -> bytes:
        """A string as the bytes that its tokens would have."""
        normalizer = self.tokenizer.normalizer
        return (normalizer.normalize_str(text) if normalizer else text).encode()


class Hit(NamedTuple):
    """Tokens [start, end) of a file have the string, the first and the last perhaps in part."""

    file: int
    start: int
    end: int


class TextIndex:
    """The index of some token files. Each of its files is one of 33 million tokens."""

    def __init__(self, files: list[TokenFile], text: TokenText, index_dir: Path):
        self.files, self.text, self._index_dir = files, text, index_dir
        self._keys = [fingerprint_files([file], with_documents=False) for file in files]

    def build(self, progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Builds what is not there yet; `progress(done, total)` counts tokens. What is done when it
        is ended stays."""
        before, total = 0, sum(file.size for file in self.files)
        for f, file in enumerate(self.files):
            for segment, n_blocks in enumerate(_segments(file)):
                start = segment * _SEGMENT * BLOCK
                advance = partial(_advance, progress, before, start, file.size, total)
                self._segment(f, segment, advance)
                advance(n_blocks * BLOCK)
            before += file.size

    def find(self, string: str, most: int) -> Iterator[Hit]:
        """The first `most` places that have the string, in the order of the files."""
        wanted = self.text.encode(string)
        if not wanted:
            raise UserError("--text: an empty string is everywhere")
        found = 0
        for f in range(len(self.files)):
            for block in self._candidates(f, wanted):
                for hit in self._hits(f, block, wanted):
                    yield hit
                    found += 1
                    if found == most:
                        return

    def _candidates(self, f: int, wanted: bytes) -> Iterator[int]:
        """The blocks where the string may begin."""
        grams = np.unique(_grams(np.frombuffer(wanted[:_MOST], np.uint8)))
        n_before, carried = 0, None
        for segment, n_blocks in enumerate(_segments(self.files[f])):
            index = self._segment(f, segment)
            has = np.unpackbits(np.asarray(index[grams]), axis=1, count=n_blocks).astype(bool)
            # The string's head is in one block or two: a token has a byte at least.
            following = np.zeros_like(has)
            following[:, :-1] = has[:, 1:]
            if carried is not None and (carried | has[:, 0]).all():
                yield n_before - 1
            possible = (has | following).all(axis=0)
            carried = has[:, -1]
            last = n_blocks - 1
            if segment + 1 < len(_segments(self.files[f])):
                possible[last] = False  # the next segment says
            yield from (n_before + np.flatnonzero(possible)).tolist()
            n_before += n_blocks

    def _hits(self, f: int, block: int, wanted: bytes) -> Iterator[Hit]:
        start = block * BLOCK
        text, ends = self.text.decode(self.files[f], start, start + BLOCK + len(wanted))
        limit, content = ends[min(BLOCK, len(ends)) - 1], text.tobytes()
        at = content.find(wanted)
        while 0 <= at < limit:
            first = int(np.searchsorted(ends, at, side="right"))
            last = int(np.searchsorted(ends, at + len(wanted), side="left"))
            yield Hit(f, start + first, start + last + 1)
            at = content.find(wanted, at + 1)

    def _segment(
        self, f: int, segment: int, progress: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """(buckets, bytes) uint8: bit b of row h says whether block b has a gram of hash h."""
        name = f"text-{BLOCK}-{_BUCKETS}-{self._keys[f]}-{self.text.key}-{segment}"
        build = lambda: self._signatures(self.files[f], segment, progress)  # noqa: E731
        return index_array(self._index_dir, name, build)

    def _signatures(
        self, file: TokenFile, segment: int, progress: Callable[[int], None]
    ) -> np.ndarray:
        n_blocks = _segments(file)[segment]
        out = np.zeros((_BUCKETS, -(-n_blocks // 8)), np.uint8)
        for first in range(0, n_blocks, _AT_ONCE):
            blocks = min(_AT_ONCE, n_blocks - first)
            start = (segment * _SEGMENT + first) * BLOCK
            # A block's last grams end in the next one: a token has a byte at least.
            text, ends = self.text.decode(file, start, start + blocks * BLOCK + _GRAM - 1)
            hashes = _grams(text)
            has = np.zeros((_AT_ONCE, _BUCKETS), bool)
            borders = ends[np.minimum(np.arange(1, blocks + 1) * BLOCK, len(ends)) - 1]
            for b, (low, high) in enumerate(zip([0, *borders[:-1]], borders, strict=True)):
                has[b, hashes[low:high]] = True
            at = first // 8
            packed = np.packbits(has, axis=0)[: out.shape[1] - at]
            out[:, at : at + len(packed)] = packed.T
            progress((first + blocks) * BLOCK)
        return out


def _advance(
    progress: Callable[[int, int], None], before: int, start: int, size: int, total: int, done: int
) -> None:
    progress(before + min(start + done, size), total)


def _segments(file: TokenFile) -> list[int]:
    """The number of blocks in each of the file's index files."""
    blocks = -(-file.size // BLOCK)
    return [min(_SEGMENT, blocks - first) for first in range(0, blocks, _SEGMENT)]


def _grams(text: np.ndarray) -> np.ndarray:
    """The hash of each _GRAM neighbouring bytes, by where they begin; below _BUCKETS."""
    if len(text) < _GRAM:
        return np.zeros(0, np.uint16)
    wide = text.astype(np.uint32)
    grams = wide[:-3] | wide[1:-2] << 8 | wide[2:-1] << 16 | wide[3:] << 24
    return (grams * np.uint32(0x9E3779B1) >> np.uint32(17)).astype(np.uint16)


def _letters() -> dict[int, str]:
    """How a byte-level tokenizer spells each byte: those that can be printed as themselves, the
    others as the letters from 256 on, in their order."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed}
    letters |= {byte: chr(256 + k) for k, byte in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters
