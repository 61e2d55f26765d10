"""Makes olmo3_yarn.npz: a tiny OLMo 3 with windows and YaRN, and its logits by OLMo-core.

Run in an environment with ai2-olmo-core 3.0.0 (and torch on CPU):

    python tests/oracles/make_olmo3_yarn.py

Sequences are longer than the window and the original context; YaRN's ramp crosses the head.
"""

from pathlib import Path

import numpy as np
import torch
from olmo_core.nn.attention import SlidingWindowAttentionConfig
from olmo_core.nn.rope import YaRNRoPEScalingConfig
from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

WINDOWS = SlidingWindowAttentionConfig(
    pattern=[16, 16, 16, -1],
    force_full_attention_on_first_layer=False,
    force_full_attention_on_last_layer=True,
)
config = TransformerConfig.llama_like(
    d_model=32,
    vocab_size=64,
    n_layers=4,
    n_heads=2,
    n_kv_heads=1,
    qk_norm=True,
    rope_theta=100,
    layer_norm_eps=1e-6,
    hidden_size_multiple_of=16,
    block_name=TransformerBlockType.reordered_norm,
    sliding_window=WINDOWS,
).with_rope_scaling(YaRNRoPEScalingConfig(factor=8.0, beta_fast=4, beta_slow=1, old_context_len=64))
model = config.build(init_device="cpu").eval()
generator = torch.Generator().manual_seed(7)
tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 120)))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.copy_(1 + noise if "norm" in name else noise)
    logits = model(tokens)
weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
np.savez_compressed(
    Path(__file__).with_name("olmo3_yarn.npz"),
    tokens=tokens.numpy().astype(np.uint8),
    logits=logits.float().numpy(),
    **weights,
)
