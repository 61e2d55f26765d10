"""A memorisation study in figures: of its items, by when and how often they were read."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from olmo_jax.study.memorization import Item

# Rows by step: at most so many, and no more than leave each so many sequences in the mean.
BINS, IN_A_BIN = 20, 25


def summarise(items: Sequence[Item]) -> dict[str, Any]:
    """Figures of all that was read and of what was not, by the step that reads it, and by how often
    it was read.

    A sequence counts once in each row. What was not read is all of the other groups, but for what
    the model has read elsewhere, word for word.
    """
    read = [item for item in items if item.group == "read"]
    unread = [item for item in items if item.group != "read" and not item.repeats]
    times = [item for item in items if item.repeats is not None]
    buckets = sorted({_bucket(item.repeats or 0) for item in times})
    return {
        "read": figures(read),
        "not read": figures(unread),
        "by step": [row | {"read": True} for row in _by_step(read)]
        + [row | {"read": False} for row in _by_step([i for i in unread if i.step is not None])],
        "by repeats": [
            {"repeats": list(bucket)}
            | figures([item for item in times if _bucket(item.repeats or 0) == bucket])
            for bucket in buckets
        ],
    }


def figures(items: Sequence[Item]) -> dict[str, Any]:
    """Of distinct sequences: how many, the mean score and the share memorised, with 95 % intervals.

    The share's is Wilson's, which says something of no hits, too. So is the mean's for fewer than
    10, whose deviation says little: it is right for any score from 0 to 1, and wide.
    """
    scores = list({(*i.prompt, *i.continuation): i.score for i in items}.values())
    n = len(scores)
    if not n:
        return {"sequences": 0}
    mean, hits = float(np.mean(scores)), sum(score == 1 for score in scores)
    error = 1.96 * float(np.std(scores, ddof=1)) / n**0.5 if n >= 10 else 0.0
    return {
        "sequences": n,
        "score": mean,
        "score_interval": [max(0.0, mean - error), min(1.0, mean + error)]
        if n >= 10
        else _wilson(n * mean, n),
        "memorised": hits,
        "share": hits / n,
        "share_interval": _wilson(hits, n),
    }


def _wilson(hits: float, n: int, z: float = 1.96) -> list[float]:
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (hits * (n - hits) / n + z * z / 4) ** 0.5
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _bucket(repeats: int) -> tuple[int, int]:
    """0, 1, 2, 3 to 4, 5 to 8, 9 to 16, …"""
    if repeats <= 2:
        return repeats, repeats
    power = (repeats - 1).bit_length()
    return (1 << (power - 1)) + 1, 1 << power


def _by_step(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Rows of equally many steps, those without a sequence left out."""
    steps_N = np.array([item.step for item in items])
    if not len(steps_N):
        return []
    first, last = int(steps_N.min()), int(steps_N.max()) + 1
    bins = max(1, min(BINS, len(items) // IN_A_BIN))
    edges = np.unique(np.linspace(first, last, bins + 1).round().astype(int)).tolist()
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = [item for item, s in zip(items, steps_N, strict=True) if low <= s < high]
        if inside:
            rows.append({"steps": [low, high - 1]} | figures(inside))
    return rows
