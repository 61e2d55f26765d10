"""OLMo-core's names, and the model of its config.json; what we write of one is core_config.py's.

Covers OLMo 2, OLMo 3, LLaMA-like models and its mixtures of experts (OLMoE, FlexOlmo).
"""

import math
from typing import Any

from olmo_jax.convert.table import Row, rows_for
from olmo_jax.errors import UserError, validation_faults
from olmo_jax.model.config import ModelConfig

_BLOCK = "blocks.{layer}."
_ATTENTION, _MLP, _MOE = "attention.", "feed_forward.", "feed_forward_moe."
_LINEAR = (
    (_BLOCK + _ATTENTION + "w_q", "layers.attention.q"),
    (_BLOCK + _ATTENTION + "w_k", "layers.attention.k"),
    (_BLOCK + _ATTENTION + "w_v", "layers.attention.v"),
    (_BLOCK + _ATTENTION + "w_out", "layers.attention.out"),
    (_BLOCK + _MLP + "w1", "layers.mlp.gate"),
    (_BLOCK + _MLP + "w3", "layers.mlp.up"),
    (_BLOCK + _MLP + "w2", "layers.mlp.down"),
)
_NORMS = (
    (_BLOCK + _ATTENTION + "q_norm", "layers.attention.q_norm"),
    (_BLOCK + _ATTENTION + "k_norm", "layers.attention.k_norm"),
    (_BLOCK + "attention_norm", "layers.attention_norm"),
    (_BLOCK + "feed_forward_norm", "layers.mlp_norm"),
    ("lm_head.norm", "final_norm"),
)
TIED = Row("lm_head.w_out.weight", ("embed.weight",), "same")
"""A tied head is in the file a second time."""

# How a model is run, not what it computes.
_IGNORED = {"_CLASS_", "type", "dtype", "dropout", "use_flash", "backend", "full_precision"}
_IGNORED |= {"use_recompute_qkv_prep", "mxfp8_save_qkv_for_backward", "jitter_eps"}
_IGNORED |= {"lb_loss_granularity", "loss_implementation", "uniform_expert_assignment"}
_RMS = ("rms", "fused_rms", "cute_rms")
_BLOCKS = {
    "default": ("pre", False),
    "reordered_norm": ("post", False),
    "moe": ("pre", True),
    "moe_reordered_norm": ("post", True),
}


def core_rows(config: ModelConfig, dropless: bool = True) -> list[Row]:
    """The table, without `TIED`. The experts' gate and up lie (out, in) in the dropless kind, else
    (in, out); the router's matrix is flat."""
    rows = [Row("embeddings.weight", ("embed.weight",), "same")]
    for theirs, ours in _LINEAR if not config.n_experts else _LINEAR[:4]:
        rows.append(Row(f"{theirs}.weight", (f"{ours}.weight",)))
        rows.append(Row(f"{theirs}.bias", (f"{ours}.bias",), "same"))
    for theirs, ours in _NORMS:
        rows += [Row(f"{theirs}.{x}", (f"{ours}.{x}",), "same") for x in ("weight", "bias")]
    if config.n_experts:
        experts = _BLOCK + _MOE + "experts.mlp."
        rows.append(Row(_BLOCK + _MOE + "router.weight", ("layers.mlp.router.weight",), "flat"))
        for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            swapped = dropless and ours != "down"
            layout: Any = "merged_transposed" if swapped else "merged"
            rows.append(Row(experts + theirs, (f"layers.mlp.{ours}.weight",), layout))
    rows.append(Row("lm_head.w_out.weight", ("lm_head.weight",)))
    return rows_for(config, rows)


def is_core_config(content: dict[str, Any]) -> bool:
    """Whether this config.json is OLMo-core's."""
    model = content.get("model")
    return isinstance(model, dict) and "block" in model and "lm_head" in model


def from_core_config(content: dict[str, Any], where: str) -> tuple[ModelConfig, bool]:
    """The model of config.json, and whether its experts (if any) are of the dropless kind.
    UserError names the field that ours cannot say."""
    reader = _Reader(where)
    try:
        return reader.model(content)
    except UserError:
        raise
    except KeyError as missing:
        raise UserError(f"{where}: lacks {missing}, which OLMo-core's models have") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {'; '.join(validation_faults(error))}") from None


class _Reader:
    def __init__(self, where: str):
        self.where = where

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}: this model has no such thing")

    def only(self, part: dict[str, Any], name: str, known: str, default: Any = "default") -> None:
        """Refuses fields that are set and not known, and another `name` than `default`."""
        for key, value in part.items():
            if key not in _IGNORED | set(known.split()) | {"name"} and value not in (None, False):
                raise self.refuse(f"{name}.{key} = {value!r}")
        if default is not None and part.get("name", default) != default:
            raise self.refuse(f"{name}.name = {part['name']!r}")

    def model(self, content: dict[str, Any]) -> tuple[ModelConfig, bool]:
        model = content["model"]
        known = "d_model vocab_size n_layers block block_overrides lm_head init_method init_seed "
        known += "init_std embedding_init_std tie_word_embeddings freeze_params compile dp_config "
        known += "tp_config ac_config float8_config"
        self.only(model, "model", known, None)
        if model.get("name", "default") not in ("default", "moe"):
            raise self.refuse(f"model.name = {model['name']!r}")
        n_layers, overrides = model["n_layers"], model.get("block_overrides") or {}
        layers = [
            self.block(overrides.get(str(i), model["block"]), i, n_layers) for i in range(n_layers)
        ]
        same = layers[0][0]
        for i, (own, _, _) in enumerate(layers):
            if own != same:
                differs = sorted(k for k in same if own[k] != same[k])
                raise self.refuse(f"layer {i} has another {differs[0]} than layer 0")
        windows = tuple(window for _, window, _ in layers)
        scaling = next((s for _, window, s in layers if not window), {})
        for i, (_, window, found) in enumerate(layers):
            if found != ({} if window else scaling):
                raise self.refuse(
                    f"layer {i} scales RoPE otherwise than all layers with full attention, or "
                    "has a window and scales it"
                )
        head = model["lm_head"]
        self.only(head, "lm_head", "layer_norm bias")
        if head.get("bias", True):
            raise self.refuse("lm_head.bias = True (which an absent one means)")
        fields: dict[str, Any] = {k: v for k, v in same.items() if k not in ("norms", "dropless")}
        norm = self.norm(head["layer_norm"], "lm_head.layer_norm")
        fields |= {"norm": norm[0], "norm_eps": norm[1]}
        if any(norm != other for other in same["norms"]):
            raise self.refuse(f"norms of several kinds, {norm} and {same['norms']}")
        if norm[2] != (fields["bias"] and norm[0] == "layer"):
            raise self.refuse(f"layer_norm.bias = {norm[2]} with other biases {fields['bias']}")
        periods = (p for p in range(1, n_layers + 1) if n_layers % p == 0)
        dataset = content.get("dataset") or {}
        tokenizer = dataset.get("tokenizer") or {}
        module = content.get("train_module") or {}
        context = module.get("max_sequence_length") or dataset.get("sequence_length")
        config = ModelConfig(
            vocab_size=min(tokenizer.get("vocab_size", model["vocab_size"]), model["vocab_size"]),
            embedding_rows=model["vocab_size"],
            d_model=model["d_model"],
            n_layers=n_layers,
            context_length=context or 4096,
            window_pattern=next(
                windows[:p] for p in periods if windows[:p] * (n_layers // p) == windows
            ),
            tie_embeddings=bool(model.get("tie_word_embeddings")),
            init_std=model.get("init_std", 0.02),
            embedding_init_std=model.get("embedding_init_std"),
            **fields,
            **scaling,
        )
        return config, same["dropless"]

    def block(self, block: dict[str, Any], i: int, n_layers: int) -> tuple[dict, int, dict]:
        """What all layers must share, this layer's window, and its RoPE scaling."""
        known = "sequence_mixer attention layer_norm feed_forward feed_forward_moe"
        self.only(block, "block", known, None)
        if block.get("name", "default") not in _BLOCKS:
            raise self.refuse(f"block.name = {block['name']!r}")
        place, has_experts = _BLOCKS[block.get("name", "default")]
        attention = block.get("sequence_mixer") or block["attention"]  # 2.x: attention
        known = "n_heads n_kv_heads head_dim bias rope clip_qkv qk_norm sliding_window"
        self.only(attention, "attention", known)
        if attention.get("type", "attention") != "attention":
            raise self.refuse(f"sequence_mixer.type = {attention['type']!r}")
        rope = attention.get("rope")
        if not rope:
            raise self.refuse("attention without rope")
        self.only(rope, "rope", "theta scaling partial_rotary_factor")
        theta, scaling = self.scaling(rope)
        norms = [self.norm(block["layer_norm"], "block.layer_norm")]
        if attention.get("qk_norm"):
            norms.append(self.norm(attention["qk_norm"], "attention.qk_norm"))
        bias, dropless = attention.get("bias", True), True
        if has_experts:
            mlp, dropless = self.experts(block["feed_forward_moe"], n_layers)
        else:
            dense = block["feed_forward"]
            self.only(dense, "feed_forward", "hidden_size bias activation")
            if dense.get("activation", "silu") != "silu":
                raise self.refuse(f"feed_forward.activation = {dense['activation']!r}")
            if dense.get("bias", True) != bias:
                raise self.refuse("feed_forward.bias other than attention.bias")
            mlp = {"mlp_width": dense["hidden_size"]}
        fields = {
            "n_heads": attention["n_heads"],
            "n_kv_heads": attention.get("n_kv_heads"),
            "head_dim": attention.get("head_dim"),
            "norm_place": place,
            "qk_norm": bool(attention.get("qk_norm")),
            "clip_qkv": attention.get("clip_qkv"),
            "bias": bool(bias),
            "rope_theta": theta,
            "rope_fraction": rope.get("partial_rotary_factor", 1.0),
            "norms": norms,
            "dropless": dropless,
        }
        return fields | mlp, _window(attention.get("sliding_window"), i, n_layers), scaling

    def norm(self, norm: dict[str, Any], name: str) -> tuple[str, float, bool]:
        """Kind, eps, and whether it has a bias."""
        self.only(norm, name, "eps elementwise_affine bias", None)
        kind, affine = norm.get("name", "default"), norm.get("elementwise_affine", True)
        bias = bool(affine and norm.get("bias", True))
        eps = norm.get("eps", 1e-5)
        if kind in _RMS and affine:
            return "rms", eps, bias
        if kind == "default":
            return ("layer" if affine else "layer_nonparametric"), eps, bias
        raise self.refuse(f"{name}.name = {kind!r} with elementwise_affine = {affine}")

    def scaling(self, rope: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """RoPE's theta, and the scaling's fields."""
        theta, scaling = float(rope["theta"]), rope.get("scaling")
        if not scaling:
            return theta, {}
        kind = str(scaling.get("_CLASS_", "")).rsplit(".", 1)[-1]
        if scaling.get("attention_rescale_factor", 1.0) != 1.0 and kind != "YaRNRoPEScalingConfig":
            raise self.refuse("rope.scaling.attention_rescale_factor other than 1")
        factor, original = scaling.get("factor"), scaling.get("old_context_len", 8192)
        if kind == "ABFRoPEScalingConfig":
            return float(scaling.get("new_theta", 8_000_000)), {}
        if kind == "PIRoPEScalingConfig":
            return theta, {"rope_scaling": "linear", "rope_factor": factor or 2.0}
        if kind == "YaRNRoPEScalingConfig":
            return theta, {
                "rope_scaling": "yarn",
                "rope_factor": factor or 8.0,
                "rope_original_context": original,
                "rope_beta_fast": scaling.get("beta_fast", 32),
                "rope_beta_slow": scaling.get("beta_slow", 1),
            }
        llama3 = {
            "rope_scaling": "llama3",
            "rope_factor": factor or 32.0,
            "rope_original_context": original,
        }
        if kind == "StepwiseRoPEScalingConfig":
            low = 1 / (1 - scaling.get("low_freq_proportion", 0.0))
            high = 1 / scaling.get("high_freq_proportion", 0.25)
        elif kind == "RoPEScalingConfig":  # 1.7 to 2.1
            low = scaling.get("low_freq_factor", 1.0)
            high = scaling.get("high_freq_factor", 4.0)
        else:
            raise self.refuse(f"rope.scaling of class {kind!r}")
        return theta, llama3 | {"rope_low_freq_factor": low, "rope_high_freq_factor": high}

    def experts(self, moe: dict[str, Any], n_layers: int) -> tuple[dict[str, Any], bool]:
        """The experts' fields, and whether they are of the dropless kind."""
        known = "num_experts hidden_size capacity_factor router lb_loss_weight z_loss_weight "
        self.only(moe, "feed_forward_moe", known + "scale_loss_by_num_layers", None)
        kind, router = moe.get("name", "default"), moe["router"]
        if kind not in ("default", "dropless"):
            raise self.refuse(f"feed_forward_moe.name = {kind!r}")
        self.only(router, "router", "top_k normalize_expert_weights gating_function")
        if router.get("gating_function", "softmax") != "softmax":
            raise self.refuse(f"router.gating_function = {router['gating_function']!r}")
        if router.get("normalize_expert_weights") not in (None, 1.0):
            raise self.refuse(f"normalize_expert_weights = {router['normalize_expert_weights']}")
        # Ours are means over layers.
        times = 1 if moe.get("scale_loss_by_num_layers", True) else n_layers
        return {
            "mlp_width": moe["hidden_size"],
            "n_experts": moe["num_experts"],
            "experts_per_token": router.get("top_k", 1),
            "normalize_expert_weights": router.get("normalize_expert_weights") == 1.0,
            "load_balancing_loss": (moe.get("lb_loss_weight") or 0.0) * times,
            "router_z_loss": (moe.get("z_loss_weight") or 0.0) * times,
        }, kind == "dropless"


def _window(sliding: dict[str, Any] | None, i: int, n_layers: int) -> int:
    """Layer i's window, 0 for full attention."""
    if not sliding:
        return 0
    first = sliding.get("force_full_attention_on_first_layer", True)
    last = sliding.get("force_full_attention_on_last_layer", True)
    if (first and i == 0) or (last and i == n_layers - 1):
        return 0
    pattern = sliding["pattern"]
    return max(0, pattern[(i - first) % len(pattern)])  # -1 is full attention


def yarn_attention_factor(factor: float) -> float:
    """The one that OLMo-core computes (YaRN, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0
