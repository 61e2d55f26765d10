"""Held-out evaluation in the loop: loss, perplexity and bits per byte of token files.

Tasks (questions with answers) are `eval/`'s; it hands its own evaluators to the loop.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from olmo_jax.data.batch import Batch
from olmo_jax.data.token_files import (
    TokenFile,
    check_ids,
    find_files,
    open_token_file,
    smallest_dtype,
)
from olmo_jax.data.tokenizer import token_bytes
from olmo_jax.errors import UserError
from olmo_jax.model.transformer import Transformer
from olmo_jax.parallel.mesh import on_mesh
from olmo_jax.parallel.sharding import batch_parts, replicated, to_global
from olmo_jax.parallel.watch import beat
from olmo_jax.train.step import laid_out, loss_function

_BLOCK = 1 << 20  # tokens looked at together


class Evaluation(NamedTuple):
    """What an evaluator found: numbers by name, and (prompt, text) samples."""

    metrics: dict[str, float]
    samples: Sequence[tuple[str, str]] = ()


class Evaluator(Protocol):
    """Anything that the loop calls every `Train.heldout_every` steps and at the end.

    One that may take longer than `Train.hang_minutes` calls `parallel.watch.beat` on its way.
    """

    def __call__(self, model: Transformer, step: int) -> Evaluation: ...


class HeldOut:
    """Scores every token of some files once.

    A file is one stream, begun by an eos, cut into windows of T that do not overlap; within a
    window each token sees what came before it there. Bits per byte divides by the bytes that the
    scored tokens stand for.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        sequence_length: int,
        batch_size: int,
        vocab_size: int,
        eos_token_id: int | None,
        document_masking: bool,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        dtype: str | None = None,
    ):
        if eos_token_id is None:
            raise UserError(
                "Train.heldout is given and Data.eos_token_id is not: give the id of the token "
                "that ends a document, which stands before the first one"
            )
        self.mesh, self.eos, self.document_masking = mesh, eos_token_id, document_masking
        parts = batch_parts(mesh)
        self.shape = (-(-batch_size // parts) * parts, sequence_length)
        dtype = dtype or smallest_dtype(vocab_size)
        self.files = [open_token_file(path, dtype, vocab_size) for path in find_files(paths)]
        # Before any training, so that an id that is no token's is not met at the first evaluation.
        bytes_V = None if tokenizer is None else token_bytes(tokenizer)
        self.bytes = [_count_bytes(file, vocab_size, bytes_V) for file in self.files]
        # Every process fetches it.
        self._score = jax.jit(partial(_score, mesh), out_shardings=replicated(mesh))

    def __call__(self, model: Transformer, step: int) -> Evaluation:
        """heldout/loss (nats a token), heldout/perplexity, heldout/bits_per_byte."""
        nats = 0.0
        for batch in self._batches():
            nats += float(self._score(model, to_global(self.mesh, batch)))
            beat()
        loss, n_bytes = nats / sum(file.size for file in self.files), sum(self.bytes)
        metrics = {"heldout/loss": loss, "heldout/perplexity": math.exp(min(loss, 700.0))}
        if n_bytes:
            metrics["heldout/bits_per_byte"] = nats / math.log(2) / n_bytes
            metrics["heldout/bytes"] = n_bytes
        return Evaluation(metrics)

    def table(self) -> list[dict[str, Any]]:
        """A row for each file: its name, tokens, and the bytes of text that they stand for (None
        without a tokenizer)."""
        return [
            {"name": Path(file.path).name, "tokens": file.size, "bytes": n_bytes or None}
            for file, n_bytes in zip(self.files, self.bytes, strict=True)
        ]

    def _batches(self) -> Iterator[Batch]:
        B, T = self.shape
        for file in self.files:
            for start in range(0, file.size, B * T):
                before = file.tokens[start - 1 : start] if start else [self.eos]
                piece = np.concatenate([before, file.tokens[start : start + B * T]])
                piece = piece.astype(np.int32)
                n = len(piece) - 1

                def rows(values, n=n):
                    out = np.zeros(B * T, values.dtype)
                    out[:n] = values
                    return out.reshape(B, T)

                tokens_BT = rows(piece[:-1])
                segment_ids_BT = positions_BT = None
                if self.document_masking:
                    starts_BT = np.zeros((B, T), np.int32)
                    starts_BT[:, 1:] = tokens_BT[:, :-1] == self.eos
                    segment_ids_BT = 1 + np.cumsum(starts_BT, axis=1, dtype=np.int32)
                    index_T = np.arange(T, dtype=np.int32)
                    positions_BT = index_T - np.maximum.accumulate(index_T * starts_BT, axis=1)
                yield Batch(
                    tokens_BT=tokens_BT,
                    targets_BT=rows(piece[1:]),
                    segment_ids_BT=segment_ids_BT,
                    positions_BT=positions_BT,
                    loss_mask_BT=rows(np.ones(n, np.bool_)),
                    instance_ids_B=None,
                )


def _count_bytes(file: TokenFile, vocab_size: int, bytes_V: np.ndarray | None) -> int:
    """The bytes of text that a file's tokens stand for (0 without a table); checks every id."""
    known = vocab_size if bytes_V is None else min(vocab_size, len(bytes_V))
    n_bytes = 0
    for start in range(0, file.size, _BLOCK):
        tokens = file.tokens[start : start + _BLOCK]
        check_ids(tokens, known, file, start)
        if bytes_V is not None:
            n_bytes += int(bytes_V[tokens].sum())
    return n_bytes


def _score(mesh: Mesh, model: Transformer, batch: Batch) -> jax.Array:
    """Summed cross-entropy of the counted tokens, in nats."""
    with on_mesh(mesh):
        batch = laid_out(batch)
        weights_BT = batch.loss_mask_BT.astype(np.float32)
        _, losses = loss_function(model, batch, weights_BT, 0.0)
    return losses.loss
