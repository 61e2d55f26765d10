"""Continuous batching: requests come and go while others are decoded, in slots of one batch.

One thread drives it. Whoever has a few prompts and wants the texts calls `generate_batch`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from olmo_jax.errors import UserError
from olmo_jax.generate import decoder
from olmo_jax.generate.decoder import STEPS, TOP, Chosen
from olmo_jax.generate.sampling import GREEDY, Sampling, SamplingRows
from olmo_jax.model.transformer import Transformer

Finish = Literal["stop", "length"]

# A cache has entries for so many positions beyond the longest prompt before it first grows.
_AHEAD = 256
_SMALLEST = 64
_SMALLEST_PROMPT = 16
# Tokens, padding included, of prompts that are filled in together: bounds memory, and how long the
# slots that decode have to wait.
_PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class Request:
    """A prompt to go on from."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    eos_ids: tuple[int, ...] = ()
    """Tokens that end the text; they are no part of it."""
    logprobs: int | None = None
    """How many alternatives come with each token's log-probability, up to 20; None: neither."""


class Logprob(NamedTuple):
    """A token's log-probability in the model's own distribution, before temperature and cuts."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, the likeliest first."""


@dataclass(frozen=True)
class Event:
    """What a step has brought for a request."""

    id: int
    token_ids: list[int]
    logprobs: list[Logprob] | None
    """Of each token, where the request asked for them."""
    finish: Finish | None
    """"stop": an eos came; "length": max_tokens are there; None: it goes on."""


@dataclass
class Completion:
    """All that followed a prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: Finish | None = None


@dataclass
class _Running:
    """A request in a slot."""

    id: int
    request: Request
    left: int
    """Tokens that are still to come."""
    length: int
    """Of prompt and text so far; the last token is at length - 1, and not in the cache yet."""
    last: int = 0


class Engine:
    """`submit` requests, then `step` until it is no longer `busy`.

    Every text is what the request would give alone: it does not depend on what runs beside it.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 16,
        max_length: int | None = None,
        int8: bool = False,
    ):
        """slots: requests that are decoded at once. max_length: the most tokens of a prompt and its
        text; the model's context if None. Raises UserError when it is more than that.

        int8: keep the weights of the layers' products and of an untied head in int8, a scale for
        each output; experts, embedding and norms stay as they are. The engine keeps nothing of the
        float weights: they are gone once nobody else holds the model.
        """
        config = self.config = model.config
        if slots < 1:
            raise UserError(f"slots = {slots}: it must be at least 1")
        self.max_length = config.context_length if max_length is None else max_length
        if not 1 < self.max_length <= config.context_length:
            raise UserError(
                f"max_length = {max_length}: it must be from 2 to the model's context of "
                f"{config.context_length}"
            )
        graph, weights = nnx.split(decoder.unstacked(model, int8))
        self._structure = decoder.structure(graph)
        self._weights = nnx.to_pure_dict(weights)
        self._slots: list[_Running | None] = [None] * slots
        self._waiting: deque[tuple[int, Request]] = deque()
        self._state: decoder.State | None = None
        self._length = 0  # positions that the cache holds
        self._next_id = 0
        self.tokens = 0
        """Generated so far."""
        self.prompt_tokens = 0
        """Read so far."""

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return sum(r is not None for r in self._slots)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._slots)

    def check(self, request: Request) -> None:
        """Raises UserError when the request cannot be run."""
        n, rows, longest = len(request.prompt_ids), self.config.rows, self.max_length
        if not n:
            raise UserError(
                "the prompt has no tokens: give at least one (an eos begins a document)"
            )
        if request.max_tokens < 1:
            raise UserError(f"max_tokens = {request.max_tokens}: it must be at least 1")
        if max(request.prompt_ids) >= rows or min(request.prompt_ids) < 0:
            raise UserError(f"the prompt has ids outside the vocabulary of {rows}")
        if n + request.max_tokens > longest:
            raise UserError(
                f"a prompt of {n} tokens and max_tokens = {request.max_tokens} exceed the model's "
                f"context of {longest}: give a shorter prompt or at most {max(0, longest - n)} "
                "tokens"
            )
        if request.logprobs is not None and not 0 <= request.logprobs <= min(TOP, rows):
            raise UserError(f"logprobs = {request.logprobs}: give 0 to {min(TOP, rows)}")

    def submit(self, request: Request) -> int:
        """Puts a request in line; its id. Raises UserError as `check` does."""
        self.check(request)
        id = self._next_id
        self._next_id += 1
        self._waiting.append((id, request))
        return id

    def cancel(self, id: int) -> None:
        """Forgets a request, whose slot is free at once; one that has ended is no mistake."""
        self._waiting = deque(w for w in self._waiting if w[0] != id)
        self._slots = [None if r and r.id == id else r for r in self._slots]

    def step(self) -> list[Event]:
        """Fills free slots with waiting requests, then decodes a few tokens of all that run; what
        came of each, one Event a request."""
        events: dict[int, Event] = {}
        self._admit(events)
        if any(self._slots):
            self._decode(events)
        return list(events.values())

    # --- prompts ----------------------------------------------------------------------------------

    def _admit(self, events: dict[int, Event]) -> None:
        free = [i for i, r in enumerate(self._slots) if r is None]
        taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not taken:
            return
        for slot, (id, request) in zip(free, taken, strict=False):
            n = len(request.prompt_ids)
            self._slots[slot] = _Running(id, request, request.max_tokens, n)
        self._make_room()
        # Together those of one bucket, as many at once as a power of 4: few shapes, no empty rows.
        groups: dict[int, list[int]] = {}
        for slot, (_, request) in zip(free, taken, strict=False):
            groups.setdefault(self._bucket(len(request.prompt_ids), _SMALLEST_PROMPT), []).append(
                slot
            )
        for T, slots in groups.items():
            while slots:
                rows = 1
                while rows * 4 <= len(slots) and rows * 4 * T <= _PREFILL_TOKENS:
                    rows *= 4
                self._prefill(slots[:rows], T, events)
                slots = slots[rows:]

    def _prefill(self, slots: list[int], T: int, events: dict[int, Event]) -> None:
        running = [r for slot in slots if (r := self._slots[slot])]
        tokens_RT = np.zeros((len(running), T), np.int32)
        for row_T, r in zip(tokens_RT, running, strict=True):
            row_T[: r.length] = r.request.prompt_ids
        n_R = np.array([r.length for r in running], np.int32)
        self.prompt_tokens += int(n_R.sum())
        slot_R = np.array(slots, np.int32)
        logits_VR, state = decoder.prefill(
            self._structure, self._weights, self._state, tokens_RT, n_R, slot_R
        )
        rows = SamplingRows.of([(r.request.sampling, r.request.seed) for r in running])
        chosen, seen_BV = decoder.first(
            state.seen_BV, logits_VR, rows, slot_R, n_R, _wants_logprobs(running)
        )
        self._state = state._replace(seen_BV=seen_BV)
        values = _values(chosen, running)
        for i, slot in enumerate(slots):
            self._take(slot, jax.tree.map(lambda a, i=i: a[i : i + 1], values), events)

    # --- text -------------------------------------------------------------------------------------

    def _decode(self, events: dict[int, Event]) -> None:
        running = [r for r in self._slots if r]
        steps = min(STEPS, max(r.left for r in running))
        self._make_room(steps)
        rows = [(r.request.sampling, r.request.seed) if r else _FREE for r in self._slots]
        chosen, self._state = decoder.decode(
            self._structure,
            self._weights,
            self._state,
            np.array([r.last if r else 0 for r in self._slots], np.int32),
            np.array([r.length - 1 if r else 0 for r in self._slots], np.int32),
            SamplingRows.of(rows),
            _wants_logprobs(running),
            np.int32(steps),
        )
        values = _values(chosen, running)
        for slot, r in enumerate(self._slots):
            if r:
                own = jax.tree.map(lambda a, slot=slot: a[:steps, slot], values)
                self._take(slot, own, events)

    def _take(self, slot: int, chosen: Chosen, events: dict[int, Event]) -> None:
        """Adds a slot's new tokens to its event, up to its end."""
        r = self._slots[slot]
        assert r is not None
        tokens = chosen.token_B[: r.left].tolist()
        r.left -= len(tokens)
        finish: Finish | None = None if r.left else "length"
        for i, token in enumerate(tokens):
            if token in r.request.eos_ids:
                tokens, finish = tokens[:i], "stop"
                break
        r.length += len(tokens)
        r.last = tokens[-1] if tokens else 0
        self.tokens += len(tokens)
        event = events.get(r.id, Event(r.id, [], None, None))
        logprobs = event.logprobs
        if (n := r.request.logprobs) is not None:
            logprobs = [*(logprobs or [])]
            for i in range(len(tokens)):
                top = zip(chosen.top_BN[i, :n], chosen.top_logprob_BN[i, :n], strict=True)
                pairs = tuple((int(token), float(value)) for token, value in top)
                logprobs.append(Logprob(float(chosen.logprob_B[i]), pairs))
        events[r.id] = Event(r.id, event.token_ids + tokens, logprobs, finish)
        if finish:
            self._slots[slot] = None

    # --- the cache --------------------------------------------------------------------------------

    def _bucket(self, n: int, smallest: int) -> int:
        """A power of two that holds n positions, or all there ever are."""
        return min(max(smallest, 1 << (n - 1).bit_length()), self.max_length)

    def _make_room(self, steps: int = 0) -> None:
        """Gives the cache entries for what the slots hold and for what comes soon."""
        longest = max(r.length + max(steps, min(r.left, _AHEAD)) for r in self._slots if r)
        needed = max(r.length + min(r.left, steps) for r in self._slots if r)
        if self._state is not None and needed <= self._length:
            return
        length = self._bucket(longest, _SMALLEST)
        if self._state is None:
            self._state = decoder.empty(self.config, self._weights, len(self._slots), length)
        else:
            self._state = decoder.grown(self.config, self._state, length)
        self._length = length


_FREE = GREEDY, 0


def _wants_logprobs(running: Sequence[_Running]) -> np.bool_:
    return np.bool_(any(r.request.logprobs is not None for r in running))


def _values(chosen: Chosen, running: Sequence[_Running]) -> Chosen:
    """On the host; the log-probabilities only where anyone asked for them."""
    if _wants_logprobs(running):
        return jax.tree.map(_fetched, chosen)
    return Chosen(_fetched(chosen.token_B), None, None, None)


def _fetched(x: jax.Array) -> np.ndarray:
    """The values, also where another process's devices hold a part of them."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def generate_batch(
    model: Transformer,
    requests: Sequence[Request],
    *,
    slots: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Every request's completion, in order. progress(done, of how many) counts requests. Raises
    UserError before anything runs when one of them is not possible."""
    engine = Engine(model, slots=max(1, min(slots, len(requests))))
    completions = {engine.submit(request): Completion() for request in requests}
    done = 0
    for event in _events(engine):
        completion = completions[event.id]
        completion.token_ids += event.token_ids
        completion.logprobs += event.logprobs or []
        completion.finish = event.finish
        done += event.finish is not None
        if progress and event.finish:
            progress(done, len(requests))
    return list(completions.values())


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """The ids that follow one prompt, as they come: at most max_tokens, ending before eos_id.

    Greedy without a `sampling`. Raises UserError as `Engine.check` does.
    """
    eos_ids = () if eos_id is None else (eos_id,)
    engine = Engine(model, slots=1)
    engine.submit(Request(tuple(prompt_ids), max_tokens, sampling or GREEDY, seed, eos_ids))
    return (i for event in _events(engine) for i in event.token_ids)


def _events(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()
