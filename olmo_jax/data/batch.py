"""Batch, what a training step reads, and the pure functions that make a row of it from tokens.

The shift from tokens to targets happens here and nowhere else.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Instance(NamedTuple):
    """One row of a Batch: arrays of T, and the instance's number in file order."""

    tokens_T: np.ndarray
    targets_T: np.ndarray
    segment_ids_T: np.ndarray
    positions_T: np.ndarray
    loss_mask_T: np.ndarray
    instance_id: int


class Batch(NamedTuple):
    """B rows of T tokens. A pytree, because a NamedTuple."""

    tokens_BT: np.ndarray
    """int32; 0 where there is padding."""
    targets_BT: np.ndarray
    """int32; the next token; 0 at the last position, which has none."""
    segment_ids_BT: np.ndarray | None
    """int32; documents of the row counted from 1 under document masking, else 1; 0 = padding. None:
    one document a row."""
    positions_BT: np.ndarray | None
    """int32; from 0, restarting at each document under document masking. None: 0, 1, 2, …"""
    loss_mask_BT: np.ndarray
    """bool; False where there is no target, where it is padding, and in filtered instances."""
    instance_ids_B: np.ndarray | None
    """int64; host only: the step gets `batch._replace(instance_ids_B=None)`. Those of the whole
    batch, where the process has only some of its rows."""


def make_instance(
    tokens: np.ndarray,
    boundaries: Sequence[int] | np.ndarray,
    sequence_length: int,
    instance_id: int,
    keep_loss: bool,
) -> Instance:
    """A padded row from at most T `tokens`.

    `boundaries` are the offsets, rising and above 0, where a new document starts in the row. As in
    OLMo and OLMo-core (`get_labels`), the last token of a document, its eos, keeps the next
    document's first token as its target, in packed rows too; only padding is masked.
    """
    n = len(tokens)
    assert 0 < n <= sequence_length
    tokens_T = np.zeros(sequence_length, np.int32)
    tokens_T[:n] = tokens
    targets_T = np.zeros(sequence_length, np.int32)
    targets_T[: n - 1] = tokens_T[1:n]
    loss_mask_T = np.zeros(sequence_length, np.bool_)
    loss_mask_T[: n - 1] = keep_loss
    starts_T = np.zeros(sequence_length, np.int32)
    starts_T[np.asarray(boundaries, np.int64)] = 1
    segment_ids_T = np.cumsum(starts_T, dtype=np.int32) + np.int32(1)
    segment_ids_T[n:] = 0
    arange_T = np.arange(sequence_length, dtype=np.int32)
    positions_T = arange_T - np.maximum.accumulate(arange_T * starts_T)
    return Instance(tokens_T, targets_T, segment_ids_T, positions_T, loss_mask_T, instance_id)


def stack(rows: Sequence[Instance]) -> Batch:
    tokens, targets, segment_ids, positions, loss_mask, ids = zip(*rows, strict=True)
    return Batch(
        np.stack(tokens),
        np.stack(targets),
        np.stack(segment_ids),
        np.stack(positions),
        np.stack(loss_mask),
        np.array(ids, np.int64),
    )
