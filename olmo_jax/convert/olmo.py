"""The original OLMo program's names and configuration (ai2-olmo: config.yaml), both directions.

Covers what its version 0.6.0 can say and our model can compute: OLMo 1, OLMo 1 0424 and OLMo 2 in
every variant. Files are olmo_files.py's.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

from olmo_jax.convert.table import Layout, Row, rows_for
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig

_BLOCK = "transformer.blocks.{layer}."
_FSDP = "_fsdp_wrapped_module."
_GROUPED = re.compile(r"transformer\.block_groups\.(\d+)\.(\d+)\.(.+)")
_SHARED_NORM = re.compile(r"(transformer\.blocks\.\d+\.)norm\.(weight|bias)")

# A config.yaml may leave fields out: these are the program's defaults, not OLMo's values.
_DEFAULTS: dict[str, Any] = {
    "d_model": 768,
    "n_heads": 12,
    "n_kv_heads": None,
    "multi_query_attention": None,
    "n_layers": 12,
    "mlp_ratio": 4,
    "mlp_hidden_size": None,
    "clip_qkv": None,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "rope": False,
    "rope_theta": 10_000,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "embedding_layer_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-5,
    "norm_after": False,
    "include_bias": True,
    "bias_for_layer_norm": None,
    "scale_logits": False,
    "max_sequence_length": 1024,
    "vocab_size": 50257,
    "embedding_size": 50304,
    "weight_tying": True,
    "init_fn": "normal",
    "init_std": 0.02,
    "emb_init_std": None,
}
_INIT = {"mitchell": "mitchell", "full_megatron": "scaled"}
_MLP = {"swiglu": "swiglu", "gelu": "gelu"}


def olmo_rows(config: ModelConfig) -> list[Row]:
    """The table of a model that config.yaml can say (see `to_olmo_config`)."""
    hidden = ("up", "gate") if config.mlp == "swiglu" else ("up",)
    qkv = tuple(f"layers.attention.{x}" for x in "qkv")
    linear = [
        (_BLOCK + "att_proj", qkv),
        (_BLOCK + "attn_out", ("layers.attention.out",)),
        (_BLOCK + "ff_proj", tuple(f"layers.mlp.{x}" for x in hidden)),
        (_BLOCK + "ff_out", ("layers.mlp.down",)),
    ]
    norms = [
        (_BLOCK + "q_norm", "layers.attention.q_norm"),
        (_BLOCK + "k_norm", "layers.attention.k_norm"),
        (_BLOCK + "attn_norm", "layers.attention_norm"),
        (_BLOCK + "ff_norm", "layers.mlp_norm"),
        ("transformer.ln_f", "final_norm"),
    ]
    rows = [Row("transformer.wte.weight", ("embed.weight",), "same")]
    for theirs, ours in linear:
        layout: Layout = "rows" if len(ours) > 1 else "transposed"
        rows.append(Row(f"{theirs}.weight", tuple(f"{x}.weight" for x in ours), layout))
        layout = "rows" if len(ours) > 1 else "same"
        rows.append(Row(f"{theirs}.bias", tuple(f"{x}.bias" for x in ours), layout))
    for theirs, norm in norms:
        rows += [
            Row(f"{theirs}.{kind}", (f"{norm}.{kind}",), "same") for kind in ("weight", "bias")
        ]
    rows.append(Row("transformer.ff_out.weight", ("lm_head.weight",)))
    return rows_for(config, rows)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Today's name of every tensor, to its name in a file that may be older or grouped otherwise.

    FSDP's prefix falls away; block I.J of groups of g is block I g + J; the one norm of the very
    first checkpoints stands for both of a block's.
    """
    names = {name.replace(_FSDP, ""): name for name in names}
    grouped = {name: match for name in names if (match := _GROUPED.fullmatch(name))}
    size = 1 + max((int(match[2]) for match in grouped.values()), default=0)
    out = {}
    for name, old in names.items():
        if match := grouped.get(name):
            name = f"transformer.blocks.{int(match[1]) * size + int(match[2])}.{match[3]}"
        if match := _SHARED_NORM.fullmatch(name):
            out[f"{match[1]}attn_norm.{match[2]}"] = old
            name = f"{match[1]}ff_norm.{match[2]}"
        out[name] = old
    return out


def from_olmo_config(given: dict[str, Any], where: str) -> ModelConfig:
    """The model of config.yaml's `model`. UserError names the field that ours cannot say."""
    try:
        return _from_olmo_config(given, where)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def _from_olmo_config(given: dict[str, Any], where: str) -> ModelConfig:
    c = _DEFAULTS | {k: v for k, v in given.items() if k in _DEFAULTS}
    moe = sorted(k for k in given if k.startswith("moe_"))
    if moe or c["block_type"] != "sequential":
        raise UserError(
            f"{where}: block_type = {c['block_type']!r}{', ' + moe[0] if moe else ''}: this "
            "version reads 'sequential' blocks (an OLMoE is read from its transformers folder)"
        )
    for field in ("scale_logits", "embedding_layer_norm"):
        if c[field]:
            raise UserError(f"{where}: {field} = {c[field]}: this model has no such thing")
    if bool(c["rope"]) == bool(c["alibi"]):
        raise UserError(
            f"{where}: rope = {c['rope']}, alibi = {c['alibi']}: this version reads one of the two"
        )
    heads = c["n_heads"]
    if c["alibi"] and (heads & (heads - 1) or float(c["alibi_bias_max"]) != 8):
        raise UserError(
            f"{where}: alibi with n_heads = {heads} and alibi_bias_max = {c['alibi_bias_max']}: "
            "this version reads a power of two and 8.0"
        )
    if c["activation_type"] not in _MLP:
        raise UserError(
            f"{where}: activation_type = {c['activation_type']!r}: this version reads "
            f"{', '.join(_MLP)}"
        )
    bias, affine, norm = c["include_bias"], c["layer_norm_with_affine"], _norm(c, where)
    norm_bias = bias if c["bias_for_layer_norm"] is None else c["bias_for_layer_norm"]
    if affine and norm_bias != (bias and norm == "layer"):
        raise UserError(
            f"{where}: bias_for_layer_norm = {norm_bias} with include_bias = {bias} and "
            f"layer_norm_type = {c['layer_norm_type']!r}: this model has biases in both or "
            "neither, and none in RMSNorm"
        )
    if bias and not c["weight_tying"]:
        raise UserError(
            f"{where}: include_bias without weight_tying: this model's head has no bias"
        )
    width = int(c["mlp_hidden_size"] or c["mlp_ratio"] * c["d_model"])
    fields: dict[str, Any] = dict(
        vocab_size=c["vocab_size"],
        embedding_rows=c["embedding_size"] or c["vocab_size"],
        d_model=c["d_model"],
        n_layers=c["n_layers"],
        n_heads=heads,
        n_kv_heads=_kv_heads(c),
        mlp_width=width // 2 if c["activation_type"] == "swiglu" else width,
        context_length=c["max_sequence_length"],
        norm=norm,
        norm_eps=float(c["layer_norm_eps"]),  # YAML 1.1 reads 1e-5 as text
        norm_place="post" if c["norm_after"] else "pre",
        qk_norm=bool(c["attention_layer_norm"]),
        clip_qkv=None if c["clip_qkv"] is None else float(c["clip_qkv"]),
        bias=bool(bias),
        mlp=_MLP[c["activation_type"]],
        position="alibi" if c["alibi"] else "rope",
        rope_theta=float(c["rope_theta"]),
        tie_embeddings=bool(c["weight_tying"]),
        init=_INIT.get(c["init_fn"], "normal"),
        init_std=float(c["init_std"]),
        embedding_init_std=None if c["emb_init_std"] is None else float(c["emb_init_std"]),
    )
    return ModelConfig(**fields)


def _norm(c: dict[str, Any], where: str) -> str:
    affine, kind = bool(c["layer_norm_with_affine"]), c["layer_norm_type"]
    if c["attention_layer_norm"] and bool(c["attention_layer_norm_with_affine"]) != affine:
        raise UserError(
            f"{where}: attention_layer_norm_with_affine = {not affine} with layer_norm_with_affine "
            f"= {affine}: all norms of this model are of one kind"
        )
    if kind == "rms" and affine:
        return "rms"
    if kind in ("default", "low_precision"):  # they differ in rounding only
        return "layer" if affine else "layer_nonparametric"
    raise UserError(
        f"{where}: layer_norm_type = {kind!r} with layer_norm_with_affine = {affine}: this model "
        "has rms with it, and default with or without"
    )


def _kv_heads(c: dict[str, Any]) -> int | None:
    if c["n_kv_heads"] is None and c["multi_query_attention"]:
        return 1
    return c["n_kv_heads"]


def to_olmo_config(config: ModelConfig) -> dict[str, Any]:
    """config.yaml's `model`, but for the special tokens. UserError when ai2-olmo has no such model.

    The fields that say how to run a model (dropout, kernels) are written as OLMo's released ones.
    """
    limits: list[tuple[str, Any]] = [
        ("parallel_residual", False),
        ("rope_fraction", 1.0),
        ("rope_scaling", "none"),
        ("n_experts", 0),
        ("head_width", config.d_model // config.n_heads),
    ]
    differs = [
        f"{field} = {getattr(config, field)!r} (it has {value!r})"
        for field, value in limits
        if getattr(config, field) != value
    ]
    if any(config.windows):
        differs.append(f"window_pattern = {config.window_pattern} (it has none)")
    if config.mlp not in _MLP.values():
        differs.append(f"mlp = {config.mlp!r} (it has {', '.join(_MLP)})")
    if config.bias and not config.tie_embeddings:
        differs.append("bias without tie_embeddings (its head then has a bias too)")
    if config.position == "alibi" and config.n_heads & (config.n_heads - 1):
        differs.append(f"n_heads = {config.n_heads} with ALiBi (it has other slopes)")
    if config.rope_theta != math.floor(config.rope_theta):
        differs.append(f"rope_theta = {config.rope_theta} (it has whole numbers)")
    if differs:
        raise UserError(
            f"the original OLMo program cannot compute this model: {'; '.join(differs)}"
        )
    affine = config.norm != "layer_nonparametric"
    width = config.mlp_width * (2 if config.mlp == "swiglu" else 1)
    return {
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "clip_qkv": config.clip_qkv,
        "n_layers": config.n_layers,
        "mlp_hidden_size": width,
        "activation_type": next(k for k, v in _MLP.items() if v == config.mlp),
        "block_type": "sequential",
        "block_group_size": 1,
        "alibi": config.position == "alibi",
        "alibi_bias_max": 8.0,
        "rope": config.position == "rope",
        "rope_full_precision": True,
        "rope_theta": int(config.rope_theta),
        "flash_attention": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "multi_query_attention": None,
        "attention_layer_norm": config.qk_norm,
        "attention_layer_norm_with_affine": affine,
        "embedding_layer_norm": False,
        "layer_norm_type": "rms" if config.norm == "rms" else "default",
        "layer_norm_with_affine": affine,
        "layer_norm_eps": config.norm_eps,
        "norm_after": config.norm_place == "post",
        "max_sequence_length": config.context_length,
        "include_bias": config.bias,
        "bias_for_layer_norm": config.bias and config.norm == "layer",
        "scale_logits": False,
        "vocab_size": config.vocab_size,
        "embedding_size": config.rows,
        "weight_tying": config.tie_embeddings,
        "init_device": "cpu",
        "init_fn": {v: k for k, v in _INIT.items()}.get(config.init, "normal"),
        "init_std": config.init_std,
        "init_cutoff_factor": 3.0 if config.init in ("normal", "mitchell") else None,
        "emb_init_std": config.embedding_init_std,
        "precision": "amp_bf16",
    }
