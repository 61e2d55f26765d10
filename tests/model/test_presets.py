"""The released models' exact sizes, from shapes alone."""

import jax
import pytest

from olmo_jax.errors import UserError
from olmo_jax.model.presets import PRESETS, preset
from olmo_jax.model.transformer import abstract_model, parameters

PUBLISHED = {  # counted from the released weights
    "olmo1_1b": 1_176_764_416,
    "olmo1_1b_0724": 1_279_787_008,
    "olmo1_7b": 6_888_095_744,
    "olmo1_7b_0424": 6_888_095_744,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
}


def test_every_preset_has_a_published_count():
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config = preset(name)
    leaves = jax.tree.leaves(parameters(abstract_model(config)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)  # nothing is allocated
    assert sum(leaf.size for leaf in leaves) == PUBLISHED[name]
    assert config.parameter_count() == PUBLISHED[name]


def test_a_misspelt_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'olmo2_7b'"):
        preset("olmo2-7b")
