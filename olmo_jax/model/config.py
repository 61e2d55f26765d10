"""`ModelConfig`: an architecture as a flat set of choices; it can describe every released family.

A family is never named in the model's code: OLMo 2 *is* "RMSNorm on the outputs, q/k norm, theta
5e5".
"""

from typing import Literal

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

_MAX_LAYERS = 10_000


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class ModelConfig:
    """One decoder-only transformer. The defaults are OLMo 2's choices."""

    vocab_size: int
    """Entries of the tokenizer; every token id is below it."""
    embedding_rows: int | None = None
    """Rows of the embedding table and columns of the head; None rounds vocab_size up to 128."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int | None = None
    """Key/value heads; None is one for each query head (no grouped-query attention)."""
    head_dim: int | None = None
    """Width of a head; None is d_model / n_heads."""
    mlp_width: int
    """Hidden width of the MLP (of one expert, where there are experts)."""
    context_length: int = 4096
    """Longest sequence that the model was made for, in tokens; written into exports."""

    norm: Literal["rms", "layer", "layer_nonparametric"] = "rms"
    """RMSNorm, LayerNorm, or LayerNorm without weight and bias (OLMo 1)."""
    norm_eps: float = 1e-6
    """Added to the variance (or mean square) inside the norm."""
    norm_place: Literal["pre", "post"] = "post"
    """"pre": the norm is on a sublayer's input; "post": on its output, before the residual add."""
    qk_norm: bool = True
    """Norm on q and on k over the full projected width, before the split into heads and RoPE."""
    clip_qkv: float | None = None
    """Clamp q, k and v to [-clip, clip] after projection (OLMo 1 0424: 8.0); None is off."""
    bias: bool = False
    """Biases in every projection but the head, and in LayerNorm (Pythia)."""
    parallel_residual: bool = False
    """x + attention(norm(x)) + mlp(norm(x)) instead of one after the other (Pythia)."""
    mlp: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Gated SiLU, or a plain MLP with the exact or the tanh-approximated GELU."""

    position: Literal["rope", "alibi"] = "rope"
    """Rotary positions in half-split layout, or ALiBi biases (MPT)."""
    rope_theta: float = 5e5
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated (Pythia: 0.25)."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How layers with full attention stretch rotary frequencies beyond the original context; those
    with a window keep the plain ones."""
    rope_factor: float = 1.0
    """Stretch of the context (OLMo 3's long-context stage: 8)."""
    rope_original_context: int | None = None
    """Context before the stretch, in tokens."""
    rope_beta_fast: float = 32.0
    """YaRN: rotations in the original context above which a frequency is left alone."""
    rope_beta_slow: float = 1.0
    """YaRN: rotations below which a frequency is divided by the factor."""
    rope_low_freq_factor: float = 1.0
    """LLaMA 3 scaling: wavelengths above context / this are divided by the factor."""
    rope_high_freq_factor: float = 4.0
    """LLaMA 3 scaling: wavelengths below context / this are left alone."""
    rope_attention_factor: float | None = None
    """YaRN: factor on cos and sin; None is 0.1 ln(factor) + 1."""
    window_pattern: tuple[int, ...] = (0,)
    """Attention window of each layer, in tokens and counting the token itself, repeated over the
    layers; 0 is full attention (OLMo 3: (4096, 4096, 4096, 0))."""

    n_experts: int = 0
    """Experts a layer; 0 is a dense MLP (OLMoE: 64)."""
    experts_per_token: int = 0
    """Experts that each token visits (OLMoE: 8)."""
    normalize_expert_weights: bool = False
    """Divide the chosen experts' router probabilities by their sum."""
    load_balancing_loss: float = 0.0
    """Weight of the experts' load-balancing loss, which is 1 when balanced (OLMoE: 0.01;
    transformers' is experts_per_token times as large)."""
    router_z_loss: float = 0.0
    """Weight of the router's z-loss, the mean of log(Z)² (OLMoE: 1.25e-4; its file says 0.001,
    and the program that trained it divided by experts_per_token too)."""

    tie_embeddings: bool = False
    """The head is the transposed embedding table."""
    init: Literal["normal", "mitchell", "small", "scaled"] = "normal"
    """Truncated normal at 3 sigma: "normal" with init_std everywhere (OLMo 2, 3), "mitchell" with
    1/sqrt(fan-in), scaled down with depth on the outputs (OLMo 1). Plain normal: "small" with
    sqrt(2 / (5 d_model)), outputs 2 / (n_layers sqrt(d_model)) (Pythia); "scaled" with init_std,
    outputs init_std / sqrt(2 n_layers) (Pythia 6.9B and 12B)."""
    init_std: float = 0.02
    """Standard deviation of init = "normal" and "scaled"."""
    embedding_init_std: float | None = None
    """Standard deviation of the embedding table alone; None follows `init`."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; weights, norms, RoPE and loss stay float32."""
    remat: Literal["none", "full", "projections"] = "none"
    """What the backward pass recomputes: nothing; each block whole; or all but q, k, v, the
    attention's context and output, and the MLP's gate and output (up, too, is recomputed; the best
    published TPU recipe's choice)."""

    @model_validator(mode="after")
    def _check(self):
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "mlp_width", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least 1")
        for name in ("n_kv_heads", "head_dim", "embedding_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value}: it must be at least 1, or None")
        if self.n_layers > _MAX_LAYERS:  # each costs time before the first weight is made
            raise ValueError(f"n_layers = {self.n_layers}: at most {_MAX_LAYERS:,}")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model = {self.d_model} does not divide by n_heads = {self.n_heads}: "
                "change one of them, or give head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} does not divide by n_kv_heads = {self.kv_heads}"
            )
        if self.rows < self.vocab_size:
            raise ValueError(
                f"embedding_rows = {self.rows} is less than vocab_size = {self.vocab_size}"
            )
        if self.position == "rope" and self.head_width * self.rope_fraction % 2:
            raise ValueError(
                f"head_dim * rope_fraction = {self.head_width * self.rope_fraction:g}: "
                "the rotated width must be even"
            )
        self._check_rope_scaling()
        if not self.window_pattern or any(w < 0 for w in self.window_pattern):
            raise ValueError(
                f"window_pattern = {self.window_pattern}: give one window or more, each >= 0"
            )
        if self.n_layers % len(self.window_pattern):
            raise ValueError(
                f"window_pattern has {len(self.window_pattern)} entries, which do not divide "
                f"n_layers = {self.n_layers}: give one entry for each layer"
            )
        if self.n_experts and not 0 < self.experts_per_token <= self.n_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token}: it must be between 1 and "
                f"n_experts = {self.n_experts}"
            )
        if self.n_experts and (self.mlp != "swiglu" or self.bias):
            raise ValueError(
                f'n_experts = {self.n_experts} needs mlp = "swiglu" and bias = False: experts have '
                "no other kind"
            )
        return self

    def _check_rope_scaling(self):
        scaled = self.rope_scaling != "none"
        if scaled and self.position != "rope":
            raise ValueError(f'rope_scaling = "{self.rope_scaling}" needs position = "rope"')
        if self.rope_factor != 1 and not scaled:
            raise ValueError(
                f"rope_factor = {self.rope_factor:g} without rope_scaling: give linear, llama3 or "
                "yarn"
            )
        if self.rope_factor < 1:
            raise ValueError(f"rope_factor = {self.rope_factor:g}: it must be at least 1")
        if self.rope_scaling in ("llama3", "yarn") and not self.rope_original_context:
            raise ValueError(f'rope_scaling = "{self.rope_scaling}" needs rope_original_context')
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(
                f"rope_high_freq_factor = {self.rope_high_freq_factor:g}: it must exceed "
                f"rope_low_freq_factor = {self.rope_low_freq_factor:g}"
            )

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        return self.embedding_rows or -(-self.vocab_size // 128) * 128

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """The attention window of every layer, 0 for full attention."""
        return self.window_pattern * (self.n_layers // len(self.window_pattern))

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return int(self.head_width * self.rope_fraction)

    def parameter_count(self, embedding: bool = True, active: bool = False) -> int:
        """Number of weights, by formula; a test holds it to the built model's shapes.

        embedding=False leaves out the embedding table (but keeps the head, also where it is tied);
        active=True counts only the experts that one token visits.
        """
        d, f, c = self.d_model, self.mlp_width, self.head_width
        heads, kv = self.n_heads * c, self.kv_heads * c
        norm = {"rms": 1, "layer": 1 + self.bias, "layer_nonparametric": 0}[self.norm]
        matrices = 3 if self.mlp == "swiglu" else 2
        mlps = (self.experts_per_token if active else self.n_experts) or 1
        block = d * (heads + 2 * kv) + heads * d + mlps * matrices * d * f + 2 * norm * d
        block += self.n_experts * d  # the router
        if self.qk_norm:
            block += norm * (heads + kv)
        if self.bias:
            block += heads + 2 * kv + d + mlps * ((matrices - 1) * f + d)
        tables = self.rows * d * (embedding + (not self.tie_embeddings or not embedding))
        return self.n_layers * block + tables + norm * d
