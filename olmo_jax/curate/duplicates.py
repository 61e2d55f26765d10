"""Which of the hashed documents and paragraphs were seen before: one pass over them, in order.

Bloom filter (rbloom), a set of all hashes, or MinHash with locality-sensitive hashing. Hashing
files and writing attributes is `dedupe`'s.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rbloom import Bloom
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from olmo_jax.curate.dedupe_config import BloomConfig, DedupeConfig, MinHashConfig
from olmo_jax.curate.documents import encode, writing
from olmo_jax.errors import UserError

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_PAIRS_AT_ONCE = 1 << 16
_IsKnown = Callable[[np.ndarray], np.ndarray]
"""Of the hashes of a file's items, (I, 2), which ones were seen before; all are then known."""


class Keys(NamedTuple):
    """What one file has to compare. An item is a document, a paragraph, or an n-gram."""

    hashes_I2: np.ndarray
    """xxh3-128 of each item, as two uint64; for MinHash the signatures, (documents, P) uint32."""
    unit_I: np.ndarray
    """Which document or paragraph an item belongs to."""
    units_U4: np.ndarray
    """Of each document or paragraph: line, start, end (characters; bytes of a document's key), and
    whether its last item alone decides."""
    names: np.ndarray
    """For MinHash the documents' ids and first words, [[id, words], …] as JSON, uint8."""


def load_keys(path: str) -> Keys:
    with np.load(path) as content:
        return Keys(*content.values())


def decide(
    paths: Sequence[str],
    keys: Sequence[str],
    marks: Sequence[str],
    clusters: str,
    settings: DedupeConfig,
    bloom: BloomConfig,
    before: str,
) -> None:
    """Writes a score for each unit of each file: -1 for what is not marked; for MinHash also the
    file `clusters`. `before` keeps the Bloom filter as it was before the first pass over these
    files: a later pass starts from it, since the filter itself knows all of them by then. Raises
    UserError."""
    if settings.method == "minhash":
        files = [load_keys(key) for key in keys]
        signature_UP = np.concatenate([f.hashes_I2 for f in files])
        first_U = near_duplicates(signature_UP, settings.minhash)
        _write_clusters(paths, files, signature_UP, first_U, clusters)
        score_U = np.where(first_U == np.arange(len(first_U)), -1.0, 1.0)
        ends = np.cumsum([len(f.units_U4) for f in files])
        for mark, part_U in zip(marks, np.split(score_U, ends[:-1]), strict=True):
            _write_mark(mark, part_U)
        return
    filter_ = _open_bloom(bloom, before) if settings.method == "bloom" else None
    is_known = _exact() if filter_ is None else _in_bloom(filter_, bloom.read_only)
    for key, mark in zip(keys, marks, strict=True):
        _write_mark(mark, _scores(load_keys(key), is_known, settings))
    # After the marks: with it everything here would have been seen before.
    if filter_ is not None and bloom.file and not bloom.read_only:
        if not os.path.exists(bloom.file):
            _write(before, b"")
        elif not os.path.exists(before):
            _write(before, Path(bloom.file).read_bytes())
        else:  # what others have added since stays
            filter_.update(_load_bloom(bloom.file))
        _write(bloom.file, filter_.save_bytes())


def _write(path: str, content: bytes) -> None:
    with writing(path) as file:
        file.write(content)


def _write_mark(path: str, score_U: np.ndarray) -> None:
    with writing(path) as file:
        np.save(file, score_U)


def _write_clusters(
    paths: Sequence[str],
    files: Sequence[Keys],
    signature_UP: np.ndarray,
    first_U: np.ndarray,
    out: str,
) -> None:
    """The clusters of two documents and more for people, the largest first, a line of JSON each.
    The first document stays; `similarity` is its estimated Jaccard similarity with each."""
    starts = np.cumsum([0, *(len(f.units_U4) for f in files)])
    order = np.argsort(first_U, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(first_U[order])) + 1)
    names: dict[int, list[list[str]]] = {}

    def describe(u: int, first: int) -> dict[str, Any]:
        file = int(np.searchsorted(starts, u, "right")) - 1
        if file not in names:
            names[file] = msgspec.json.decode(files[file].names.tobytes())
        i = u - int(starts[file])
        name, begin = names[file][i]
        return {
            "id": name,
            "file": paths[file],
            "line": int(files[file].units_U4[i, 0]),
            "similarity": round(float((signature_UP[u] == signature_UP[first]).mean()), 3),
            "begins": begin,
        }

    with writing(out) as lines:
        for group in sorted((m for m in members if len(m) > 1), key=lambda m: (-len(m), m[0])):
            documents = [describe(u, int(group[0])) for u in group.tolist()]
            lines.write(encode({"size": len(group), "documents": documents}) + b"\n")


def _scores(keys: Keys, is_known: _IsKnown, settings: DedupeConfig) -> np.ndarray:
    """The share of each unit's items that were seen before."""
    known_I = is_known(keys.hashes_I2)
    n = len(keys.units_U4)
    count_U = np.bincount(keys.unit_I, minlength=n)
    share_U = np.bincount(keys.unit_I, weights=known_I, minlength=n) / np.maximum(count_U, 1)
    whole_U = keys.units_U4[:, 3].astype(bool)
    share_U[whole_U] = known_I[(np.cumsum(count_U) - 1)[whole_U]]
    ngram = settings.paragraphs.by_ngram if settings.paragraphs else None
    threshold = ngram.overlap_threshold if ngram and ngram.ngram_length else 1.0
    return np.where((share_U >= threshold) & (count_U > 0), share_U, -1.0)


def _exact() -> _IsKnown:
    seen: set[bytes] = set()

    def is_known(hashes_I2: np.ndarray) -> np.ndarray:
        content = hashes_I2.tobytes()
        known = np.zeros(len(hashes_I2), bool)
        for i in range(len(known)):
            if (digest := content[16 * i : 16 * i + 16]) in seen:
                known[i] = True
            else:
                seen.add(digest)
        return known

    return is_known


def _in_bloom(bloom: Bloom, read_only: bool) -> _IsKnown:
    def is_known(hashes_I2: np.ndarray) -> np.ndarray:
        numbers = hashes_I2[:, 0].view(np.int64).tolist()
        if read_only:
            return np.array([number in bloom for number in numbers], bool)
        known = np.zeros(len(numbers), bool)
        for i, number in enumerate(numbers):
            if number in bloom:
                known[i] = True
            else:
                bloom.add(number)
        return known

    return is_known


def _open_bloom(config: BloomConfig, before: str) -> Bloom:
    if config.file and os.path.exists(config.file):
        path = before if os.path.exists(before) else config.file
        if os.path.getsize(path) or path == config.file:  # empty: there was none
            return _load_bloom(path)
    elif config.read_only:
        raise UserError(f"{config.file}: no such Bloom filter; read_only needs one")
    n, rate = config.estimated_doc_count, config.desired_false_positive_rate
    if config.size_in_bytes:
        rate = math.exp(-config.size_in_bytes * 8 * math.log(2) ** 2 / n)
    return Bloom(n, min(max(rate, 1e-15), 0.5), int)


def _load_bloom(path: str) -> Bloom:
    try:
        return Bloom.load(path, int)  # the items are hashes already: they stay as they are
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: is no Bloom filter of this program: {e}") from None


def near_duplicates(signature_UP: np.ndarray, config: MinHashConfig) -> np.ndarray:
    """For each document the first of its cluster, itself when there is none before it, (U,).

    Documents are candidates where all values of a band of their signatures agree, and linked where
    `config.similarity` of all values do; a cluster is what links connect.
    """
    n = len(signature_UP)
    bands = np.array_split(signature_UP.astype(np.uint64), config.bands, axis=1)
    pairs_C2 = np.unique(np.concatenate([_candidates(band) for band in bands]), axis=0)
    alike_C = np.zeros(len(pairs_C2), bool)
    for start in range(0, len(pairs_C2), _PAIRS_AT_ONCE):
        a, b = pairs_C2[start : start + _PAIRS_AT_ONCE].T
        equal = (signature_UP[a] == signature_UP[b]).mean(axis=1)
        alike_C[start : start + _PAIRS_AT_ONCE] = equal >= config.similarity
    a, b = pairs_C2[alike_C].T
    links = coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n))
    _, cluster_U = connected_components(links, directed=False)
    _, first = np.unique(cluster_U, return_index=True)
    return first[cluster_U]


def _candidates(band_UR: np.ndarray) -> np.ndarray:
    """Pairs of documents, (C, 2), that have the same values: each with the first that has them and
    with the one before it."""
    hash_U = np.zeros(len(band_UR), np.uint64)
    for column in band_UR.T:
        hash_U = (hash_U ^ column) * _PRIME
        hash_U ^= hash_U >> np.uint64(29)
    order = np.argsort(hash_U, kind="stable")
    same = hash_U[order][1:] == hash_U[order][:-1]
    place = np.arange(len(order))
    place[1:][same] = 0
    first = order[np.maximum.accumulate(place)]
    later = order[1:][same]
    return np.concatenate(
        [np.stack([before, later], axis=1) for before in (order[:-1][same], first[1:][same])]
    )
