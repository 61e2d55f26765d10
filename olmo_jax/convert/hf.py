"""transformers' architectures: their tensors' names, and which choices of ours each stands for.

Fields of config.json are hf_config.py's, bytes and files safetensors_io.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from olmo_jax.convert.table import Layout, Row, rows_for
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """A transformers class: one table for its weights, and one for its config.json."""

    class_name: str
    model_type: str
    rows: tuple[Row, ...]
    choices: Mapping[str, Any]
    """Fields of `ModelConfig` that every model of the class has in common. `init` only fills in
    what config.json does not tell."""
    fields: Mapping[str, str]
    """Their field (a.b: field b of the object a) and ours, equal in value."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the class takes for those of `fields` that a config.json lacks."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that change what is computed, with the only value that is computed here (which is the
    class's default too)."""
    rope: Literal["plain", "by layer type", "neox", "none"] = "plain"
    """How RoPE is written: one set of parameters, one for each type of layer (OLMo 3, with the
    windows), GPT-NeoX's names, or not at all."""
    activations: Mapping[str, str] = field(default_factory=lambda: {"silu": "swiglu"})
    """`hidden_act` and our `mlp`; the first of several names is the one that is written."""
    buffers: tuple[str, ...] = ()
    """Tensors that older versions of the class wrote and that hold nothing of the model."""

    @property
    def windows(self) -> bool:
        """Whether layers may have attention windows."""
        return self.rope == "by layer type"

    def differences(self, config: ModelConfig) -> list[str]:
        """What of `config` the class cannot compute, each as a phrase."""
        out = [
            f"{name} = {getattr(config, name)!r} (it has {value!r})"
            for name, value in self.choices.items()
            if name != "init" and getattr(config, name) != value
        ]
        widths = {window for window in config.windows if window}
        if len(widths) > self.windows:
            has = "one width of window" if self.windows else "none"
            out.append(f"window_pattern = {config.window_pattern} (it has {has})")
        ours = self.fields.values()
        if "n_kv_heads" not in ours and config.kv_heads != config.n_heads:
            out.append(f"n_kv_heads = {config.kv_heads} (it has as many as n_heads)")
        if "head_dim" not in ours and config.head_width * config.n_heads != config.d_model:
            usual = config.d_model / config.n_heads
            out.append(f"head_dim = {config.head_width} (it has d_model / n_heads = {usual:g})")
        if "mlp_width" not in ours and config.mlp_width != 4 * config.d_model:
            out.append(f"mlp_width = {config.mlp_width} (it has 4 d_model)")
        if "n_experts" in ours and not config.n_experts:
            out.append("n_experts = 0 (it has some)")
        if config.mlp not in self.activations.values():
            out.append(f"mlp = {config.mlp!r} (it has {' or '.join(self.activations.values())})")
        return out


def _one(theirs: str, ours: str, layout: Layout = "transposed") -> Row:
    return Row(theirs, (ours,), layout)


def _with_bias(theirs: str, ours: tuple[str, ...], layout: Layout = "transposed") -> list[Row]:
    """The rows of a projection and of its bias, names without their last part."""
    bias: Layout = "same" if layout == "transposed" else layout
    return [
        Row(f"{theirs}.{leaf}", tuple(f"{path}.{leaf}" for path in ours), how)
        for leaf, how in (("weight", layout), ("bias", bias))
    ]


def _norm(theirs: str, ours: str) -> list[Row]:
    return [_one(f"{theirs}.{leaf}", f"{ours}.{leaf}", "same") for leaf in ("weight", "bias")]


_QKV = ("layers.attention.q", "layers.attention.k", "layers.attention.v")
_QKV_WEIGHTS = tuple(f"{path}.weight" for path in _QKV)

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
_EXPERT = _LAYER + "mlp.experts.{expert}."
_EXPERTS = (
    *(row for row in _COMMON if ".mlp." not in row.theirs),
    _one(_LAYER + "mlp.gate.weight", "layers.mlp.router.weight"),
    _one(_EXPERT + "gate_proj.weight", "layers.mlp.gate.weight"),
    _one(_EXPERT + "up_proj.weight", "layers.mlp.up.weight"),
    _one(_EXPERT + "down_proj.weight", "layers.mlp.down.weight"),
)
_LLAMA_NORMS = (
    _one(_LAYER + "input_layernorm.weight", "layers.attention_norm.weight", "same"),
    _one(_LAYER + "post_attention_layernorm.weight", "layers.mlp_norm.weight", "same"),
    _one("model.norm.weight", "final_norm.weight", "same"),
)
_QK_NORMS = (
    _one(_LAYER + "self_attn.q_norm.weight", "layers.attention.q_norm.weight", "same"),
    _one(_LAYER + "self_attn.k_norm.weight", "layers.attention.k_norm.weight", "same"),
)
_OLMO2_NORMS = (
    *_QK_NORMS,
    _one(_LAYER + "post_attention_layernorm.weight", "layers.attention_norm.weight", "same"),
    _one(_LAYER + "post_feedforward_layernorm.weight", "layers.mlp_norm.weight", "same"),
    _one("model.norm.weight", "final_norm.weight", "same"),
)
_NEOX_LAYER = "gpt_neox.layers.{layer}."
_NEOX = (
    _one("gpt_neox.embed_in.weight", "embed.weight", "same"),
    *_with_bias(_NEOX_LAYER + "attention.query_key_value", _QKV, "heads"),
    *_with_bias(_NEOX_LAYER + "attention.dense", ("layers.attention.out",)),
    *_with_bias(_NEOX_LAYER + "mlp.dense_h_to_4h", ("layers.mlp.up",)),
    *_with_bias(_NEOX_LAYER + "mlp.dense_4h_to_h", ("layers.mlp.down",)),
    *_norm(_NEOX_LAYER + "input_layernorm", "layers.attention_norm"),
    *_norm(_NEOX_LAYER + "post_attention_layernorm", "layers.mlp_norm"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    _one("embed_out.weight", "lm_head.weight"),
)
_MPT_LAYER = "transformer.blocks.{layer}."
_MPT = (
    _one("transformer.wte.weight", "embed.weight", "same"),
    Row(_MPT_LAYER + "attn.Wqkv.weight", _QKV_WEIGHTS, "rows"),
    _one(_MPT_LAYER + "attn.out_proj.weight", "layers.attention.out.weight"),
    _one(_MPT_LAYER + "ffn.up_proj.weight", "layers.mlp.up.weight"),
    _one(_MPT_LAYER + "ffn.down_proj.weight", "layers.mlp.down.weight"),
    _one(_MPT_LAYER + "norm_1.weight", "layers.attention_norm.weight", "same"),
    _one(_MPT_LAYER + "norm_2.weight", "layers.mlp_norm.weight", "same"),
    _one("transformer.norm_f.weight", "final_norm.weight", "same"),
    _one("lm_head.weight", "lm_head.weight"),
)

_ROPE_NO_BIAS = dict(bias=False, parallel_residual=False, position="rope", rope_fraction=1.0)
_PLAIN = _ROPE_NO_BIAS | dict(n_experts=0)
_FLEX_CHOICES = _ROPE_NO_BIAS | dict(
    norm="rms", norm_place="post", qk_norm=True, clip_qkv=None, init="normal"
)
_OLMO2_CHOICES = _FLEX_CHOICES | dict(n_experts=0)
_SOME_EXPERTS = {
    # The same number, though transformers' loss is experts_per_token times ours: released files
    # hold the weight that the model was trained with, by the original's scale, which is ours.
    "router_aux_loss_coef": "load_balancing_loss",
    "num_experts": "n_experts",
    "num_experts_per_tok": "experts_per_token",
    "norm_topk_prob": "normalize_expert_weights",
}
_SIZES = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "context_length",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
_LLAMA_SIZES = _SIZES | {"num_key_value_heads": "n_kv_heads"}
_DEFAULTS = {"initializer_range": 0.02, "tie_word_embeddings": False, "num_key_value_heads": None}
_NO_BIAS = {"attention_bias": False}
_INV_FREQ = (_LAYER + "self_attn.rotary_emb.inv_freq",)

ARCHITECTURES = (
    Architecture(
        "OlmoForCausalLM",
        "olmo",
        _COMMON,
        _PLAIN
        | dict(
            norm="layer_nonparametric",
            norm_eps=1e-5,  # fixed inside transformers' OlmoLayerNorm
            norm_place="pre",
            qk_norm=False,
            init="mitchell",
        ),
        _LLAMA_SIZES | {"clip_qkv": "clip_qkv"},
        _DEFAULTS | {"clip_qkv": None},
        _NO_BIAS,
    ),
    Architecture(
        "Olmo2ForCausalLM",
        "olmo2",
        _COMMON + _OLMO2_NORMS,
        _OLMO2_CHOICES,
        _LLAMA_SIZES | {"rms_norm_eps": "norm_eps"},
        _DEFAULTS | {"rms_norm_eps": 1e-5},
        _NO_BIAS,
    ),
    Architecture(
        "Olmo3ForCausalLM",
        "olmo3",
        _COMMON + _OLMO2_NORMS,
        _OLMO2_CHOICES,
        _LLAMA_SIZES | {"rms_norm_eps": "norm_eps"},
        _DEFAULTS | {"rms_norm_eps": 1e-5},
        _NO_BIAS,
        rope="by layer type",
    ),
    Architecture(
        "OlmoeForCausalLM",
        "olmoe",
        _EXPERTS + _LLAMA_NORMS + _QK_NORMS,
        _ROPE_NO_BIAS
        | dict(norm="rms", norm_place="pre", qk_norm=True, clip_qkv=None, init="normal"),
        _LLAMA_SIZES | _SOME_EXPERTS | {"rms_norm_eps": "norm_eps"},
        _DEFAULTS
        | {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8}
        | {"router_aux_loss_coef": 0.01, "norm_topk_prob": False},
        # The class clips q and k after their norm, the original and ours before; no released model
        # clips.
        _NO_BIAS | {"clip_qkv": None},
    ),
    Architecture(
        "FlexOlmoForCausalLM",
        "flex_olmo",
        _EXPERTS + _OLMO2_NORMS,
        _FLEX_CHOICES,
        _LLAMA_SIZES | _SOME_EXPERTS | {"rms_norm_eps": "norm_eps"},
        _DEFAULTS
        | {"rms_norm_eps": 1e-6, "num_experts": 7, "num_experts_per_tok": 5}
        | {"router_aux_loss_coef": 0.01, "norm_topk_prob": False},
        _NO_BIAS,
    ),
    Architecture(
        "LlamaForCausalLM",
        "llama",
        _COMMON + _LLAMA_NORMS,
        _PLAIN | dict(norm="rms", norm_place="pre", qk_norm=False, clip_qkv=None, init="normal"),
        _LLAMA_SIZES | {"rms_norm_eps": "norm_eps", "head_dim": "head_dim"},
        _DEFAULTS | {"rms_norm_eps": 1e-6, "head_dim": None},
        _NO_BIAS | {"mlp_bias": False},
        buffers=_INV_FREQ,
    ),
    Architecture(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _NEOX,
        dict(
            norm="layer",
            norm_place="pre",
            qk_norm=False,
            clip_qkv=None,
            bias=True,
            position="rope",
            n_experts=0,
            init="small",
        ),
        _SIZES | {"layer_norm_eps": "norm_eps", "use_parallel_residual": "parallel_residual"},
        _DEFAULTS | {"layer_norm_eps": 1e-5, "use_parallel_residual": True},
        {"attention_bias": True},
        rope="neox",
        activations={
            "gelu": "gelu",
            "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
            "gelu_fast": "gelu_tanh",
        },
        buffers=tuple(
            _NEOX_LAYER + f"attention.{name}"
            for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        ),
    ),
    Architecture(
        "MptForCausalLM",
        "mpt",
        _MPT,
        dict(
            norm="layer",
            norm_place="pre",
            qk_norm=False,
            bias=False,
            parallel_residual=False,
            position="alibi",
            n_experts=0,
            init="normal",
        ),
        {
            "d_model": "d_model",
            "n_layers": "n_layers",
            "n_heads": "n_heads",
            "max_seq_len": "context_length",
            "initializer_range": "init_std",
            "tie_word_embeddings": "tie_embeddings",
            "layer_norm_epsilon": "norm_eps",
            "attn_config.clip_qkv": "clip_qkv",
        },
        {
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "layer_norm_epsilon": 1e-5,
            "attn_config.clip_qkv": None,
        },
        {
            "attn_config.alibi": True,
            "attn_config.alibi_bias_max": 8,
            "attn_config.attn_type": "multihead_attention",
            "attn_config.prefix_lm": False,
            "attn_config.qk_ln": False,
            "attn_config.softmax_scale": None,
            "expansion_ratio": 4,
            "logit_scale": None,
            "no_bias": True,
        },
        rope="none",
        activations={"gelu": "gelu"},
    ),
)


def architecture_of(config: ModelConfig) -> Architecture:
    """The transformers class that computes what `config` says. UserError when there is none."""
    differences = [(a, a.differences(config)) for a in ARCHITECTURES]
    for architecture, differs in differences:
        if not differs:
            return architecture
    nearest = sorted(differences, key=lambda item: len(item[1]))[:2]
    faults = "; ".join(f"{a.class_name}: {', '.join(differs)}" for a, differs in nearest)
    raise UserError(f"no transformers class computes this model; the nearest are {faults}")


def rows_of(config: ModelConfig, architecture: Architecture) -> list[Row]:
    """The table's rows that this model has."""
    return rows_for(config, architecture.rows)


def ignored_names(config: ModelConfig, architecture: Architecture) -> frozenset[str]:
    """Tensors that may be there and hold nothing of the model: buffers, and the tied head, which
    some programs write a second time."""
    names = {
        name.format(layer=layer)
        for name in architecture.buffers
        for layer in range(config.n_layers)
    }
    if config.tie_embeddings:
        names |= {row.theirs for row in architecture.rows if row.ours == ("lm_head.weight",)}
    return frozenset(names)
