"""What attention may see, as data; and the scores and masks of the forms written in plain jax."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -1e30  # not -inf: a difference of two would be NaN


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "segment_ids_BT",
        "key_segment_ids_BS",
        "slopes_H",
        "last_reader_BT",
        "positions_BT",
    ),
    meta_fields=("window", "causal", "offset"),
)
@dataclass(frozen=True)
class AttentionMask:
    """Causal, and narrower where a field says so. A pytree: only the arrays are traced."""

    window: int = 0
    """Keys that a query sees, counting itself; 0 is all that came before."""
    segment_ids_BT: jax.Array | np.ndarray | None = None
    """The queries' documents; a query sees keys of its own segment only. None: one document."""
    slopes_H: jax.Array | np.ndarray | None = None
    """ALiBi: not what may be seen but how much it weighs: scores fall by a head's slope for each
    token between query and key (see `alibi_slopes`)."""
    offset: Any = 0
    """Index among the keys of the first query, an int; with a cache, each row's position, (B,)."""
    key_segment_ids_BS: jax.Array | np.ndarray | None = None
    """The keys' documents, where the keys are not those of the queries' positions."""
    causal: bool = True
    """False: all keys come before all queries (they are another part's, earlier in the row)."""
    last_reader_BT: jax.Array | np.ndarray | None = None
    """A row that holds trees: the index of the last query that sees each key. Laid out depth first,
    a node's descendants are the positions up to it, so this one number keeps branches apart, and
    documents (see eval/packing.py). T = S; segment_ids are not needed."""
    positions_BT: jax.Array | np.ndarray | None = None
    """Given with last_reader_BT: each token's depth in its tree, what windows and ALiBi count by.
    Elsewhere indices do, which differ from positions by a document's constant."""


def alibi_slopes(n_heads: int) -> np.ndarray:
    """ALiBi's slope of each head, float32 (H,): 2^(-8 h / H) for h = 1 … H where H is a power of
    two, else every other one of the next power's first (Press et al. 2022, in MPT's order)."""
    power = 1 << (n_heads - 1).bit_length()
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    if power != n_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes.astype(np.float32)


def scores(q_BKGTC, k_BKSC, mask: AttentionMask, rows: slice, keys: slice) -> jax.Array:
    """float32 scores, (B, K, G, T, S), of queries `rows` and keys `keys`, what is not allowed at
    `NEVER`."""
    q_T1 = jnp.arange(rows.start, rows.stop)[:, None] + mask.offset
    k_1S = jnp.arange(keys.start, keys.stop)[None, :]
    q, k = q_BKGTC[..., rows, :] * q_BKGTC.shape[-1] ** -0.5, k_BKSC[:, :, keys]
    scores = jnp.einsum("bkgtc,bksc->bkgts", q, k, preferred_element_type=jnp.float32)
    away = q_T1 - k_1S  # by how many tokens a key lies before a query
    if mask.positions_BT is not None:
        positions_BT = mask.positions_BT
        away = (positions_BT[:, rows, None] - positions_BT[:, None, keys])[:, None, None]
    if mask.slopes_H is not None:
        K, G = q.shape[1:3]
        scores -= mask.slopes_H.reshape(K, G, 1, 1) * away.astype(jnp.float32)
    allowed = _allowed(mask, q_T1, k_1S, away, rows, keys)
    return scores if allowed is None else jnp.where(allowed, scores, NEVER)


def _allowed(mask: AttentionMask, q_T1, k_1S, away, rows: slice, keys: slice) -> jax.Array | None:
    """What the queries may see of the keys: (T, S), or (B, 1, 1, T, S) with segments or trees; None
    is all."""
    allowed = None
    if mask.causal:
        allowed = k_1S <= q_T1
        if mask.window:
            allowed &= away < mask.window
    if mask.last_reader_BT is not None:
        return allowed & (q_T1 <= mask.last_reader_BT[:, None, None, None, keys])
    if mask.segment_ids_BT is not None:
        ids = mask.segment_ids_BT
        key_ids = ids if mask.key_segment_ids_BS is None else mask.key_segment_ids_BS
        same_BTS = ids[:, rows, None] == key_ids[:, None, keys]
        allowed = (same_BTS if allowed is None else allowed & same_BTS)[:, None, None]
    return allowed
