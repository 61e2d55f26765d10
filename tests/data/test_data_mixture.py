"""Mixtures: exact to within one at every prefix, each source through its own order and epochs."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_jax.data import DataConfig, open_dataset
from olmo_jax.data.mixture import Mixture, whole_parts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_every_prefix_is_within_one_of_the_share(weights):
    mixture = Mixture([w / 10 for w in weights])
    counts = [0] * len(weights)
    for n in range(2 * mixture.period + 3):
        k, j = mixture(n)
        assert j == counts[k]
        counts[k] += 1
        for c, w in zip(counts, weights, strict=True):
            assert abs(c - w * (n + 1) / sum(weights)) < 1 + 1e-9


def test_parts_are_exact_where_they_can_be_and_never_zero():
    assert whole_parts([0.5, 0.3, 0.2]) == [5, 3, 2]
    assert whole_parts([0.1, 0.1, 0.1]) == [1, 1, 1]
    assert whole_parts([5, 1e-12])[1] == 1
    assert sum(whole_parts([2**0.5, 3**0.5, 5**0.5])) == 1_000_000


def test_a_tiny_source_appears_and_small_sources_run_through_epochs(write_tokens, tmp_path):
    big, small = write_tokens("big.npy", [50] * 200), write_tokens("small.npy", [50] * 2, seed=1)
    config = DataConfig(
        sources={"big": (str(big),), "small": (str(small),)},
        weights={"big": 0.999, "small": 0.001},
        sequence_length=10,
    )
    dataset = open_dataset(config, 1000)
    seen = Counter(dataset.instance_id(n) for n in range(12_000))
    from_small = {i: c for i, c in seen.items() if i >= 1000}
    assert len(dataset) == 1010
    assert sum(from_small.values()) == 12 and set(from_small) == set(range(1000, 1010))
    assert set(seen.values()) - set(from_small.values()) <= {11, 12}  # 11988 over 1000
    assert dataset.table()[1]["share"] == 0.001
    assert dataset.where(1000)[0].path == str(small)


def test_sources_do_not_share_an_order(write_tokens):
    a, b = write_tokens("a.npy", [50] * 100), write_tokens("b.npy", [50] * 100, seed=1)
    config = DataConfig(
        sources={"a": (str(a),), "b": (str(b),)}, weights={"a": 1, "b": 1}, sequence_length=10
    )
    dataset = open_dataset(config, 1000)
    ids = np.array([dataset.instance_id(n) for n in range(1000)])
    assert len(set(ids)) == 1000
    assert (ids[ids < 500] != ids[ids >= 500] - 500).mean() > 0.9
