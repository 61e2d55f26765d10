"""The released models' exact sizes, from shapes alone."""

import dataclasses
from pathlib import Path

import jax
import pytest

from olmo_jax.errors import UserError
from olmo_jax.model.presets import PRESETS, preset
from olmo_jax.model.transformer import abstract_model, parameters

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # counted from the released weights (Pythia's: the table in its README)
    "olmo1_1b": 1_176_764_416,
    "olmo1_1b_0724": 1_279_787_008,
    "olmo1_7b": 6_888_095_744,
    "olmo1_7b_0424": 6_888_095_744,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "olmo3_7b": 7_298_617_344,
    "olmo3_7b_long": 7_298_617_344,
    "olmo3_32b": 32_234_279_936,
    "olmo3_32b_long": 32_234_279_936,
    "olmoe_1b_7b_0924": 6_919_161_856,
    "flexolmo_7x7b_1t": 33_270_665_216,  # by hand, from the class's default sizes
    "pythia_14m": 14_067_712,
    "pythia_31m": 30_494_720,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "pythia_6_9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
    "llama1_7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mpt_7b": 6_649_286_656,
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


@pytest.mark.parametrize(
    "name, count", [("olmo3_7b", 7_298_011_136), ("olmo3_32b", 32_233_522_176)]
)
def test_the_transformers_folders_of_olmo3_hold_fewer_rows(name, count):
    config = dataclasses.replace(preset(name), embedding_rows=100278)
    leaves = jax.tree.leaves(parameters(abstract_model(config)))
    assert sum(leaf.size for leaf in leaves) == config.parameter_count() == count


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("pythia")])
def test_pythias_counts_follow_its_formula(name):
    config = preset(name)
    d, layers = config.d_model, config.n_layers
    formula = 2 * config.rows * d + layers * (12 * d**2 + 13 * d) + 2 * d
    assert config.parameter_count() == formula


def test_olmoes_active_parameters_are_the_published_ones():
    assert preset("olmoe_1b_7b_0924").parameter_count(active=True) == 1_282_017_280


def test_what_was_published_is_said_of_every_preset():
    for name, released in PRESETS.items():
        assert released.config() == preset(name)
        assert released.tokens > 10**11 and released.data and released.licence and released.about
        assert released.recipe is None or (ROOT / released.recipe).is_file()
        assert bool(released.recipe) == name.startswith(("olmo", "pythia"))


def test_a_misspelt_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'olmo2_7b'"):
        preset("olmo2-7b")
