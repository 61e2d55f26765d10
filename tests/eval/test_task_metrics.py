"""Each metric equals its definition in a line or two."""

import math

import numpy as np
import pytest

from olmo_jax.errors import UserError
from olmo_jax.eval.formats import Question
from olmo_jax.eval.metrics import Answered, compute, f1

TEXTS = (" no", " perhaps so", " näive", " a much longer answer than all others")


def items(n: int = 200) -> list[Answered]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(n):
        k = int(rng.integers(2, 5))
        question = Question(("Q",) * k, TEXTS[:k], int(rng.integers(k)), ("A",) * k)
        scale = np.array([len(t) for t in TEXTS[:k]])
        plain = -rng.uniform(0.5, 2, k) * scale
        out.append(Answered(question, -rng.uniform(0.5, 2, k) * scale, plain))
    return out


def share_right(scores) -> float:
    return float(np.mean([np.argmax(s) == item.question.label for s, item in scores]))


def test_every_metric():
    found, all_items = compute("len_norm", items()), items()

    def texts(item):
        return item.question.continuations

    raw = [(i.logprobs, i) for i in all_items]
    chars = [(i.logprobs / np.array([len(t) for t in texts(i)]), i) for i in all_items]
    n_bytes = [(i.logprobs / np.array([len(t.encode()) for t in texts(i)]), i) for i in all_items]
    pmi = [(np.subtract(i.logprobs, i.plain_logprobs), i) for i in all_items]
    assert next(iter(found)) == "len_norm"
    assert found["acc"] == share_right(raw)
    assert found["len_norm"] == share_right(chars)
    assert found["per_byte"] == share_right(n_bytes)
    assert found["ce_loss"] == pytest.approx(-np.mean([s[i.question.label] for s, i in chars]))
    assert found["bpb"] == pytest.approx(
        -np.mean([s[i.question.label] / math.log(2) for s, i in n_bytes])
    )
    soft = [np.exp(s[i.question.label]) / np.exp(s).sum() for s, i in chars]
    assert found["soft"] == pytest.approx(np.mean(soft))
    assert found["soft_log"] == pytest.approx(np.mean(np.log(soft)))
    assert compute("pmi_dc", all_items)["pmi_dc"] == share_right(pmi)
    assert len({found["acc"], found["len_norm"], share_right(pmi)}) == 3  # they can be told apart
    gold = [Answered(i.question.gold(), [i.logprobs[i.question.label]]) for i in all_items]
    assert compute("bpb", gold) == {k: pytest.approx(found[k]) for k in ("bpb", "ce_loss")}
    assert list(compute("ce_loss", gold)) == ["ce_loss", "bpb"]


def test_f1():
    from collections import Counter

    labels, answers = [0, 0, 1, 2, 0, 1], [0, 1, 0, 2, 0, 1]
    n = Counter(zip(labels, answers, strict=True))
    precision, recall = n[0, 0] / answers.count(0), n[0, 0] / labels.count(0)
    assert f1(labels, answers) == pytest.approx(2 * precision * recall / (precision + recall))
    assert f1([0, 1], [1, 0]) == 0
    all_items = items()
    expected = f1(
        [i.question.label for i in all_items], [int(np.argmax(i.logprobs)) for i in all_items]
    )
    assert compute("f1", all_items)["f1"] == expected


def test_as_published_has_the_known_faults():
    all_items = items()
    chars = [
        (i.logprobs / np.array([len(t) - 1 for t in i.question.continuations]), i)
        for i in all_items
    ]
    found = compute("len_norm", all_items, as_published=True)
    right = compute("len_norm", all_items)
    assert found["len_norm_v1"] == found["len_norm_v2"] == right["len_norm"]
    assert share_right(chars) != found["len_norm_v1"]  # what v1 should have been
    assert found["ce_loss_v1"] == pytest.approx(-np.mean([s[i.question.label] for s, i in chars]))
    assert found["ce_loss_v2"] == right["ce_loss"] and found["bpb_v2"] == right["bpb"]
    pmi = compute("pmi_dc", all_items, as_published=True)
    ratio = [(np.divide(i.logprobs, i.plain_logprobs), i) for i in all_items]
    assert pmi["pmi_dc_v1"] == pmi["pmi_dc_v2"] == share_right(ratio)
    assert pmi["pmi_dc_v2"] != compute("pmi_dc", all_items)["pmi_dc"]
    assert set(compute("f1", all_items, as_published=True)) == {"f1_v1", "f1_v2"}
    with pytest.raises(UserError, match="without questions"):
        compute("acc", [])
