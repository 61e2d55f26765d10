"""Requests as rows of tokens in which what they have in common lies once. Plain numpy.

A row holds trees of tokens, depth first: two requests that begin alike (the continuations of one
context, questions after the same examples) share the path up to where they part. A token's position
is its depth, and `last_reader` is the last index of its subtree: the last token that may see it.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

TARGETS = 4
"""Tokens whose log-probability is read at one scored position; with more, it is scored again."""
_LENGTHS = [n for power in range(6, 21) for n in (1 << power, 3 << (power - 1))]
_ALIKE = 0.5  # a request joins a tree when this share of it, or of its neighbour, is there already
_TWO_LENGTHS = 0.8  # a second length of rows is worth its compilation where it saves a fifth


class Request(NamedTuple):
    """Tokens to be read and then scored: `n_scored` at the end, each given all before it."""

    tokens: np.ndarray
    n_scored: int


class Batch(NamedTuple):
    """B rows of T tokens, their scored positions (P to a row, n_scored of them used) with K targets
    each, and where each request finds its own: (request, row, indices into P, indices into K)."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    last_reader_BT: np.ndarray
    scored_BP: np.ndarray
    targets_BPK: np.ndarray
    n_scored: int
    requests: list[tuple[int, int, np.ndarray, np.ndarray]]


class _Piece(NamedTuple):
    """A tree: requests (in their sorted order), each with how many tokens it shares with the one
    before, and its size in tokens."""

    requests: list[tuple[int, int]]
    size: int


def batches(
    requests: Sequence[Request], tokens_per_batch: int, parts: int, parity_length: float
) -> Iterator[Batch]:
    """All requests, those of long rows first; the same for the same requests.

    Rows in a batch are a multiple of `parts`. `parity_length` is the row length at which attention
    costs as much as all else, which weighs long rows (more is shared) against short ones.
    """
    order, shared = _sorted(requests)
    lengths = [len(request.tokens) - 1 for request in requests]  # the last token is only scored
    for T, rows in _planned(order, shared, lengths, parity_length):
        n_batches = -(-len(rows) // max(1, tokens_per_batch // T))
        B = -(-len(rows) // n_batches)  # of one size, so that one program does, with little padding
        B = -(-B // parts) * parts
        for start in range(0, len(rows), B):
            yield _filled(requests, rows[start : start + B], B, T)


def _sorted(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    """The requests in an order that brings equal beginnings together, and for each how many tokens
    it shares with the one before."""
    keys = [request.tokens[:-1].astype(">u4").tobytes() for request in requests]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [0]
    for a, b in itertools.pairwise(order):
        x, y = requests[a].tokens[:-1], requests[b].tokens[:-1]
        n = min(len(x), len(y))
        differ = x[:n] != y[:n]
        first = int(differ.argmax()) if n else 0
        shared.append(first if n and differ[first] else n)
    return order, shared


def _planned(order, shared, lengths, parity_length) -> list[tuple[int, list[list[_Piece]]]]:
    """Row lengths, longest first, each with its rows: the cheapest plan with one or two lengths."""
    longest = max(lengths, default=0)
    first = bisect.bisect_left(_LENGTHS, longest)

    def plan(T, low, high):
        """The rows of length T for requests longer than low and up to high, and their cost."""
        rows = _rows(_pieces(order, shared, lengths, T, low, high), T)
        return len(rows) * T * (1 + T / parity_length), (T, rows)

    best = None
    for T in _LENGTHS[first : first + 6]:
        cost, one = plan(T, -1, longest)
        if best is None or cost < best[0]:
            best = cost, [one]
    assert best is not None
    for T in _LENGTHS[:first]:
        short, long = plan(T, -1, T), plan(_LENGTHS[first], T, longest)
        if short[1][1] and short[0] + long[0] < _TWO_LENGTHS * best[0]:
            best = (short[0] + long[0]) / _TWO_LENGTHS, [long[1], short[1]]
    return best[1]


def _pieces(order, shared, lengths, T, low, high) -> list[_Piece]:
    """Trees of at most T tokens out of the requests whose length is in (low, high]."""
    pieces: list[_Piece] = []
    here: list[tuple[int, int]] = []
    size, common, before = 0, 0, 0
    for i, same in zip(order, shared, strict=True):
        common = min(common, same)
        n = lengths[i]
        if not low < n <= high:
            continue
        alike = common >= _ALIKE * min(n, before)
        if here and alike and size + n - common <= T:
            here.append((i, common))
            size += n - common
        else:
            if here:
                pieces.append(_Piece(here, size))
            here, size = [(i, 0)], n
        common, before = n, n
    if here:
        pieces.append(_Piece(here, size))
    return pieces


def _rows(pieces: list[_Piece], T: int) -> list[list[_Piece]]:
    """Pieces in rows of T: the largest first, each where it leaves the least room."""
    rows: list[list[_Piece]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), rising
    for piece in sorted(pieces, key=lambda piece: -piece.size):
        at = bisect.bisect_left(room, (piece.size, 0))
        if at == len(room):
            rows.append([piece])
            free, row = T, len(rows) - 1
        else:
            free, row = room.pop(at)
            rows[row].append(piece)
        if free > piece.size:
            bisect.insort(room, (free - piece.size, row))
    return rows


def _filled(requests: Sequence[Request], rows: list[list[_Piece]], B: int, T: int) -> Batch:
    tokens_BT, positions_BT, last_reader_BT = (np.zeros((B, T), np.int32) for _ in range(3))
    last_reader_BT[:] = np.arange(T)  # padding sees itself
    scored_BP = np.zeros((B, T), np.int32)
    targets_BPK = np.zeros((B, T, TARGETS), np.int32)
    found, most = [], 0
    for b, row in enumerate(rows):
        end = 0
        at_position: dict[int, int] = {}  # a row's index -> the slot that is being filled
        taken: list[int] = []  # targets in each slot
        slot_of: dict[tuple[int, int], tuple[int, int]] = {}
        for piece in row:
            path = np.zeros(0, np.int64)  # indices of the last request's tokens
            for i, common in piece.requests:
                tokens, n_scored = requests[i]
                n = len(tokens) - 1
                last_reader_BT[b, path[common:]] = end - 1
                path = np.concatenate([path[:common], np.arange(end, end + n - common)])
                end += n - common
                tokens_BT[b, path[common:]] = tokens[common:n]
                positions_BT[b, path[common:]] = np.arange(common, n)
                slots, ks = np.zeros(n_scored, np.int32), np.zeros(n_scored, np.int32)
                for j in range(n_scored):
                    index, target = int(path[n - n_scored + j]), int(tokens[n - n_scored + j + 1])
                    where = slot_of.get((index, target))
                    if where is None:
                        slot = at_position.get(index)
                        if slot is None or taken[slot] == TARGETS:
                            slot = at_position[index] = len(taken)
                            taken.append(0)
                            scored_BP = _room(scored_BP, slot)
                            targets_BPK = _room(targets_BPK, slot)
                            scored_BP[b, slot] = index
                        where = slot_of[index, target] = slot, taken[slot]
                        targets_BPK[b, slot, taken[slot]] = target
                        taken[slot] += 1
                    slots[j], ks[j] = where
                found.append((i, b, slots, ks))
            last_reader_BT[b, path] = end - 1
        most = max(most, len(taken))
    return Batch(tokens_BT, positions_BT, last_reader_BT, scored_BP, targets_BPK, most, found)


def _room(a: np.ndarray, slot: int) -> np.ndarray:
    """a with twice the slots, where that many are filled (thousands of one-token answers to a
    single context)."""
    return np.concatenate([a, np.zeros_like(a)], axis=1) if slot == a.shape[1] else a
