"""config.json both ways: what is written is read again, and what is not computed is refused."""

import dataclasses
import json

import numpy as np
import pytest
from hf_models import MPT, OLMO2, OLMO3, VARIANTS
from transformers import LlamaConfig, Olmo3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from olmo_jax.convert.hf_config import from_hf_config, to_hf_config
from olmo_jax.convert.olmo import from_olmo_config, to_olmo_config
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.rope import attention_factor, scaled_frequency


def written(config: ModelConfig) -> dict:
    return json.loads(json.dumps(to_hf_config(config, "float32", 0, 1)))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_read_again(name):
    config = VARIANTS[name]
    again, _ = from_hf_config(written(config), config.vocab_size)
    fills_in = dict(
        n_kv_heads=config.kv_heads if again.n_kv_heads else None,
        head_dim=config.head_width if again.head_dim else None,
    )
    unused = {} if config.position == "rope" else {"rope_theta": again.rope_theta}
    if config.rope_scaling == "linear":
        unused["rope_original_context"] = None
    assert again == dataclasses.replace(config, **fills_in, **unused)


@pytest.mark.parametrize("name", ["olmo3 long", "llama"])
def test_transformers_4_finds_scaled_rope_in_its_own_fields(name):
    hf, config = written(VARIANTS[name]), VARIANTS[name]
    del hf["rope_parameters"]
    again, _ = from_hf_config(hf)
    assert again.rope_theta == hf["rope_theta"] == config.rope_theta
    assert (again.rope_scaling, again.rope_factor) == (config.rope_scaling, config.rope_factor)
    assert hf["rope_scaling"]["rope_type"] == config.rope_scaling


@pytest.mark.parametrize("windows", [(5, 0, 5, 5), (0, 5, 5, 5), (0, 5), (0,)])
def test_any_place_of_the_windows_is_kept(windows):
    config = dataclasses.replace(OLMO3, window_pattern=windows)
    assert from_hf_config(written(config))[0].window_pattern == windows


def test_windows_of_two_widths_are_refused():
    with pytest.raises(UserError, match="one width of window"):
        written(dataclasses.replace(OLMO3, window_pattern=(3, 5)))


def test_the_released_long_context_has_transformers_frequencies():
    """OLMo 3's long-context stage: YaRN with the published numbers, at full size."""
    yarn = dict(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=8192,
        beta_fast=32,
        beta_slow=1,
        attention_factor=1.2079441541679836,
    )
    theirs = Olmo3Config(rope_theta=5e5, rope_scaling=yarn, max_position_embeddings=65536)
    config, _ = from_hf_config(theirs.to_dict())
    rope = Olmo3RotaryEmbedding(theirs)
    np.testing.assert_allclose(
        scaled_frequency(config), rope.full_attention_inv_freq.numpy(), rtol=1e-6
    )
    assert attention_factor(config) == rope.full_attention_attention_scaling
    by_formula = dataclasses.replace(config, rope_attention_factor=None)
    assert attention_factor(by_formula) == pytest.approx(1.2079441541679836, rel=1e-15)


def test_llama_3_1_has_transformers_frequencies():
    scaling = dict(
        rope_type="llama3",
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    theirs = LlamaConfig(rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072)
    config, _ = from_hf_config(theirs.to_dict())
    np.testing.assert_allclose(
        scaled_frequency(config), LlamaRotaryEmbedding(theirs).inv_freq.numpy(), rtol=1e-6
    )


@pytest.mark.parametrize(
    "config, changes, words",
    [
        ("olmo2", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": {}}, "'factor'"),
        ("olmo3 long", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("olmo3", {"layer_types": ["full_attention"]}, "1 entries"),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "by layer type"),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_parameters.sliding_attention",
        ),
        ("pythia", {"attention_bias": False}, "attention_bias = False"),
        ("mpt", {"no_bias": False}, "no_bias = False"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi = False"),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "attn_config.alibi_bias_max = 16"),
        ("mpt", {"expansion_ratio": 2}, "expansion_ratio = 2"),
        ("olmo3", {"model_type": "olmo_hybrid"}, "OLMo Hybrid has recurrent layers"),
        ("olmo2", {"vocab_size": None}, "vocab_size = None is no whole number"),
        ("olmo2", {"hidden_size": "64"}, "d_model = '64' is no whole number"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config, changes, words):
    with pytest.raises(UserError, match=words) as error:
        from_hf_config(written(VARIANTS[config]) | changes)
    assert "\n" not in str(error.value)


def test_yarn_with_fields_of_other_models_is_refused():
    hf = written(VARIANTS["olmo3 long"])
    hf["rope_scaling"]["mscale"] = 0.7
    with pytest.raises(UserError, match=r"mscale = 0\.7"):
        from_hf_config(hf)


def test_missing_fields_take_the_classs_defaults():
    hf = written(MPT)
    for name in ("attn_config", "layer_norm_epsilon", "tie_word_embeddings"):
        del hf[name]
    config, _ = from_hf_config(hf)
    assert (config.clip_qkv, config.norm_eps, config.tie_embeddings) == (None, 1e-5, True)
    hf = written(OLMO2)
    del hf["num_hidden_layers"]
    with pytest.raises(UserError, match="lacks 'num_hidden_layers'"):
        from_hf_config(hf)


JUNK = [None, True, -1, 0, 2.5, "x", "1e-5", [], ["x"], {}, {"x": 1}, 10**18]


@pytest.mark.parametrize("name", ["olmo3 long", "pythia", "mpt"])
def test_a_damaged_field_is_one_clear_line(name):
    good = written(VARIANTS[name])
    refused = 0
    for field in good:
        for junk in JUNK:
            try:
                from_hf_config({**good, field: junk})
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and "pydantic" not in str(error)
    assert refused > len(JUNK)


def test_a_damaged_field_of_olmos_own_config_is_one_clear_line():
    good = to_olmo_config(VARIANTS["olmo2"])
    refused = 0
    for field in good:
        for junk in JUNK:
            try:
                from_olmo_config({**good, field: junk}, "config.yaml")
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and "pydantic" not in str(error)
    assert refused > len(JUNK)
