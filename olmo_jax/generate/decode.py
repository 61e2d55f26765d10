"""One prompt, token by token, with a key/value cache of static shape.

The prompt is padded to a bucket and the cache to another, so that few shapes are ever compiled;
decoding runs several tokens a dispatch, and one dispatch ahead of what is handed out.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmo_jax.errors import UserError
from olmo_jax.generate.sampling import Sampling, sample
from olmo_jax.model.rope import rope_tables
from olmo_jax.model.transformer import Transformer
from olmo_jax.ops.attention import AttentionMask, alibi_slopes

_BUCKET = 64
_TOKENS_A_DISPATCH = 8


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """The ids that follow a prompt, as they come: at most max_tokens, ending before eos_id.

    Greedy without a `sampling`.

    Raises UserError for an empty prompt, an id outside the vocabulary, or more tokens than the
    model's context holds.
    """
    config, n = model.config, len(prompt_ids)
    if not n:
        raise UserError("the prompt has no tokens: give at least one (an eos begins a document)")
    if max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}: it must be at least 1")
    if max(prompt_ids) >= config.rows or min(prompt_ids) < 0:
        raise UserError(f"the prompt has ids outside the vocabulary of {config.rows}")
    if n + max_tokens > config.context_length:
        raise UserError(
            f"a prompt of {n} tokens and max_tokens = {max_tokens} exceed the model's context of "
            f"{config.context_length}: give a shorter prompt or at most "
            f"{max(0, config.context_length - n)} tokens"
        )
    return _generate(model, list(prompt_ids), max_tokens, sampling or Sampling(), seed, eos_id)


def _generate(model, prompt_ids, max_tokens, sampling, seed, eos_id) -> Iterator[int]:
    n = len(prompt_ids)
    padded = np.zeros((1, _bucket(n)), np.int32)
    padded[0, :n] = prompt_ids
    # A dispatch may decode a few tokens more than are handed out.
    length = _bucket(n + max_tokens + _TOKENS_A_DISPATCH)
    decoder = unstacked(model)
    token, cache, key = _prefill(decoder, padded, n, jax.random.key(seed), length, sampling)
    waiting, at = [token[None]], n
    left = max_tokens
    while left:
        if at < n + max_tokens - 1:
            tokens, token, cache, key = _decode(decoder, token, at, cache, key, sampling)
            waiting.append(tokens)
            at += _TOKENS_A_DISPATCH
        for i in np.asarray(waiting.pop(0))[:left].tolist():
            if i == eos_id:
                return
            yield i
            left -= 1


def _bucket(n: int) -> int:
    return -(-n // _BUCKET) * _BUCKET


class Decoder(nnx.Module):
    """A model whose layers lie apart: a slice of a stack would be copied at every token."""

    def __init__(self, model: Transformer):
        self.embed, self.final_norm = model.embed, model.final_norm
        graph, stacked = nnx.split(model.layers)
        self.layers = nnx.List(
            nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked))
            for i in range(model.config.n_layers)
        )
        self.head = nnx.Param(model.head_DV())
        self.config = model.config

    def __call__(self, tokens_BT, cache, offset):
        """The final norm's output and the cache, with tokens at positions offset, offset + 1, …"""
        config = self.config
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] + offset
        ropes = rope_tables(config, positions_BT)
        slopes_H = alibi_slopes(config.n_heads) if config.position == "alibi" else None
        x_BTD = self.embed.weight[...][tokens_BT].astype(config.compute_dtype)
        out = []
        for layer, window, kv in zip(self.layers, config.windows, cache, strict=True):
            mask = AttentionMask(window, None, slopes_H, offset)
            x_BTD, kv, _ = layer(x_BTD, ropes.of(window), mask, kv)
            out.append(kv)
        return self.final_norm(x_BTD), out

    def logits_V(self, x_D):
        """float32 logits after one position."""
        head_DV = self.head[...].astype(x_D.dtype)
        return jnp.dot(x_D, head_DV, preferred_element_type=jnp.float32)


@jax.jit
def unstacked(model: Transformer) -> Decoder:
    """The model, ready for decoding."""
    return Decoder(model)


@partial(jax.jit, static_argnums=(4, 5))
def _prefill(decoder: Decoder, padded_BT, n, key, length: int, sampling: Sampling):
    """Fills a cache of `length` positions from the prompt's n tokens, and samples the first."""
    config = decoder.config
    shape = (1, config.kv_heads, length, config.head_width)
    empty = jnp.zeros(shape, config.compute_dtype)
    cache = [(empty, empty)] * config.n_layers
    # What the padding writes lies after the prompt: never seen, and overwritten by decoding.
    x_BTD, cache = decoder(padded_BT, cache, 0)
    key, use = jax.random.split(key)
    return sample(decoder.logits_V(x_BTD[0, n - 1]), use, sampling), cache, key


@partial(jax.jit, static_argnums=5, donate_argnums=3)
def _decode(decoder: Decoder, token, at, cache, key, sampling: Sampling):
    """The next tokens after `token`, which is at position `at`."""

    def one(carry, _):
        token, at, cache, key = carry
        x_BTD, cache = decoder(token[None, None], cache, at)
        key, use = jax.random.split(key)
        token = sample(decoder.logits_V(x_BTD[0, 0]), use, sampling)
        return (token, at + 1, cache, key), token

    carry, tokens = jax.lax.scan(one, (token, at, cache, key), None, length=_TOKENS_A_DISPATCH)
    token, _, cache, key = carry
    return tokens, token, cache, key
