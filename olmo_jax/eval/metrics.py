"""From log-likelihoods to the numbers that a task reports."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from olmo_jax.errors import UserError
from olmo_jax.eval.formats import Question

BITS = 1 / math.log(2)


class Answered(NamedTuple):
    """A question, the log-likelihood of each answer, and for pmi_dc of each without it."""

    question: Question
    logprobs: Sequence[float]
    plain_logprobs: Sequence[float] = ()


def compute(metric: str, items: Sequence[Answered], as_published: bool = False) -> dict[str, float]:
    """The task's metric first, then all others that its requests give for nothing.

    Normalised by characters and bytes of an answer with the space before it. as_published gives the
    names and values of `ai2-olmo-eval` instead: each once without that space (_v1) and once with it
    (_v2), and with its faults: an accuracy _v1 that is _v2's, and a pmi_dc that divides two
    negative numbers, so that what it prefers is the least likely.
    """
    if not items:
        raise UserError("a task without questions has no metrics: give a --limit of at least 1")
    if as_published:
        return _as_published(metric, items)
    found = _measured(metric, items, leading_space=True)
    if metric in ("bpb", "ce_loss"):
        return {metric: found.pop(metric), **found}
    names = ("acc", "len_norm", "per_byte")
    found = {name: _accuracy(name, items, True) for name in names} | found
    return {metric: found.pop(metric), **found}


def choice(metric: str, item: Answered) -> int:
    """Which answer the model gives by a metric."""
    return int(np.argmax(_scores(metric, item, True)))


def _scores(metric: str, item: Answered, leading_space: bool, inverted: bool = False) -> np.ndarray:
    """What the likeliest answer has most of."""
    logprobs = np.asarray(item.logprobs, np.float64)
    match metric:
        case "len_norm" | "ce_loss" | "bpb":
            return logprobs / _lengths(item, leading_space, False)
        case "per_byte":
            return logprobs / _lengths(item, leading_space, True)
        case "pmi_dc":
            plain = np.asarray(item.plain_logprobs, np.float64)
            return logprobs / plain if inverted else logprobs - plain
    return logprobs


def _lengths(item: Answered, leading_space: bool, in_bytes: bool) -> np.ndarray:
    texts = [c if leading_space else c[1:] for c in item.question.continuations]
    return np.array([max(1, len(t.encode() if in_bytes else t)) for t in texts], np.float64)


def _accuracy(metric: str, items: Sequence[Answered], leading_space: bool, inverted=False) -> float:
    right = [
        np.argmax(_scores(metric, item, leading_space, inverted)) == item.question.label
        for item in items
    ]
    return float(np.mean(right))


def _measured(metric, items, leading_space: bool, inverted: bool = False) -> dict[str, float]:
    """Means over questions, of the right answer: its nats a character, bits a byte, and (with other
    answers) its probability among them by the task's metric; and F1 or pmi_dc if that is it."""
    losses, bits, soft = [], [], []
    for item in items:
        label = item.question.label
        nats = -float(item.logprobs[label])
        losses.append(nats / _lengths(item, leading_space, False)[label])
        bits.append(nats * BITS / _lengths(item, leading_space, True)[label])
        scores = _scores(metric, item, leading_space, inverted)
        if metric == "pmi_dc" and inverted:  # there both are the ratio, with a minus
            losses[-1] = bits[-1] = -float(scores[label])
        largest = scores.max()
        soft.append(float(scores[label] - largest - np.log(np.exp(scores - largest).sum())))
    found = {"ce_loss": float(np.mean(losses)), "bpb": float(np.mean(bits))}
    if metric in ("bpb", "ce_loss"):
        return found
    if metric == "f1":
        found["f1"] = f1(
            [item.question.label for item in items],
            [int(np.argmax(_scores(metric, item, leading_space))) for item in items],
        )
    if metric == "pmi_dc":
        found["pmi_dc"] = _accuracy(metric, items, leading_space, inverted)
    return found | {"soft": float(np.mean(np.exp(soft))), "soft_log": float(np.mean(soft))}


def f1(labels: Sequence[int], answers: Sequence[int]) -> float:
    """F1 of the first answer (yes, or true); 0 where nothing is right."""
    both = sum(a == b == 0 for a, b in zip(labels, answers, strict=True))
    either = sum(a == 0 for a in labels) + sum(b == 0 for b in answers)
    return 2 * both / either if both else 0.0


def _as_published(metric: str, items: Sequence[Answered]) -> dict[str, float]:
    found: dict[str, float] = {}
    for version, leading_space in (("v2", True), ("v1", False)):
        values = _measured(metric, items, leading_space, inverted=True)
        if metric in ("f1", "bpb", "ce_loss"):  # nothing else is published beside them
            values = {metric: values[metric]}
        else:
            values[metric] = _accuracy(metric, items, True, inverted=True)
        found |= {f"{name}_{version}": value for name, value in values.items()}
    return dict(sorted(found.items(), key=lambda kv: (not kv[0].startswith(metric), kv[0])))
