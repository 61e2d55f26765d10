"""config.json of transformers, both ways, by the tables of hf.py."""

from typing import Any

from olmo_jax.convert.hf import ARCHITECTURES, Architecture, architecture_of
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig

_MISSING = object()
# Scaled RoPE: their field, ours, and what is taken where theirs is missing.
_SCALING = {
    "linear": (("factor", "rope_factor", _MISSING),),
    "llama3": (
        ("factor", "rope_factor", _MISSING),
        ("original_max_position_embeddings", "rope_original_context", None),
        ("low_freq_factor", "rope_low_freq_factor", _MISSING),
        ("high_freq_factor", "rope_high_freq_factor", _MISSING),
    ),
    "yarn": (
        ("factor", "rope_factor", _MISSING),
        ("original_max_position_embeddings", "rope_original_context", None),
        ("beta_fast", "rope_beta_fast", 32.0),
        ("beta_slow", "rope_beta_slow", 1.0),
        ("attention_factor", "rope_attention_factor", None),
    ),
}
_KNOWN_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def to_hf_config(
    config: ModelConfig, dtype: str, eos_token_id: int | None, pad_token_id: int | None
) -> dict[str, Any]:
    """config.json. `vocab_size` is the embedding's rows, as in the released checkpoints. UserError
    when no transformers class computes this model."""
    architecture = architecture_of(config)
    out: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": config.rows,
    }
    for theirs, ours in architecture.fields.items():
        value = getattr(config, ours)
        if value is None:
            value = {"n_kv_heads": config.kv_heads, "head_dim": config.head_width}.get(ours)
        _put(out, theirs, value)
    for theirs, value in architecture.fixed.items():
        _put(out, theirs, value)
    if architecture.model_type != "mpt":
        act = next(a for a, mlp in architecture.activations.items() if mlp == config.mlp)
        out |= {"hidden_act": act, "attention_dropout": 0.0}
    return out | {
        **_written_rope(config, architecture),
        **(_written_windows(config) if architecture.windows else {}),
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def from_hf_config(
    hf: dict[str, Any], vocab_size: int | None = None
) -> tuple[ModelConfig, Architecture]:
    """The model of a config.json. `vocab_size` is the tokenizer's, where there is one. UserError
    names the field that this program does not compute."""
    try:
        return _from_hf_config(hf, vocab_size)
    except (TypeError, ValueError, AttributeError, KeyError, StopIteration) as error:
        raise UserError(
            f"config.json: a field is not what transformers writes ({type(error).__name__}: "
            f"{' '.join(str(error).split())})"
        ) from None


def _from_hf_config(hf: dict[str, Any], vocab_size: int | None) -> tuple[ModelConfig, Architecture]:
    by_type = {a.model_type: a for a in ARCHITECTURES}
    kind = hf.get("model_type")
    if kind == "olmo_hybrid":
        raise UserError(
            "model_type = 'olmo_hybrid' in config.json: OLMo Hybrid has recurrent layers (gated "
            "delta nets), which this program does not have"
        )
    if kind not in by_type:
        raise UserError(
            f"model_type = {kind!r} in config.json: this version reads {', '.join(by_type)}"
        )
    architecture = by_type[kind]
    for theirs, value in architecture.fixed.items():
        given = _get(hf, theirs, value)
        if given != value:
            raise UserError(
                f"{theirs} = {given!r} in config.json: of {kind} models this program computes only "
                f"{theirs} = {value!r}"
            )
    fields: dict[str, Any] = dict(architecture.choices)
    for theirs, ours in architecture.fields.items():
        value = _get(hf, theirs, architecture.defaults.get(theirs, _MISSING))
        if value is _MISSING:
            raise UserError(f"config.json lacks {theirs!r}, which {kind} models have")
        fields[ours] = value
    sizes = {"vocab_size": hf.get("vocab_size"), **fields}
    for name in ("vocab_size", "d_model", "n_layers", "context_length"):
        if not isinstance(sizes[name], int):
            raise UserError(f"config.json: {name} = {sizes[name]!r} is no whole number")
    if "mlp_width" not in fields:
        fields["mlp_width"] = 4 * fields["d_model"]
    act = hf.get("hidden_act", next(iter(architecture.activations)))
    if act not in architecture.activations:
        allowed = ", ".join(map(repr, architecture.activations))
        raise UserError(f"hidden_act = {act!r} in config.json: {kind} models have {allowed} here")
    fields["mlp"] = architecture.activations[act]
    fields |= _read_rope(hf, architecture, fields["context_length"])
    if architecture.windows:
        fields["window_pattern"] = _read_windows(hf, fields["n_layers"])
    config = ModelConfig(
        vocab_size=min(vocab_size or hf["vocab_size"], hf["vocab_size"]),
        embedding_rows=hf["vocab_size"],
        **fields,
    )
    return config, architecture


def _get(hf: dict[str, Any], name: str, default: Any) -> Any:
    """A field, or a field of an object, or the default where either is missing."""
    node: Any = hf
    for key in name.split("."):
        node = node.get(key, _MISSING) if isinstance(node, dict) else _MISSING
    return default if node is _MISSING else node


def _put(out: dict[str, Any], name: str, value: Any) -> None:
    first, _, rest = name.partition(".")
    if rest:
        _put(out.setdefault(first, {}), rest, value)
    else:
        out[first] = value


def _written_rope(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """RoPE as both read it: transformers 5 rope_parameters, 4 rope_theta and rope_scaling."""
    if architecture.rope == "none":
        return {}
    plain = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling} | {
            theirs: getattr(config, ours)
            for theirs, ours, _ in _SCALING[config.rope_scaling]
            if getattr(config, ours) is not None
        }
    full = plain | (scaling or {})
    if architecture.rope == "neox":
        share = {"rotary_emb_base": config.rope_theta, "rotary_pct": config.rope_fraction}
        full["partial_rotary_factor"] = config.rope_fraction
        return {"rope_parameters": full, "rope_scaling": scaling} | share
    if architecture.rope == "by layer type":
        full = {_FULL: full, _SLIDING: plain}
    return {
        "rope_theta": config.rope_theta,
        "rope_parameters": full,
        "rope_scaling": scaling,
    }


def _read_rope(hf: dict[str, Any], architecture: Architecture, context: int) -> dict[str, Any]:
    """Our RoPE fields, from either version's."""
    if architecture.rope == "none":
        return {}
    neox = architecture.rope == "neox"
    parameters = hf.get("rope_parameters") or {}
    theta = hf.get("rotary_emb_base" if neox else "rope_theta")
    if architecture.windows:
        theta = 5e5 if theta is None else theta  # the class's default
        if parameters.get("rope_type", "default") != "default":
            raise UserError(
                f"rope_parameters = {parameters} in config.json: {architecture.model_type} models "
                f"have them by layer type, {_FULL} and {_SLIDING}"
            )
        sliding = parameters.get(_SLIDING) or {}
        parameters = parameters.get(_FULL) or {}
        same = sliding.get("rope_theta", theta) == parameters.get("rope_theta", theta)
        if sliding.get("rope_type", "default") != "default" or not same:
            raise UserError(
                f"rope_parameters.{_SLIDING} = {sliding} in config.json: layers with a window have "
                "plain RoPE here, of the others' rope_theta"
            )
    scaling = hf.get("rope_scaling") or {}
    both = parameters | scaling
    if "type" in scaling and "rope_type" not in scaling:
        both["rope_type"] = scaling["type"]
    kind = both.get("rope_type", both.get("type")) or "default"
    fields = {"rope_theta": both.get("rope_theta", 1e4 if theta is None else theta)}
    if neox:
        fields["rope_fraction"] = both.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    elif both.get("partial_rotary_factor") not in (None, 1):
        raise UserError(
            f"partial_rotary_factor = {both['partial_rotary_factor']} in config.json: "
            f"{architecture.model_type} models rotate whole heads here"
        )
    if kind == "default":
        return fields
    if kind not in _SCALING:
        raise UserError(
            f"rope_type = {kind!r} in config.json: this program has default, {', '.join(_SCALING)}"
        )
    known = _KNOWN_ROPE | {theirs for theirs, _, _ in _SCALING[kind]}
    for name in sorted(set(both) - known):
        if both[name] is not None and not (name == "truncate" and both[name] is True):
            raise UserError(f"{name} = {both[name]!r} of {kind} RoPE in config.json: not supported")
    fields["rope_scaling"] = kind
    for theirs, ours, default in _SCALING[kind]:
        value = both.get(theirs)
        value = default if value is None else value
        if value is _MISSING:
            raise UserError(f"config.json lacks {theirs!r} of its {kind} RoPE")
        if value is None and ours == "rope_original_context":
            value = context  # as transformers does
        fields[ours] = value
    return fields


def _written_windows(config: ModelConfig) -> dict[str, Any]:
    return {
        "sliding_window": max(config.windows),
        "layer_types": [_SLIDING if window else _FULL for window in config.windows],
    }


def _read_windows(hf: dict[str, Any], n_layers: int) -> tuple[int, ...]:
    """The shortest pattern that gives every layer its window."""
    types = hf.get("layer_types")
    if types is None:  # the class's default
        types = [_FULL if i % 4 == 3 else _SLIDING for i in range(n_layers)]
    window = hf.get("sliding_window", 4096)
    odd = sorted({t for t in types if t not in (_FULL, _SLIDING)})
    if odd or len(types) != n_layers:
        raise UserError(
            f"layer_types in config.json: has {len(types)} entries {odd or ''} for {n_layers} "
            f"layers; allowed are {_FULL} and {_SLIDING}"
        )
    windows = tuple((window or 0) if t == _SLIDING else 0 for t in types)
    periods = (p for p in range(1, n_layers + 1) if n_layers % p == 0)
    return next(windows[:p] for p in periods if windows[:p] * (n_layers // p) == windows)
