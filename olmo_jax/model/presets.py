"""The released models as functions that return a `ModelConfig`, with what was published of them.

Numbers as published. LLaMA and MPT are here to be loaded and gone on from: how their weights were
initialised and in which order they saw their data was not published, so they have no recipe.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Released:
    """A released model."""

    config: Callable[[], ModelConfig]
    """Makes its configuration."""
    about: str
    """One line: name and date, and what sets it apart."""
    tokens: int
    """Tokens of pre-training, before any annealing, as published (rounded where only that is)."""
    data: str
    """Name of the pre-training data."""
    licence: str
    """Licence of the weights."""
    recipe: str | None
    """Our gin file of its pre-training; None where too little was published."""


PRESETS: dict[str, Released] = {}


def _released(tokens: int, data: str, licence: str = "Apache-2.0", recipe: str | None = None):
    def register(config: Callable[[], ModelConfig]) -> Callable[[], ModelConfig]:
        about = (config.__doc__ or "").splitlines()[0]
        PRESETS[config.__name__] = Released(config, about, tokens, data, licence, recipe)
        return config

    return register


def preset(name: str) -> ModelConfig:
    """The configuration of a released model by name; UserError names the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown preset {name!r}: {hint}allowed are {', '.join(PRESETS)}")
    return PRESETS[name].config()


# --- OLMo 1 -------------------------------------------------------------------------------------


def _olmo1(**choices) -> ModelConfig:
    fields: dict[str, Any] = dict(
        vocab_size=50280,
        embedding_rows=50304,
        context_length=2048,
        norm="layer_nonparametric",
        norm_eps=1e-5,
        norm_place="pre",
        qk_norm=False,
        rope_theta=1e4,
        init="mitchell",
    )
    return ModelConfig(**(fields | choices))


@_released(3_100_966_387_712, "Dolma v1.5", recipe="configs/olmo1/1b.gin")
def olmo1_1b() -> ModelConfig:
    """OLMo 1B (February 2024), the only one with tied embeddings."""
    return _olmo1(d_model=2048, n_layers=16, n_heads=16, mlp_width=8192, tie_embeddings=True)


@_released(3_000_001_101_824, "Dolma v1.7", recipe="configs/olmo1/1b_0724.gin")
def olmo1_1b_0724() -> ModelConfig:
    """OLMo 1B 0724: longer context, clipped q, k, v, untied."""
    return replace(olmo1_1b(), context_length=4096, clip_qkv=8.0, tie_embeddings=False)


@_released(2_459_566_080_000, "Dolma v1.5", recipe="configs/olmo1/7b.gin")
def olmo1_7b() -> ModelConfig:
    """OLMo 7B (February 2024)."""
    return _olmo1(d_model=4096, n_layers=32, n_heads=32, mlp_width=11008)


@_released(2_000_683_008_000, "Dolma v1.7", recipe="configs/olmo1/7b_0424.gin")
def olmo1_7b_0424() -> ModelConfig:
    """OLMo 7B 0424 (OLMo 1.7): longer context and clipped q, k, v."""
    return replace(olmo1_7b(), context_length=4096, clip_qkv=8.0)


# --- OLMo 2 -------------------------------------------------------------------------------------


def _olmo2(**choices) -> ModelConfig:
    fields = dict(vocab_size=100278, embedding_rows=100352, context_length=4096)
    return ModelConfig(**(fields | choices))


@_released(4_000_021_741_568, "OLMo-mix-1124", recipe="configs/olmo2/1b.gin")
def olmo2_1b() -> ModelConfig:
    """OLMo 2 1B 0425 (OLMo-core's `olmo2_1B_v2`)."""
    return _olmo2(d_model=2048, n_layers=16, n_heads=16, mlp_width=8192)


@_released(3_895_023_632_384, "OLMo-mix-1124", recipe="configs/olmo2/7b.gin")
def olmo2_7b() -> ModelConfig:
    """OLMo 2 7B 1124."""
    return _olmo2(d_model=4096, n_layers=32, n_heads=32, mlp_width=11008)


@_released(5_000_088_518_656, "OLMo-mix-1124", recipe="configs/olmo2/13b.gin")
def olmo2_13b() -> ModelConfig:
    """OLMo 2 13B 1124."""
    return _olmo2(d_model=5120, n_layers=40, n_heads=40, mlp_width=13824)


@_released(6_055_744_503_808, "OLMoE-mix-0824", recipe="configs/olmo2/32b.gin")
def olmo2_32b() -> ModelConfig:
    """OLMo 2 32B 0325, the only dense OLMo 2 with grouped-query attention."""
    return _olmo2(d_model=5120, n_layers=64, n_heads=40, n_kv_heads=8, mlp_width=27648)


# --- OLMo 3 -------------------------------------------------------------------------------------


def _olmo3(olmo2: ModelConfig) -> ModelConfig:
    """OLMo 2's shapes; three layers of four see 4096 tokens."""
    return replace(olmo2, context_length=8192, window_pattern=(4096, 4096, 4096, 0))


def _long(olmo3: ModelConfig) -> ModelConfig:
    """After the long-context stage: YaRN on the layers with full attention."""
    return replace(
        olmo3,
        context_length=65536,
        rope_scaling="yarn",
        rope_factor=8.0,
        rope_original_context=8192,
        rope_beta_fast=32.0,
        rope_beta_slow=1.0,
        rope_attention_factor=1.2079441541679836,
    )


@_released(5_929_965_715_456, "Dolma 3 (OLMo-mix-0625)", recipe="configs/olmo3/7b.gin")
def olmo3_7b() -> ModelConfig:
    """OLMo 3 7B 1025 before its long-context stage: layers with windows."""
    return _olmo3(olmo2_7b())


@_released(5_929_965_715_456, "Dolma 3 (OLMo-mix-0625)", recipe="configs/olmo3/7b.gin")
def olmo3_7b_long() -> ModelConfig:
    """OLMo 3 7B 1025, the released base model: 65,536 tokens by YaRN."""
    return _long(olmo3_7b())


@_released(5_502_926_848_000, "Dolma 3 (OLMo-mix-0925)", recipe="configs/olmo3/32b.gin")
def olmo3_32b() -> ModelConfig:
    """OLMo 3 32B 1125 before its long-context stage: layers with windows."""
    return _olmo3(olmo2_32b())


@_released(5_502_926_848_000, "Dolma 3 (OLMo-mix-0925)", recipe="configs/olmo3/32b.gin")
def olmo3_32b_long() -> ModelConfig:
    """OLMo 3 32B 1125, the released base model: 65,536 tokens by YaRN."""
    return _long(olmo3_32b())


# --- Mixtures of experts --------------------------------------------------------------------------


@_released(5_033_164_800_000, "OLMoE-mix-0924", recipe="configs/olmoe/1b_7b.gin")
def olmoe_1b_7b_0924() -> ModelConfig:
    """OLMoE 1B-7B 0924: 8 of 64 experts a token, 1.3B of 6.9B parameters active."""
    return ModelConfig(
        vocab_size=50280,
        embedding_rows=50304,
        d_model=2048,
        n_layers=16,
        n_heads=16,
        mlp_width=1024,
        context_length=4096,
        norm_eps=1e-5,
        norm_place="pre",
        rope_theta=1e4,
        n_experts=64,
        experts_per_token=8,
        load_balancing_loss=0.01,
        router_z_loss=0.001 / 8,  # see ops/experts.py, router_z_loss
    )


@_released(10**12, "public mix and six closed sets")
def flexolmo_7x7b_1t() -> ModelConfig:
    """FlexOlmo 7x7B 1T: OLMo 2 7B's shape with seven experts, each trained on data of its own."""
    return replace(
        olmo2_7b(), n_experts=7, experts_per_token=5, load_balancing_loss=0.01
    )  # as in transformers' FlexOlmoConfig


# --- Pythia: as its config.json says (GELU by erf); the recipes train with the tanh ---------------

_PILE, _PILE_TOKENS = "The Pile", 143_000 * 1024 * 2048


def _pythia(n_layers: int, d_model: int, n_heads: int, **choices) -> ModelConfig:
    fields: dict[str, Any] = dict(
        vocab_size=50277,
        embedding_rows=50304,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        mlp_width=4 * d_model,
        context_length=2048,
        norm="layer",
        norm_eps=1e-5,
        norm_place="pre",
        qk_norm=False,
        bias=True,
        parallel_residual=True,
        mlp="gelu",
        rope_theta=1e4,
        rope_fraction=0.25,
        init="small",
    )
    return ModelConfig(**(fields | choices))


@_released(_PILE_TOKENS, _PILE + ", deduplicated", recipe="configs/pythia/14m.gin")
def pythia_14m() -> ModelConfig:
    """Pythia 14M, like 31M a later addition."""
    return _pythia(6, 128, 4)


@_released(_PILE_TOKENS, _PILE + ", deduplicated", recipe="configs/pythia/31m.gin")
def pythia_31m() -> ModelConfig:
    """Pythia 31M."""
    return _pythia(6, 256, 8)


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/70m.gin")
def pythia_70m() -> ModelConfig:
    """Pythia 70M."""
    return _pythia(6, 512, 8)


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/160m.gin")
def pythia_160m() -> ModelConfig:
    """Pythia 160M."""
    return _pythia(12, 768, 12)


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/410m.gin")
def pythia_410m() -> ModelConfig:
    """Pythia 410M."""
    return _pythia(24, 1024, 16)


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/1b.gin")
def pythia_1b() -> ModelConfig:
    """Pythia 1B, heads twice as wide as its neighbours'."""
    return _pythia(16, 2048, 8)


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/1.4b.gin")
def pythia_1_4b() -> ModelConfig:
    """Pythia 1.4B."""
    return _pythia(24, 2048, 16)


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/2.8b.gin")
def pythia_2_8b() -> ModelConfig:
    """Pythia 2.8B, heads 80 wide."""
    return _pythia(32, 2560, 32)


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/6.9b.gin")
def pythia_6_9b() -> ModelConfig:
    """Pythia 6.9B."""
    return _pythia(32, 4096, 32, embedding_rows=50432, init="scaled")


@_released(_PILE_TOKENS, _PILE, recipe="configs/pythia/12b.gin")
def pythia_12b() -> ModelConfig:
    """Pythia 12B."""
    return _pythia(36, 5120, 40, embedding_rows=50688, init="scaled")


# --- LLaMA and MPT --------------------------------------------------------------------------------


def _llama(**choices) -> ModelConfig:
    return ModelConfig(norm="rms", norm_place="pre", qk_norm=False, **choices)


@_released(10**12, "web, code, books, papers", licence="LLaMA (research only)")
def llama1_7b() -> ModelConfig:
    """LLaMA 7B (February 2023)."""
    return _llama(
        vocab_size=32000,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        mlp_width=11008,
        context_length=2048,
        norm_eps=1e-6,
        rope_theta=1e4,
    )


@_released(2 * 10**12, "not published", licence="Llama 2 Community")
def llama2_7b() -> ModelConfig:
    """Llama 2 7B (July 2023)."""
    return replace(llama1_7b(), context_length=4096, norm_eps=1e-5)


@_released(15 * 10**12, "not published", licence="Llama 3 Community")
def llama3_8b() -> ModelConfig:
    """Llama 3 8B (April 2024): grouped-query attention."""
    return _llama(
        vocab_size=128256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        mlp_width=14336,
        context_length=8192,
        norm_eps=1e-5,
        rope_theta=5e5,
    )


@_released(9 * 10**12, "not published", licence="Llama 3.2 Community")
def llama3_2_1b() -> ModelConfig:
    """Llama 3.2 1B (September 2024): scaled RoPE, tied embeddings."""
    return _llama(
        vocab_size=128256,
        d_model=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        mlp_width=8192,
        context_length=131072,
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling="llama3",
        rope_factor=32.0,
        rope_original_context=8192,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        tie_embeddings=True,
    )


@_released(10**12, "MosaicML's mix of ten sets")
def mpt_7b() -> ModelConfig:
    """MPT 7B (May 2023): ALiBi, no biases."""
    return ModelConfig(
        vocab_size=50277,
        embedding_rows=50432,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        mlp_width=16384,
        context_length=2048,
        norm="layer",
        norm_eps=1e-5,
        norm_place="pre",
        qk_norm=False,
        mlp="gelu",
        position="alibi",
        tie_embeddings=True,
    )
