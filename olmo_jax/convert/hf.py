"""transformers' names and configuration of each architecture, one table read in both directions.

Knows names and fields; bytes and files are safetensors_io.py's, and writing a folder export.py's.
"""

from dataclasses import dataclass
from typing import Any

from olmo_jax.convert.table import Layout, Row, rows_for
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig


def _one(theirs: str, ours: str, layout: Layout = "transposed") -> Row:
    return Row(theirs, (ours,), layout)


_LAYER = "model.layers.{layer}."
_COMMON = (
    _one("model.embed_tokens.weight", "embed.weight", "same"),
    _one(_LAYER + "self_attn.q_proj.weight", "layers.attention.q.weight"),
    _one(_LAYER + "self_attn.k_proj.weight", "layers.attention.k.weight"),
    _one(_LAYER + "self_attn.v_proj.weight", "layers.attention.v.weight"),
    _one(_LAYER + "self_attn.o_proj.weight", "layers.attention.out.weight"),
    _one(_LAYER + "mlp.gate_proj.weight", "layers.mlp.gate.weight"),
    _one(_LAYER + "mlp.up_proj.weight", "layers.mlp.up.weight"),
    _one(_LAYER + "mlp.down_proj.weight", "layers.mlp.down.weight"),
    _one("lm_head.weight", "lm_head.weight"),
)
_OLMO2 = (
    _one(_LAYER + "self_attn.q_norm.weight", "layers.attention.q_norm.weight", "same"),
    _one(_LAYER + "self_attn.k_norm.weight", "layers.attention.k_norm.weight", "same"),
    _one(_LAYER + "post_attention_layernorm.weight", "layers.attention_norm.weight", "same"),
    _one(_LAYER + "post_feedforward_layernorm.weight", "layers.mlp_norm.weight", "same"),
    _one("model.norm.weight", "final_norm.weight", "same"),
)


@dataclass(frozen=True)
class Architecture:
    """A transformers class: its table, and the choices of `ModelConfig` that it stands for."""

    class_name: str
    model_type: str
    rows: tuple[Row, ...]
    choices: tuple[tuple[str, Any], ...]


_PLAIN = (
    ("bias", False),
    ("parallel_residual", False),
    ("mlp", "swiglu"),
    ("position", "rope"),
    ("rope_fraction", 1.0),
    ("rope_scaling", "none"),
    ("n_experts", 0),
)
ARCHITECTURES = (
    Architecture(
        "OlmoForCausalLM",
        "olmo",
        _COMMON,
        (
            ("norm", "layer_nonparametric"),
            ("norm_eps", 1e-5),  # fixed inside transformers' OlmoLayerNorm
            ("norm_place", "pre"),
            ("qk_norm", False),
            ("init", "mitchell"),
            *_PLAIN,
        ),
    ),
    Architecture(
        "Olmo2ForCausalLM",
        "olmo2",
        _COMMON + _OLMO2,
        (
            ("norm", "rms"),
            ("norm_place", "post"),
            ("qk_norm", True),
            ("clip_qkv", None),
            ("init", "normal"),
            *_PLAIN,
        ),
    ),
)


def architecture_of(config: ModelConfig) -> Architecture:
    """The transformers class that computes what `config` says. UserError when there is none."""
    faults = []
    for architecture in ARCHITECTURES:
        differs = [
            f"{field} = {getattr(config, field)!r} (it has {value!r})"
            for field, value in architecture.choices
            if field != "init" and getattr(config, field) != value
        ]
        if any(config.windows):
            differs.append(f"window_pattern = {config.window_pattern} (it has none)")
        if not differs:
            return architecture
        faults.append(f"{architecture.class_name}: {', '.join(differs)}")
    raise UserError(f"no transformers class computes this model; {'; '.join(faults)}")


def rows_of(config: ModelConfig, architecture: Architecture) -> list[Row]:
    """The table's rows that this model has."""
    return rows_for(config, architecture.rows)


def to_hf_config(
    config: ModelConfig, dtype: str, eos_token_id: int | None, pad_token_id: int | None
) -> dict[str, Any]:
    """config.json. `vocab_size` is the embedding's rows, as in the released checkpoints."""
    architecture = architecture_of(config)
    out: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": config.rows,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        # transformers 4 reads rope_theta, 5 reads rope_parameters.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.head_width * config.n_heads != config.d_model:
        raise UserError(
            f"head_dim = {config.head_width}: {architecture.class_name} can only have "
            f"d_model / n_heads = {config.d_model / config.n_heads:g}"
        )
    if config.norm == "rms":
        out["rms_norm_eps"] = config.norm_eps
    else:
        out["clip_qkv"] = config.clip_qkv
    return out


def from_hf_config(
    hf: dict[str, Any], vocab_size: int | None = None
) -> tuple[ModelConfig, Architecture]:
    """The model of a config.json. `vocab_size` is the tokenizer's, where there is one."""
    by_type = {a.model_type: a for a in ARCHITECTURES}
    kind = hf.get("model_type")
    if kind not in by_type:
        raise UserError(
            f"model_type = {kind!r} in config.json: this version reads {', '.join(by_type)}"
        )
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rope
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise UserError(f"config.json scales RoPE ({scaling}): this version reads plain RoPE only")
    if hf.get("attention_bias"):
        raise UserError("config.json has attention_bias: no OLMo has biases")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act = {hf['hidden_act']!r} in config.json: OLMo's is 'silu'")
    architecture = by_type[kind]
    fields = dict(architecture.choices)
    if kind == "olmo2":
        fields["norm_eps"] = hf.get("rms_norm_eps", 1e-5)  # the transformers class's default
    else:
        fields["clip_qkv"] = hf.get("clip_qkv")
    try:
        config = ModelConfig(
            vocab_size=min(vocab_size or hf["vocab_size"], hf["vocab_size"]),
            embedding_rows=hf["vocab_size"],
            d_model=hf["hidden_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"],
            n_kv_heads=hf.get("num_key_value_heads"),
            mlp_width=hf["intermediate_size"],
            context_length=hf["max_position_embeddings"],
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 1e4)),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            init_std=hf.get("initializer_range", 0.02),
            **fields,
        )
    except KeyError as missing:
        raise UserError(f"config.json lacks {missing}, which {kind} models have") from None
    except ValueError as error:
        raise UserError(f"config.json: {' '.join(str(error).split())}") from None
    return config, architecture
