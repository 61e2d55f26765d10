"""Text in, text out, as it comes: no character cut in half, nothing of a stop string shown."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from olmo_jax.errors import UserError
from olmo_jax.generate.engine import Engine, Finish, Request
from olmo_jax.generate.sampling import GREEDY, Sampling
from olmo_jax.model.transformer import Transformer


def encode_prompt(tokenizer: Tokenizer, prompt: str, eos_id: int | None) -> list[int]:
    """A prompt's ids; an empty one is the eos, which begins a document."""
    # Not `encode`, which keeps every other thread waiting: 4.0 s for 600,000 bytes, here 0.03.
    [encoding] = tokenizer.encode_batch_fast([prompt], add_special_tokens=False)
    ids = encoding.ids
    return ids or ([] if eos_id is None else [eos_id])


class TextStream:
    """One request's ids as text. What may yet become a stop string, or a character, is held back.

    Where one of the stop strings comes, the text ends before it, and `stopped` is True.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Iterable[str] = ()):
        self.stop, self.stopped = tuple(stop), False
        self.used = 0  # ids, up to the one with which a stop string was whole
        if "" in self.stop:
            raise UserError("a stop string is empty: give at least one character")
        self._tokenizer = tokenizer
        # The last ids of the prompt: some tokenizers drop the space that a text begins with.
        tail = list(prompt_ids[-8:])
        self._stream = DecodeStream(ids=tail)
        # Where they end in half a character, the stream's first piece has them in it.
        before = tokenizer.decode(tail, skip_special_tokens=False)
        self._before = before if before.endswith("\N{REPLACEMENT CHARACTER}") else ""
        self._pending: list[int] = []  # ids of no whole character yet
        self._held = ""

    def push(self, ids: Iterable[int], last: bool = False) -> str:
        """What can be shown now that these ids have come; with `last`, all that is left."""
        shown = ""
        for id in ids:  # one by one: a text does not depend on how many come at once
            if self.stopped:
                return shown
            self.used += 1
            self._pending.append(id)
            if (piece := self._stream.step(self._tokenizer, id)) is not None:
                while not piece.startswith(self._before):
                    self._before = self._before[:-1]
                self._held += piece.removeprefix(self._before)
                self._before, self._pending = "", []
                shown += self._free()
        if last and not self.stopped:
            self._held += self._tokenizer.decode(self._pending, skip_special_tokens=False)
            self._pending = []
            shown += self._free(last=True)
        return shown

    def _free(self, last: bool = False) -> str:
        """Of what is held that which no stop string can have any more; with `last`, all of it."""
        found = [at for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - (0 if last else self._may_be_stop())
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def _may_be_stop(self) -> int:
        """Characters at the end of what is held that a stop string begins with."""
        longest = max(map(len, self.stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self.stop):
                return n
        return 0


def generate_text(
    model: Transformer | Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    eos_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    seed: int = 0,
    ids: list[int] | None = None,
) -> Iterator[str]:
    """What follows a prompt (text, or its ids), piece by piece, up to an eos or a stop string.

    The ids are added to `ids` as they come. Raises UserError as `Engine.check` does.
    """
    engine = model if isinstance(model, Engine) else Engine(model, slots=1)
    if isinstance(prompt, str):
        prompt = encode_prompt(tokenizer, prompt, eos_ids[0] if eos_ids else None)
    request = Request(tuple(prompt), max_tokens, sampling, seed, tuple(eos_ids))
    stream = TextStream(tokenizer, prompt, stop)
    return _pieces(engine, engine.submit(request), stream, [] if ids is None else ids)


def _pieces(engine: Engine, id: int, stream: TextStream, ids: list[int]) -> Iterator[str]:
    try:
        while engine.busy:
            for event in engine.step():
                before = stream.used
                text = stream.push(event.token_ids, last=event.finish is not None)
                ids += event.token_ids[: stream.used - before]
                yield text
            if stream.stopped:
                return
    finally:  # also where the reader has had enough
        engine.cancel(id)


def generate_texts(
    model: Transformer | Engine,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str, int, Finish]]:
    """The index, text, number of tokens and end of each request, as they end."""
    engine = model if isinstance(model, Engine) else Engine(model, slots=min(16, len(requests)))
    index, streams, texts = {}, {}, {}
    for i, request in enumerate(requests):
        id = engine.submit(request)
        index[id], streams[id] = i, TextStream(tokenizer, request.prompt_ids, stop)
        texts[id] = ""
    while engine.busy:
        for event in engine.step():
            id, finish = event.id, event.finish
            texts[id] += streams[id].push(event.token_ids, last=finish is not None)
            if streams[id].stopped:
                engine.cancel(id)
                finish = "stop"
            if finish:
                yield index[id], texts[id], streams[id].used, finish
