"""Tokens to the devices that hold their experts, and sums back: an all-to-all that drops nothing.

For use inside `shard_map`, over a mesh axis of n devices, each with N tokens that visit A experts.
A token goes once to each device that holds some of its experts, however many it visits there, and
one row comes back: K = min(A, n) rows at most. So no device can receive more than n · N rows, which
is what gathering all tokens would give it anyway: buffers of that size hold every routing, the most
one-sided too.

Rows that a device sends for each of its tokens in a forward pass, there and back (the backward pass
sends as many), when E = 64 experts are equally popular and A = 8, as in OLMoE; 2 (n - 1) at most:

    n                                                            2     4     8    16    64
    all tokens gathered, sums scattered   2 (n - 1)            2.0   6.0  14.0  30.0   126
    this       2 (n - 1) (1 - C(E - E/n, A) / C(E, A))         2.0   5.5   9.5  12.7  15.8

That is 159 MB in place of 235 MB a layer on 8 devices with 4096 tokens each (D 2048, bfloat16).
The rows to be sent lie together first, at most 134 MB more than gathering keeps: the temporaries of
such a layer's gradient over expert 4 x fsdp 2 were 4.78 GB both ways on v5e, and 1.42 for 1.22 GB
on an H100. On CPU, where jax has no ragged exchange, blocks that hold the worst case are sent, as
much as gathering sends, and a layer takes 1.2 (A = 8) to 1.4 times (A = 2) its time on eight
virtual devices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_F32 = jnp.float32


class Spans(NamedTuple):
    """One way of a ragged exchange: what this device sends to and gets from each of P devices."""

    start_P: jax.Array
    """The first row for device p."""
    size_P: jax.Array
    there_P: jax.Array
    """Where those rows begin on device p."""
    came_P: jax.Array
    """How many rows come from device p."""


class Paths(NamedTuple):
    """Which rows travel. R rows are sent: N · K where they lie close together, n · N in blocks."""

    token_R: jax.Array
    """The token of each row; N or any where there is none."""
    row_NK: jax.Array
    """A token's rows; R: none."""
    away: Spans | None
    home: Spans | None
    """None: blocks of N rows to and from each device, used or not."""


def find_paths(to_NA: jax.Array, axis: str, form: str) -> Paths:
    """The paths of tokens to devices to_NA (int32, 0 to n - 1, the same one several times at will).

    form is `Kernels.exchange`: "ragged" sends what there is to send; "padded" blocks that hold the
    worst case, for devices whose compiler has no ragged exchange.
    """
    N, n = to_NA.shape[0], lax.axis_size(axis)
    to_NA = jnp.sort(to_NA, axis=1)
    again_NA = jnp.pad(to_NA[:, 1:] == to_NA[:, :-1], ((0, 0), (1, 0)))
    to_NK = jnp.sort(jnp.where(again_NA, n, to_NA), axis=1)[:, :n]  # n: nowhere
    K, M = to_NK.shape[1], to_NK.size
    assert (n + 1) * M < 2**31, (n, M)
    to_M, copy_M = to_NK.reshape(-1), jnp.arange(M, dtype=jnp.int32)
    sorted_M = jnp.sort(to_M * M + copy_M) % M  # as experts_grouped sorts
    place_M = jnp.zeros(M, jnp.int32).at[sorted_M].set(copy_M, unique_indices=True)
    size_P = jnp.sum(to_M[:, None] == jnp.arange(n), axis=0, dtype=jnp.int32)
    start_P = jnp.cumsum(size_P) - size_P
    if form == "padded":
        R = n * N
        row_M = jnp.where(to_M < n, to_M * N + place_M - start_P[to_M], R)
        token_R = jnp.full(R, N, jnp.int32).at[row_M].set(copy_M // K, mode="drop")
        return Paths(token_R, row_M.reshape(N, K), None, None)

    def swap(a_P: jax.Array) -> jax.Array:
        return lax.all_to_all(a_P, axis, 0, 0, tiled=True)

    came_P = swap(size_P)
    first_P = jnp.cumsum(came_P) - came_P  # here, rows lie by the device that they come from
    row_M = jnp.where(to_M < n, place_M, M)
    away = Spans(start_P, size_P, swap(first_P), came_P)
    home = Spans(first_P, came_P, swap(start_P), size_P)
    return Paths(sorted_M // K, row_M.reshape(N, K), away, home)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def away(x_ND: jax.Array, paths: Paths, axis: str) -> jax.Array:
    """x's rows on the devices that their tokens go to, (n · N, D); 0 where nothing came."""
    n_rows = lax.axis_size(axis) * x_ND.shape[0]
    rows_RD = x_ND.at[paths.token_R].get(mode="fill", fill_value=0)
    return _move(rows_RD, n_rows, axis, paths.away)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def home(y_RD: jax.Array, paths: Paths, axis: str) -> jax.Array:
    """The sum, in float32, of what comes back for each token, (N, D): what `away` transposes to."""
    rows_RD = _move(y_RD, paths.token_R.size, axis, paths.home)
    parts = (rows_RD.at[row_N].get(mode="fill", fill_value=0) for row_N in paths.row_NK.T)
    return sum((part.astype(_F32) for part in parts), _F32(0)).astype(y_RD.dtype)


away.defvjp(
    lambda x_ND, paths, axis: (away(x_ND, paths, axis), paths),
    lambda axis, paths, d_RD: (home(d_RD, paths, axis), None),
)
home.defvjp(
    lambda y_RD, paths, axis: (home(y_RD, paths, axis), paths),
    lambda axis, paths, d_ND: (away(d_ND, paths, axis), None),
)


def _move(rows_RD: jax.Array, n_rows: int, axis: str, spans: Spans | None) -> jax.Array:
    if spans is None:
        return lax.all_to_all(rows_RD, axis, 0, 0, tiled=True)
    empty = jnp.zeros((n_rows, *rows_RD.shape[1:]), rows_RD.dtype)
    return lax.ragged_all_to_all(rows_RD, empty, *spans, axis_name=axis)
