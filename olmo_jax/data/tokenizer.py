"""Tokenizers: training a byte-level BPE, and opening a tokenizer.json.

Encoding documents into token files is `tokenize`'s.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from olmo_jax import storage
from olmo_jax.data.documents import read_jsonl, total_bytes
from olmo_jax.data.token_files import write_atomically
from olmo_jax.errors import UserError

EOS, PADDING = "<|endoftext|>", "<|padding|>"

# What one token may span: a word with its space and apostrophes; up to three digits; a line end
# with the punctuation and mark-up around it; punctuation; space. Line ends joined with mark-up are
# what counts: at a vocabulary of 2048 trained on 36 plays, Macbeth and The Tempest take 3.02 bytes
# a token against 2.56 with GPT-2's pattern and 2.84 with cl100k's, and a 4-gram model of the tokens
# needs no more bits a byte (2.22 against 2.23 and 2.23). Joining all punctuation with the next word
# gives 3.22 bytes a token but more bits a byte (2.24). {0,32} keeps the search linear.
PATTERN = (
    r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}{1,3}|[^\p{L}\p{N}\r\n]{0,32}[\r\n][^\p{L}\p{N}]*"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    files: Sequence[str],
    out: str | Path,
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """Train a byte-level BPE on documents (JSONL, .gz, .zst) and write it to `out` (a .json file).

    Any string comes back from decode(encode(string)). <|endoftext|> has id 0, <|padding|> 1. Small
    text may end with fewer tokens than asked for: `tokenizer.get_vocab_size()` says. The same files
    give the same tokenizer. `progress(done, total)` counts bytes read. Raises UserError.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size}: a byte-level tokenizer needs at least {smallest} "
            f"(256 bytes and two special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PADDING],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(list(files), progress), trainer)
    write_atomically(out, tokenizer.to_str(pretty=True).encode())
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a tokenizer.json or the folder that holds one, here or at an address that
    `storage` knows. Raises UserError."""
    try:
        return Tokenizer.from_str(read_tokenizer(path).decode())
    except UserError:
        raise
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer of the `tokenizers` library ({e})") from None


def tokenizer_file(path: str | Path) -> str:
    """The tokenizer.json that is given, or is in the given folder."""
    path = os.fspath(path)
    is_folder = not path.endswith(".json") if storage.is_remote(path) else os.path.isdir(path)
    return f"{path.rstrip('/')}/tokenizer.json" if is_folder else path


def read_tokenizer(path: str | Path) -> bytes:
    """The content of a tokenizer.json, given or in the given folder. Raises UserError."""
    path = tokenizer_file(path)
    try:
        return storage.read(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such tokenizer; give a tokenizer.json or its folder") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None


def special_token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; raises UserError, listing those there are, when it has none."""
    if (found := tokenizer.token_to_id(token)) is not None:
        return found
    known = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    raise UserError(
        f"the tokenizer has no token {token!r}; its special tokens are {', '.join(known) or 'none'}"
    )


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token of a byte-level tokenizer stands for, int64, by id.

    A byte-level token is spelt with one letter for each of its bytes; special tokens are no text.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = tokenizer.get_added_tokens_decoder()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, i in vocabulary.items():
        added = special.get(i)
        if added is None:
            sizes[i] = len(token)
        elif not added.special:
            sizes[i] = len(token.encode())
    return sizes


def _texts(files: list[str], progress: Callable[[int, int], None] | None) -> Iterator[str]:
    total, before = total_bytes(files), 0
    for path in files:
        read = 0
        for document in read_jsonl(path):
            yield document.text
            if progress and document.bytes_read != read:
                read = document.bytes_read
                progress(before + read, total)
        before += total_bytes([path])
