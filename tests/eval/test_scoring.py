"""Packed and shared requests score as each does alone, whatever the model sees of its context."""

import jax
import numpy as np
import pytest

from olmo_jax.errors import UserError
from olmo_jax.eval import packing
from olmo_jax.eval.scoring import Pair, Scorer
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import init

SHAPE = dict(vocab_size=97, d_model=32, n_layers=2, n_heads=4, mlp_width=64, context_length=64)
KINDS = {
    "window and full": dict(window_pattern=(5, 0)),
    "alibi": dict(position="alibi", norm="layer", norm_place="pre", qk_norm=False),
    "experts": dict(n_experts=4, experts_per_token=2),
}


def requests(seed: int = 0) -> list[Pair]:
    """Questions after common examples, several answers to each; lone ones; one that is too long."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return tuple(rng.integers(1, 97, rng.integers(low, high)).tolist())

    examples, pairs = ids(20, 21), []
    for _ in range(6):
        context = examples + ids(2, 8)
        pairs += [Pair(context, ids(1, 6)) for _ in range(4)]
        pairs += [Pair(context, (i,)) for i in range(3, 9)]
    pairs += [Pair(ids(1, 30), ids(1, 20)) for _ in range(10)]
    pairs += [pairs[0], Pair(ids(80, 81), ids(4, 5)), Pair(ids(1, 2), ids(64, 65))]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def alone(forward, pair: Pair) -> tuple[float, bool]:
    tokens = (*pair.context, *pair.continuation)[-65:]
    n = len(tokens) - 1
    row = np.zeros((1, 64), np.int32)  # what lies behind is not seen, and one length compiles once
    row[0, :n] = tokens[:-1]
    logits = np.asarray(forward(row), np.float64)[0, n - len(pair.continuation) : n]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(logprobs, np.array(pair.continuation)[:, None], 1).sum()
    return float(own), bool((logits.argmax(-1) == pair.continuation).all())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_alone(kind):
    model = init(ModelConfig(**SHAPE | KINDS[kind]), seed=1)
    pairs = requests()
    # The likeliest answer to something, so that not every answer is an unlikely one.
    forward = jax.jit(lambda tokens: model(tokens))
    row = np.zeros((1, 64), np.int32)
    row[0, : len(pairs[0].context)] = pairs[0].context
    assert len(pairs[0].context) <= 64
    best = int(np.asarray(forward(row))[0, len(pairs[0].context) - 1].argmax())
    pairs.append(Pair(pairs[0].context, (best,)))
    done = []
    found = dict(Scorer(model, tokens_per_batch=256)(pairs, lambda n, of: done.append((n, of))))
    assert sorted(found) == list(range(len(pairs)))
    assert done[-1] == (len(pairs), len(pairs))
    for i, pair in enumerate(pairs):
        logprob, greedy = alone(forward, pair)
        assert found[i].logprob == pytest.approx(logprob, abs=1e-4)
        assert found[i].is_greedy == greedy
        assert len(found[i].logprobs) == len(pair.continuation)
    assert found[len(pairs) - 1].is_greedy


def test_what_requests_share_is_computed_once():
    pairs = requests()
    rows = [packing.Request(np.array((*c, *a)[-65:]), len(a)) for c, a in pairs]
    packed = list(packing.batches(rows, 256, 1, 100.0))
    assert len(packed) < len(pairs) / 4
    tokens = sum(int((batch.last_reader_BT > np.arange(64)).sum()) for batch in packed)
    assert tokens < sum(len(row.tokens) - 1 for row in rows) / 2
    again = list(packing.batches(rows, 256, 1, 100.0))
    for a, b in zip(packed, again, strict=True):
        np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)


def test_refusals():
    scorer = Scorer(init(ModelConfig(**SHAPE)))
    for pair, words in (
        (Pair((), (1,)), "context has no tokens"),
        (Pair((1,), ()), "continuation has no tokens"),
        (Pair((1,), (1,) * 65), "exceeds the model's 64"),
        (Pair((1,), (1000,)), "outside the model's vocabulary"),
    ):
        with pytest.raises(UserError, match=words):
            scorer([pair])
    assert list(scorer([])) == []
