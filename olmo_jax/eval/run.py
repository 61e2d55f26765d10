"""Tasks on a model: requests in, numbers out, in a file that a killed evaluation goes on from."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from olmo_jax.convert import load
from olmo_jax.errors import UserError
from olmo_jax.eval.metrics import Answered, choice, compute
from olmo_jax.eval.part import Part
from olmo_jax.eval.scoring import Pair, Score, Scorer
from olmo_jax.eval.suites import SUITES
from olmo_jax.eval.tasks import Task, expand, load_task
from olmo_jax.files import write_bytes, write_error
from olmo_jax.model.transformer import Transformer

Progress = Callable[[int, int], None]


class Requests:
    """The tasks' questions as pairs of token ids, each distinct pair once."""

    def __init__(self, tasks: Sequence[Task], tokenizer: Tokenizer, eos_id: int | None):
        self.tasks = tasks
        ids = _Encoder(tokenizer, eos_id)
        ids.add(text for task in tasks for q in task.questions for text in _texts(q, task.metric))
        index: dict[Pair, int] = {}

        def at(context: str, continuation: str) -> int:
            pair = Pair(ids.context(context), ids[continuation])
            return index.setdefault(pair, len(index))

        # For each task and question: its answers' pairs, and those without the question.
        self.at: list[list[tuple[list[int], list[int]]]] = []
        for task in tasks:
            rows = []
            for q in task.questions:
                plain = q.plain_contexts if task.metric == "pmi_dc" else ()
                asked = [at(*texts) for texts in zip(q.contexts, q.continuations, strict=True)]
                alone = [at(*texts) for texts in zip(plain, q.continuations, strict=bool(plain))]
                rows.append((asked, alone))
            self.at.append(rows)
        self.pairs = list(index)

    def refuse_longer(self, max_length: int) -> None:
        """UserError where an answer alone is longer than what the model reads."""
        for task, rows in zip(self.tasks, self.at, strict=True):
            n = max(len(self.pairs[i].continuation) for asked, _ in rows for i in asked)
            if n > max_length:
                raise UserError(
                    f"{task.name}: an answer of {n} tokens exceeds the model's context of "
                    f"{max_length}: leave this task out, or take fewer of its questions"
                )

    def answered(self, scores: dict[int, Score]) -> Iterator[tuple[Task, list[Answered]]]:
        """Each task with the log-likelihoods of its answers."""
        for task, rows in zip(self.tasks, self.at, strict=True):
            yield (
                task,
                [
                    Answered(q, *([scores[i].logprob for i in part] for part in row))
                    for q, row in zip(task.questions, rows, strict=True)
                ],
            )


def _texts(question, metric: str) -> tuple[str, ...]:
    plain = question.plain_contexts if metric == "pmi_dc" else ()
    return (*question.contexts, *question.continuations, *plain)


class _Encoder:
    """Texts to ids without special tokens, each text once; context and continuation apart."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int | None):
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.ids: dict[str, tuple[int, ...]] = {}

    def add(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.ids]
        encoded = self.tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self.ids |= {text: tuple(e.ids) for text, e in zip(new, encoded, strict=True)}

    def __getitem__(self, text: str) -> tuple[int, ...]:
        return self.ids[text]

    def context(self, text: str) -> tuple[int, ...]:
        """An empty context is the token that ends a document, which begins one."""
        if not (ids := self.ids[text]) and self.eos_id is not None:
            return (self.eos_id,)
        return ids


@dataclass(frozen=True)
class Results:
    """What an evaluation found, as the JSON file holds it."""

    content: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each task: name, metric, value, standard error, questions; then the suites."""
        rows = [
            {
                "task": name,
                "metric": task["metric"],
                "value": task["metrics"][next(iter(task["metrics"]))],
                "stderr": task["stderr"],
                "questions": len(task["items"]),
            }
            for name, task in self.content["tasks"].items()
        ]
        return rows + [
            {"task": name, "metric": "mean", "value": value, "stderr": None, "questions": None}
            for name, value in self.content["suites"].items()
        ]


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    name: str,
    out: Path | None = None,
    eos_id: int | None = None,
    limit: int | None = None,
    as_published: bool = False,
    progress: Progress | None = None,
    scorer: Scorer | None = None,
) -> Results:
    """Scores tasks and suites (`tasks.expand`); with `out`, a .json file, writes it whole at the
    end and a page beside it.

    On the way what is scored is kept in OUT.part: the same call goes on from there, and ends with
    the same file. Raises UserError.
    """
    if out is not None and out.suffix != ".json":
        raise UserError(
            f"--out={out}: give a name that ends in .json; a .html page comes beside it"
        )
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit}: it must be at least 1")
    labels = expand(names)
    requests = Requests([load_task(label, limit) for label in labels], tokenizer, eos_id)
    scorer = scorer or Scorer.on_all_devices(model)
    requests.refuse_longer(scorer.max_length)
    scores: dict[int, Score] = {}
    of = fingerprint(scorer.model, requests.pairs) if out else None
    with Part(out, of) if out else nullcontext() as part:
        for i, logprob, greedy, logprobs in part.found if part else ():
            scores[i] = Score(logprob, greedy, np.array(logprobs, np.float32))
        for i, score in scorer(requests.pairs, progress, done=set(scores)):
            scores[i] = score
            if part:
                logprobs = [float(x) for x in score.logprobs]
                part.append([i, score.logprob, score.is_greedy, logprobs])
    results = Results(_content(name, names, requests, scores, limit, as_published))
    if part and out:
        from olmo_jax.eval.page import render

        try:
            write_bytes(out.with_suffix(".html"), render([results]).encode())
            write_bytes(out, (json.dumps(results.content, indent=1) + "\n").encode())
        except OSError as error:
            raise write_error(out, error) from error
        part.remove()
    return results


def _content(name, names, requests: Requests, scores, limit, as_published) -> dict[str, Any]:
    tasks: dict[str, dict[str, Any]] = {}
    for (task, answered), rows in zip(requests.answered(scores), requests.at, strict=True):
        items = []
        for item, (asked, alone) in zip(answered, rows, strict=True):
            question, found = item.question, [scores[i] for i in asked]
            items.append(
                {
                    "label": question.label,
                    "choice": choice(task.metric, item),
                    "logprobs": [score.logprob for score in found],
                    "greedy": [score.is_greedy for score in found],
                    "tokens": [len(score.logprobs) for score in found],
                    "bytes": [len(text.encode()) for text in question.continuations],
                }
                | ({"plain_logprobs": [scores[i].logprob for i in alone]} if alone else {})
            )
        tasks[task.name] = {
            "metric": task.metric,
            "metrics": compute(task.metric, answered, as_published),
            "stderr": _stderr(task.metric, answered),
            "items": items,
        }
    first = {label: next(iter(task["metrics"].values())) for label, task in tasks.items()}
    suites = {
        s: float(np.mean([first[label] for label in expand([s])]))
        for s in names
        if s.partition(":")[0] in SUITES
    }
    return {
        "model": name,
        "limit": limit,
        "as_published": as_published,
        "tasks": tasks,
        "suites": suites,
    }


def _stderr(metric: str, answered: Sequence[Answered]) -> float | None:
    """The standard error of the first metric over questions; None for F1, which is no mean."""
    if metric == "f1" or len(answered) < 2:
        return None
    values = [next(iter(compute(metric, [item]).values())) for item in answered]
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def fingerprint(model: Transformer, pairs: Sequence[Pair]) -> str:
    """Of the requests and of the model: what a part's scores belong to."""
    digest = hashlib.sha256(load.fingerprint(model).encode())
    for pair in pairs:
        digest.update(np.array([len(pair.context), *pair.context, *pair.continuation]).tobytes())
    return digest.hexdigest()
