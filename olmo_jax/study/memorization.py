"""What a model repeats word for word of what it has read, by when and how often it read it.

Pythia's measure (Biderman et al., "Emergent and Predictable Memorization in Large Language Models",
2023): 32 tokens of the data as a prompt, 32 more by greedy decoding that feeds on its own tokens;
the score is the share of these that equal the data's at the same position, and a sequence is
memorised where all do. Pythia's own program never takes the eos; here the model may.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olmo_jax.data import DataSet
from olmo_jax.data.document_index import documents_are_few
from olmo_jax.errors import UserError
from olmo_jax.eval.part import Part
from olmo_jax.eval.run import fingerprint
from olmo_jax.eval.scoring import Pair
from olmo_jax.files import replacing, write_bytes, write_error
from olmo_jax.generate import Engine, Request
from olmo_jax.model.transformer import Transformer
from olmo_jax.study import occurrences
from olmo_jax.study.reading import Place, Places, Ranges, Reading, evenly

PROMPT, CONTINUATION = 32, 32
LENGTH = PROMPT + CONTINUATION
# Prompts that are decoded at once; the engine prefills so many together, a power of 4. The demo's
# model on two busy cores: 2,900 tokens/s with 16, 3,500 with 64, 4,800 with 256.
SLOTS = 64
# Instances in which documents' beginnings are looked for, for each sequence that is asked for.
_LOOK_IN = 20

Progress = Callable[[int, int], None]
Bar = Callable[[str, str], AbstractContextManager[Progress | None]]
"""A progress bar, of (what is done, the unit)."""


@dataclass
class Item:
    """A sequence that the model was asked to continue; a line of the .sequences.jsonl."""

    group: str
    """read: the model has read this instance; next: it comes later in the data's order; held out:
    text that is not in the order."""
    n: int
    """Position of the instance in the order (of held-out text: in its files)."""
    step: int | None
    """The step of the run that reads it, from 1; None for held-out text."""
    row: int | None
    """Of that step's batch."""
    instance: int
    offset: int
    documents: list[str] | None
    """Ids of those that the sequence lies in; None where the data do not tell."""
    repeats: int | None
    """How often the model has read these 64 tokens; None if they were not counted."""
    score: float
    memorised: bool
    prompt: list[int]
    continuation: list[int]
    generated: list[int]


def choose(
    reading: Reading,
    heldout: DataSet | None = None,
    *,
    steps: Sequence[range] | None = None,
    limit: int = 1000,
    offset: int = 0,
    at_documents: bool = False,
) -> tuple[dict[str, list[Place]], int]:
    """At most `limit` places that the model has read, evenly spread over its training or over
    ranges of the run's steps, and at most as many that it has not: those that come next in the
    order, then held-out text. Also how many were skipped (`Places.skipped`).

    Raises UserError where an instance cannot hold a sequence, and where none is found.
    """
    T = reading.dataset.tokens_per_instance
    if limit < 1:
        raise UserError(f"--limit={limit}: it must be at least 1")
    if not 0 <= offset <= T - LENGTH:
        raise UserError(
            f"a sequence of {LENGTH} tokens at --offset={offset} does not fit an instance: "
            f"Data.sequence_length is {T}"
        )
    places = Places(LENGTH, offset, at_documents)
    most = limit * _LOOK_IN if at_documents else limit
    read: Sequence[int] = reading.read
    unread: Sequence[int] = reading.next
    if steps is not None:
        start, end = reading.trace.start, reading.read.stop
        chosen = [range(start(some.start), start(some.stop)) for some in steps]
        read = Ranges(range(some.start, min(some.stop, end)) for some in chosen)
        unread = Ranges(range(max(some.start, end), some.stop) for some in chosen) or unread
    new = [n for n in evenly(unread, most) if reading.is_new(n)]
    found = {
        "read": evenly(places.of(reading.dataset, evenly(read, most)), limit),
        "next": evenly(places.of(reading.dataset, new), limit),
    }
    left = limit - len(found["next"])
    found["held out"] = []
    if heldout and left:
        positions = evenly(range(len(heldout)), left * _LOOK_IN if at_documents else left)
        found["held out"] = evenly(places.of(heldout, positions), left)
    if not any(found.values()):
        raise UserError(
            f"no sequence of {LENGTH} tokens was found ({places.skipped:,} ended early): "
            "give other --steps, another --offset, or no --documents"
        )
    return found, places.skipped


def ask(
    model: Transformer,
    reading: Reading,
    groups: dict[str, list[Place]],
    heldout: DataSet | None = None,
    *,
    out: Path | None = None,
    bar: Bar = lambda *_: nullcontext(),
) -> list[Item]:
    """Has the model continue every place; each distinct prompt once.

    With `out`, what was found is kept in OUT.part on the way, and the same call goes on from there
    (`finish` ends it). Raises UserError.
    """
    if model.config.context_length < LENGTH:
        raise UserError(
            f"the model's context of {model.config.context_length} tokens is shorter than the "
            f"{LENGTH} of prompt and continuation"
        )
    sequences = list(dict.fromkeys(p.tokens for places in groups.values() for p in places))
    if (highest := max(max(tokens) for tokens in sequences)) >= model.config.rows:
        raise UserError(
            f"the data have token {highest}, and the model a vocabulary of {model.config.rows}: "
            "they are not of one tokenizer"
        )
    repeats: dict[tuple[int, ...], int] = {}
    if occurrences.can_count(reading):
        with bar("counting repeats", "instances") as progress:
            counts = occurrences.count(reading, sequences, progress)
        repeats = dict(zip(sequences, counts, strict=True))
    prompts = list(dict.fromkeys(tokens[:PROMPT] for tokens in sequences))
    with bar("continuing", "prompts") as progress:
        generated = dict(zip(prompts, _continued(model, prompts, out, progress), strict=True))
    items = []
    for group, places in groups.items():
        dataset = heldout if group == "held out" else reading.dataset
        assert dataset or not places
        for place, documents in zip(places, _documents(dataset, places), strict=True):
            prompt, continuation = list(place.tokens[:PROMPT]), list(place.tokens[PROMPT:])
            tokens = generated[place.tokens[:PROMPT]]
            score = float(np.mean(np.equal(tokens, continuation)))
            step, row = (None, None) if group == "held out" else reading.trace.step_and_row(place.n)
            # Without a count the order tells, as long as no instance came twice.
            known = int(group == "read") if reading.is_first else None
            times = repeats.get(place.tokens, known)
            where = (place.n, step, row, place.instance, place.offset, documents, times)
            items.append(Item(group, *where, score, score == 1, prompt, continuation, tokens))
    return items


def _continued(
    model: Transformer,
    prompts: Sequence[tuple[int, ...]],
    out: Path | None,
    progress: Progress | None,
) -> list[list[int]]:
    """What the model makes of each prompt, greedily."""
    found: dict[int, list[int]] = {}
    of = fingerprint(model, [Pair(prompt, ()) for prompt in prompts]) if out else ""
    with Part(out, of) if out else nullcontext() as part:
        found |= {i: tokens for i, tokens in (part.found if part else ())}
        left = [i for i in range(len(prompts)) if i not in found]
        if left:
            slots = next(n for n in (1, 4, 16, SLOTS) if n in (SLOTS, max(n, len(left))))
            # The last slots are filled up, too: one shape of prefill is compiled instead of four.
            asked = [*left, *left[:1] * (-len(left) % slots)]
            engine = Engine(model, slots=slots)
            requests = {engine.submit(Request(prompts[i], CONTINUATION)): i for i in asked}
            texts: dict[int, list[int]] = {id: [] for id in requests}
            while engine.busy:
                for event in engine.step():
                    texts[event.id] += event.token_ids
                    if event.finish and (i := requests[event.id]) not in found:
                        found[i] = texts[event.id]
                        if part:
                            part.append([i, found[i]])
                if progress:
                    progress(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


def _documents(dataset: DataSet | None, places: Sequence[Place]) -> list[list[str] | None]:
    """The ids of the documents that each place lies in, where reading them takes seconds."""
    if dataset is None or not documents_are_few(f for s in dataset.sources for f in s.files):
        return [None] * len(places)
    found: dict[Place, list[str] | None] = {}
    for place in sorted(places, key=lambda p: p.instance):  # file by file
        first, ids = place.offset, []
        for stretch in dataset.where(place.instance):
            start = max(stretch.start + first, stretch.start)
            end = min(stretch.start + first + LENGTH, stretch.end)
            if start < end:
                ids += [d.id for d in stretch.documents if d.start < end and d.end > start]
            first -= stretch.end - stretch.start
        found[place] = ids or None
    return [found[place] for place in places]


def finish(out: Path, content: dict[str, Any], items: Sequence[Item], page: str) -> None:
    """Writes the summary (.json), the items (.sequences.jsonl) and the page (.html), each whole,
    and ends OUT.part. Raises UserError."""
    try:
        with replacing(out.with_suffix(".sequences.jsonl")) as file:
            file.writelines(json.dumps(asdict(item)).encode() + b"\n" for item in items)
        write_bytes(out.with_suffix(".html"), page.encode())
        write_bytes(out, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise write_error(out, error) from error
    out.with_name(f"{out.name}.part").unlink(missing_ok=True)
