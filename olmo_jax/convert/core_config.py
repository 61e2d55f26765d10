"""OLMo-core's config.json for one of our models; reading one is olmo_core.py's."""

import math
from typing import Any

from olmo_jax.convert.olmo_core import yarn_attention_factor
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig

_NN = "olmo_core.nn."


def to_core_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json's `model`, as OLMo-core 3 writes it. UserError when it has no such model."""
    differs = [
        f"{field} = {getattr(config, field)!r} (it has {value!r})"
        for field, value in (("parallel_residual", False), ("mlp", "swiglu"), ("position", "rope"))
        if getattr(config, field) != value
    ]
    for field in ("rope_theta", "rope_beta_fast", "rope_beta_slow"):
        if getattr(config, field) != math.floor(getattr(config, field)):
            differs.append(f"{field} = {getattr(config, field)} (it has whole numbers)")
    given = config.rope_attention_factor
    if config.rope_scaling == "yarn" and given is not None:
        computed = yarn_attention_factor(config.rope_factor)
        if not math.isclose(given, computed, rel_tol=1e-6):
            differs.append(f"rope_attention_factor = {given} (it has {computed})")
    if config.bias and config.n_experts:
        differs.append("bias with experts (its experts have none)")
    if differs:
        raise UserError(f"OLMo-core cannot compute this model: {'; '.join(differs)}")
    windows, scaled = config.windows, config.rope_scaling != "none"
    plain_too = scaled and any(windows)  # then only layers with full attention are scaled
    model: dict[str, Any] = {
        "d_model": config.d_model,
        "vocab_size": config.rows,
        "n_layers": config.n_layers,
        "block": _block(config, dtype, scaled and not plain_too),
        "lm_head": {
            "name": "default",
            "layer_norm": _norm(config, dtype),
            "bias": False,
            "dtype": dtype,
            "loss_implementation": "default",
            "_CLASS_": _NN + "lm_head.LMHeadConfig",
        },
        "name": "moe" if config.n_experts else "default",
        "dtype": dtype,
        "init_method": "normal",
        "init_seed": 0,
        "init_std": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "_CLASS_": _NN + "transformer.config.TransformerConfig",
    }
    if plain_too:
        full = [i for i, window in enumerate(windows) if not window]
        model["block_overrides"] = {str(i): _block(config, dtype, True) for i in full}
    if config.embedding_init_std is not None:
        model["embedding_init_std"] = config.embedding_init_std
    return model


def _block(config: ModelConfig, dtype: str, scaled: bool) -> dict[str, Any]:
    name = "default" if config.norm_place == "pre" else "reordered_norm"
    attention: dict[str, Any] = {
        "name": "default",
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "bias": config.bias,
        "rope": _rope(config, scaled),
        "dtype": dtype,
        "type": "attention",
        "_CLASS_": _NN + "attention.AttentionConfig",
    }
    if config.head_dim is not None:
        attention["head_dim"] = config.head_dim
    if config.clip_qkv is not None:
        attention["clip_qkv"] = config.clip_qkv
    if config.qk_norm:
        attention["qk_norm"] = _norm(config, dtype)
    if any(config.windows):
        attention["sliding_window"] = {
            "pattern": [window or -1 for window in config.window_pattern],
            "force_full_attention_on_first_layer": False,
            "force_full_attention_on_last_layer": False,
            "_CLASS_": _NN + "attention.SlidingWindowAttentionConfig",
        }
    block: dict[str, Any] = {
        "sequence_mixer": attention,
        "layer_norm": _norm(config, dtype),
        "name": name,
        "_CLASS_": _NN + "transformer.config.TransformerBlockConfig",
    }
    if config.n_experts:
        block["name"] = "moe" if name == "default" else f"moe_{name}"
        block["feed_forward_moe"] = _experts(config, dtype)
    else:
        block["feed_forward"] = {
            "hidden_size": config.mlp_width,
            "name": "default",
            "bias": config.bias,
            "dtype": dtype,
            "activation": "silu",
            "_CLASS_": _NN + "feed_forward.FeedForwardConfig",
        }
    return block


def _experts(config: ModelConfig, dtype: str) -> dict[str, Any]:
    router: dict[str, Any] = {
        "name": "default",
        "top_k": config.experts_per_token,
        "gating_function": "softmax",
        "_CLASS_": _NN + "moe.router.MoERouterConfig",
    }
    if config.normalize_expert_weights:
        router["normalize_expert_weights"] = 1.0
    return {
        "name": "dropless",
        "num_experts": config.n_experts,
        "hidden_size": config.mlp_width,
        "router": router,
        "lb_loss_weight": config.load_balancing_loss or None,
        "z_loss_weight": config.router_z_loss or None,
        "scale_loss_by_num_layers": True,
        "dtype": dtype,
        "_CLASS_": _NN + "moe.moe.MoEConfig",
    }


def _norm(config: ModelConfig, dtype: str) -> dict[str, Any]:
    norm: dict[str, Any] = {
        "name": "rms" if config.norm == "rms" else "default",
        "eps": config.norm_eps,
        "bias": config.bias and config.norm == "layer",
        "dtype": dtype,
        "_CLASS_": _NN + "layer_norm.LayerNormConfig",
    }
    if config.norm == "layer_nonparametric":
        norm["elementwise_affine"] = False
    return norm


def _rope(config: ModelConfig, scaled: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "name": "default",
        "theta": int(config.rope_theta),
        "full_precision": True,
        "partial_rotary_factor": config.rope_fraction,
        "_CLASS_": _NN + "rope.RoPEConfig",
    }
    if scaled:
        rope["scaling"] = _scaling(config)
    return rope


def _scaling(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling == "linear":
        return {"factor": config.rope_factor, "_CLASS_": _NN + "rope.PIRoPEScalingConfig"}
    common = {"factor": config.rope_factor, "old_context_len": config.rope_original_context}
    if config.rope_scaling == "yarn":
        return common | {
            "beta_fast": int(config.rope_beta_fast),
            "beta_slow": int(config.rope_beta_slow),
            "_CLASS_": _NN + "rope.YaRNRoPEScalingConfig",
        }
    return common | {
        "low_freq_proportion": 1 - 1 / config.rope_low_freq_factor,
        "high_freq_proportion": 1 / config.rope_high_freq_factor,
        "_CLASS_": _NN + "rope.StepwiseRoPEScalingConfig",
    }
