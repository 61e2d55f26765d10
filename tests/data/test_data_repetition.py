"""The repetition filter against the definition, token by token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_jax.data import DataConfig, open_dataset, write_token_file
from olmo_jax.data.repetition import is_repetitive


def by_definition(tokens: list[int]) -> bool:
    return any(
        tokens[s : s + p] * 32 == tokens[s : s + 32 * p]
        for p in range(1, 14)
        for s in range(len(tokens) - 32 * p + 1)
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 15), st.integers(30, 34), st.integers(0, 14), st.integers(0, 9999))
def test_as_defined(period, times, missing, seed):
    rng = np.random.default_rng(seed)
    before, after = (rng.integers(0, 9, rng.integers(0, 60)) for _ in range(2))
    stretch = np.tile(rng.integers(0, 9, period), times)
    tokens = np.concatenate([before, stretch[: len(stretch) - missing], after])
    assert is_repetitive(tokens) == by_definition(tokens.tolist())


def test_a_filtered_instance_keeps_its_place_and_loses_its_loss(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1000, 512)
    tokens[200:240] = 7
    file = write_token_file(tmp_path / "a.npy", tokens, [], "uint16")
    for repetition_filter in (False, True):
        config = DataConfig(
            paths=(file.path,),
            sequence_length=128,
            order="sequential",
            repetition_filter=repetition_filter,
        )
        dataset = open_dataset(config, 1000)
        kept = [bool(dataset.instance(n).loss_mask_T.any()) for n in range(4)]
        assert kept == [True, not repetition_filter, True, True]
        assert dataset.instance(1).tokens_T.tolist() == tokens[128:256].tolist()
