"""A look inside a model at work on one text: losses, alternatives, activations, attention norms.

The layers are walked one by one, each compiled once for its kind, so that the model itself knows
nothing of being watched.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from olmo_jax.convert.load import load, load_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.files import replacing, write_error
from olmo_jax.model.rope import rope_tables
from olmo_jax.model.transformer import Transformer
from olmo_jax.ops.attention import AttentionMask, alibi_slopes

STREAM = ("embed", "layers.*", "final_norm")
"""The activations that are kept unless others are named: the residual stream, and its end."""


@dataclass(frozen=True)
class Inspection:
    """What was seen at the T tokens of a text. Losses and log-probabilities are in nats."""

    ids_T: np.ndarray
    pieces: list[str]
    """Each token as text; its id in brackets where there is no tokenizer."""
    losses_T: np.ndarray
    """-log p of each token given those before it; NaN for the first, which nothing predicts."""
    entropies_T: np.ndarray
    """Of the model's distribution after each token."""
    top_ids_TK: np.ndarray
    """The K likeliest tokens *after* each token, the likeliest first: what stood to choose at
    token t is row t - 1."""
    top_log_probs_TK: np.ndarray
    top_pieces: dict[int, str]
    """The text of every token among the likeliest."""
    attention_norms_LHT: np.ndarray
    """The length of what each head writes: of its context times its rows of the output projection,
    before a norm or a bias."""
    activations: dict[str, np.ndarray] = field(default_factory=dict)
    """(T, width) of each module that was asked for."""

    @property
    def loss(self) -> float:
        """The mean over the tokens that have one; NaN for a text of one token."""
        return float(np.mean(self.losses_T[1:])) if len(self.ids_T) > 1 else float("nan")

    def save(self, path: str | Path) -> None:
        """An .npz of every array, activations under their own names. Raises UserError."""
        arrays: dict[str, Any] = {
            "ids": self.ids_T,
            "pieces": np.array(self.pieces),
            "losses": self.losses_T,
            "entropies": self.entropies_T,
            "top_ids": self.top_ids_TK,
            "top_log_probs": self.top_log_probs_TK,
            "attention_norms": self.attention_norms_LHT,
        }
        try:
            with replacing(Path(path)) as file:
                np.savez_compressed(file, **(arrays | self.activations))
        except OSError as error:
            raise write_error(Path(path), error) from None


def inspect(
    model: Transformer | str | Path,
    text: str | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    top: int = 5,
    activations: Sequence[str] = STREAM,
) -> Inspection:
    """What a model does at each token of a text (or of ids): see Inspection.

    `model` is a model, or a path that `load` takes, whose own tokenizer is used unless one is
    given. `activations` are names with `*` for any one part: `embed`, `layers.0` (the residual
    stream after a layer), `layers.*.attention`, `layers.*.mlp.down`, …, `final_norm`; a module's
    name gives its output, as it was computed.

    Raises UserError for a text without tokens or longer than the model's context, ids outside the
    vocabulary, a name that no module has, and text without a tokenizer.
    """
    if not isinstance(model, Transformer):
        tokenizer = tokenizer or load_tokenizer(model)[0]
        model = load(model)
    ids_T = _ids(text, tokenizer)
    config = model.config
    if not 0 < len(ids_T) <= config.context_length:
        raise UserError(
            f"the text has {len(ids_T):,} tokens: give at least 1, and at most the model's context "
            f"of {config.context_length:,}"
        )
    if ids_T.min() < 0 or ids_T.max() >= config.rows:
        raise UserError(f"the text has ids outside the vocabulary of {config.rows:,}")
    if not 0 < top <= config.rows:
        raise UserError(f"top = {top}: it must be at least 1 and at most {config.rows:,}")
    x_BTD, norms_LHT, kept = _walk(model, ids_T, _matcher(activations))
    _check_names(activations, kept)
    found = _predictions(model, x_BTD, jnp.asarray(ids_T), top)
    losses_T, entropies_T, top_ids_TK, top_log_probs_TK = map(np.asarray, found)
    return Inspection(
        ids_T,
        _pieces(ids_T, tokenizer),
        losses_T,
        entropies_T,
        top_ids_TK,
        top_log_probs_TK,
        {i: _pieces([i], tokenizer)[0] or f"[{i}]" for i in np.unique(top_ids_TK).tolist()},
        norms_LHT,
        {name: np.asarray(a, np.float32) for name, a in kept.items() if a is not None},
    )


def _walk(model: Transformer, ids_T, wanted) -> tuple[jax.Array, np.ndarray, dict]:
    """The final norm's output, the heads' norms, and by name every activation (None: not wanted)"""
    config = model.config
    ropes = rope_tables(config, jnp.arange(len(ids_T))[None])
    slopes_H = alibi_slopes(config.n_heads) if config.position == "alibi" else None
    graph, stacked = nnx.split(model.layers)
    modules = [(path, m) for path, m in nnx.iter_modules(model.layers) if callable(m)]
    names = [".".join(map(str, path)) for path, _ in modules]
    x_BTD = model.embedded(jnp.asarray(ids_T)[None])
    kept, norms = {"embed": x_BTD[0] if wanted("embed") else None}, []
    for i, window in enumerate(config.windows):
        full = {name: f"layers.{i}.{name}".rstrip(".") for name in sorted(names)}
        want = frozenset(name for name in names if wanted(full[name]))
        weights = jax.tree.map(lambda a, i=i: a[i], stacked)
        mask = AttentionMask(window, None, slopes_H)
        x_BTD, norms_HT, seen = _layer(graph, want, weights, x_BTD, ropes.of(window), mask)
        norms.append(np.asarray(norms_HT))
        kept |= {full[name]: seen.get(name) for name in full}
    x_BTD = model.final_norm(x_BTD)
    kept["final_norm"] = x_BTD[0] if wanted("final_norm") else None
    return x_BTD, np.stack(norms), kept


class _WithInput(nnx.Module):
    """A projection that keeps what comes in, too: the captured output of `seen`."""

    def __init__(self, linear):
        self.linear = linear

    def __call__(self, x):
        return self.linear(self.seen(x))

    def seen(self, x):
        return x


@partial(jax.jit, static_argnums=(0, 1))
def _layer(graph, want: frozenset[str], weights, x_BTD, rope, mask: AttentionMask):
    """One layer's output, the lengths of what its heads write, and the outputs of the modules that
    are wanted, "" being the layer itself."""
    block = nnx.merge(graph, weights)
    projection = block.attention.out
    block.attention.out = _WithInput(projection)
    run = nnx.capture(block, nnx.Intermediate, method_outputs=nnx.Intermediate)
    (x_BTD, _, _), state = run(x_BTD, rope, mask)
    seen = nnx.to_pure_dict(state)
    context_THC = seen["attention"]["out"]["seen"][0][0]
    context_THC = context_THC.reshape(len(context_THC), -1, block.attention.head_width)
    W_HCD = projection.weight[...].reshape(*context_THC.shape[1:], -1).astype(context_THC.dtype)
    norms = [jnp.linalg.norm(context_THC[:, h] @ W_CD, axis=-1) for h, W_CD in enumerate(W_HCD)]

    def output(name: str) -> jax.Array:
        """Of a module that may return more than its output, which comes first."""
        module = reduce(lambda at, part: at[part], filter(None, name.split(".")), seen)
        return jax.tree.leaves(module["__call__"])[0][0]

    return x_BTD, jnp.stack(norms), {name: output(name) for name in want}


@partial(jax.jit, static_argnums=3)
def _predictions(model: Transformer, x_BTD, ids_T, top: int):
    """Losses (T,), entropies (T,), and the `top` likeliest ids with their log-probabilities."""
    # Padding rows of the table are no tokens, but the model gives them probability all the same.
    log_probs_TV = jax.nn.log_softmax(model.logits(x_BTD[0]))
    losses = -jnp.take_along_axis(log_probs_TV[:-1], ids_T[1:, None], axis=1)[:, 0]
    entropies_T = -jnp.sum(jnp.exp(log_probs_TV) * log_probs_TV, axis=-1)
    top_log_probs_TK, top_ids_TK = jax.lax.top_k(log_probs_TV, top)
    return jnp.append(jnp.nan, losses), entropies_T, top_ids_TK, top_log_probs_TK


def _matcher(patterns: Sequence[str]):
    """Whether a name is one of the patterns, in which * is any one part between dots."""
    pattern = "|".join(re.escape(p).replace(r"\*", "[^.]+") for p in patterns) or "(?!)"
    return re.compile(pattern).fullmatch


def _check_names(patterns: Sequence[str], kept: dict) -> None:
    for pattern in patterns:
        if not any(map(_matcher([pattern]), kept)):
            names = [name for name in kept if not re.match(r"layers\.[1-9]", name)]
            raise UserError(f"no module is named {pattern!r}: there are {', '.join(names)}")


def _ids(text: str | Sequence[int], tokenizer: Tokenizer | None) -> np.ndarray:
    if isinstance(text, str):
        if tokenizer is None:
            raise UserError("a text needs a tokenizer: give one, or the text as ids")
        text = tokenizer.encode(text, add_special_tokens=False).ids
    return np.asarray(text, np.int32).reshape(-1)


def _pieces(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    """Each token as text: what it adds to the text of the one before it, where that can be said (a
    token may end inside a character, and some tokenizers drop a space at the start)."""
    if tokenizer is None:
        return [f"[{i}]" for i in ids]

    def decode(*ids: int) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    pieces: list[str] = []
    before: list[int] = []
    for i in map(int, ids):
        alone, after, both = decode(i), decode(*before), decode(*before, i)
        pieces.append(both[len(after) :] if both.startswith(after) and before else alone)
        before = [i]
    return pieces
