"""From the engine's events to OpenAI's answers: text cut at stop strings, whole or as a stream."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Literal

from tokenizers import Tokenizer

from olmo_jax.errors import UserError
from olmo_jax.generate.driver import Failed, Job
from olmo_jax.generate.engine import Event, Logprob, Request
from olmo_jax.generate.openai_schema import (
    Piece,
    Token,
    chat_choice,
    completion_choice,
    error_body,
    usage,
)
from olmo_jax.generate.text import TextStream

_LEAST_LOGPROB = -9999.0  # JSON has no infinities; what OpenAI gives for a token that cannot come


class Choice:
    """One of a request's texts on its way."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stops: Sequence[str], head: str):
        """head: text that goes before, an echo."""
        self._tokenizer, self._head, self._at = tokenizer, head, len(head)
        self._stream = TextStream(tokenizer, request.prompt_ids, stops)
        self._logprobs = request.logprobs is not None
        self.tokens = 0
        self.finish: Literal["stop", "length"] | None = None

    def take(self, event: Event) -> Piece:
        """What is new with an event."""
        text, self._head = self._head, ""
        at, scored = self._at, []
        for i, id in enumerate(event.token_ids):
            self.tokens += 1
            text += self._stream.push([id])
            if event.logprobs is not None:
                scored.append(self._scored(id, event.logprobs[i]))
                self._at += len(scored[-1].text)
            if self._stream.stopped:
                break
        if event.finish and not self._stream.stopped:
            text += self._stream.push([], last=True)
        self.finish = "stop" if self._stream.stopped else event.finish
        return Piece(text, scored if self._logprobs else None, at, self.finish)

    def _scored(self, id: int, score: Logprob) -> Token:
        top = [(self._text(i), max(_LEAST_LOGPROB, value)) for i, value in score.top]
        return Token(self._text(id), max(_LEAST_LOGPROB, score.logprob), top)

    def _text(self, id: int) -> str:
        return self._tokenizer.decode([id], skip_special_tokens=False)


class Answer:
    """All texts of an HTTP request."""

    def __init__(
        self,
        kind: Literal["completion", "chat"],
        model: str,
        choices: list[Choice],
        job: Job,
        prompt_tokens: int,
        on_token: Callable[[], None],
    ):
        """on_token is called when the first token is there."""
        self.kind, self._choices, self._job = kind, choices, job
        self._prompt_tokens, self._on_token = prompt_tokens, on_token
        self._head = {
            "id": f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._form = completion_choice if kind == "completion" else chat_choice

    async def whole(self) -> dict:
        """The answer in one."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for i, piece in self._pieces():
            pieces[i].append(piece)
        joined = [
            Piece(
                "".join(piece.text for piece in parts),
                None if parts[0].tokens is None else [t for p in parts for t in p.tokens or ()],
                parts[0].at,
                parts[-1].finish,
            )
            for parts in pieces
        ]
        choices = [self._form(i, p, streamed=False, first=True) for i, p in enumerate(joined)]
        name = "text_completion" if self.kind == "completion" else "chat.completion"
        return self._head | {"object": name, "choices": choices, "usage": self._usage()}

    async def chunks(self, include_usage: bool) -> AsyncGenerator[str, None]:
        """The answer as server-sent events. An error after the first is an event, too."""
        name = "text_completion" if self.kind == "completion" else "chat.completion.chunk"
        head = self._head | {"object": name} | ({"usage": None} if include_usage else {})
        try:
            if self.kind == "chat":
                for i in range(len(self._choices)):
                    first = self._form(i, Piece("", None, 0, None), streamed=True, first=True)
                    yield _event(head | {"choices": [first]})
            async for i, piece in self._pieces():
                if piece.text or piece.tokens or piece.finish:
                    choice = self._form(i, piece, streamed=True, first=False)
                    yield _event(head | {"choices": [choice]})
        except (Failed, UserError) as error:
            yield _event(error_body(str(error), "server_error", None, None))
            return
        if include_usage:
            yield _event(head | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        left, started = len(self._choices), False
        while left:
            i, event = await self._job.next()
            choice = self._choices[i]
            if choice.finish:  # what was on its way when a stop string came
                continue
            if not started:
                self._on_token()
                started = True
            piece = choice.take(event)
            if choice.finish:
                left -= 1
                self._job.end(i)
            yield i, piece

    def _usage(self) -> dict:
        return usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))


def _event(content: dict) -> str:
    # In ASCII: some clients end a line at any of Unicode's line ends.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
