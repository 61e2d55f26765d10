"""OpenAI's requests as this server takes them, checked, and its answers' forms.

Only what changes the text is acted on: a field that this server cannot honour is refused, unless
its value asks for nothing. The forms follow OpenAI's API reference (completions, chat completions).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST_CHOICES, MOST_LOGPROBS = 128, 20
# Fields of OpenAI's that ask for nothing with these values, and are refused with others.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# About who asks and how it is billed or cached, not about the text.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(BaseModel):
    model_config = _STRICT
    include_usage: bool = False
    include_obfuscation: bool = False  # there is nothing to hide here: never sent


class Asked(BaseModel):
    """What both kinds of request may say."""

    model_config = _STRICT
    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = Field(
        [], description="a string, or at most 16, of 1 to 256 characters each"
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if value is None or name in IGNORED:  # null: as if left out
                continue
            if name not in NEUTRAL or name in cls.model_fields:
                kept[name] = value
            elif value not in NEUTRAL[name]:
                raise ValueError(f"{name} is not supported: leave it out")
        return kept

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a string, a list of strings, a list of token ids, or a list of such lists"
    )
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @model_validator(mode="after")
    def _possible(self):
        if self.prompt == []:
            raise ValueError("prompt is an empty list: give at least one")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs: the prompt's log-probabilities are not kept")
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0]
        return [self.prompt] if isinstance(first, int) else self.prompt  # type: ignore[list-item,return-value]


class TextPart(BaseModel):
    model_config = _STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Whatever else a client sends back of an earlier answer is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description='a string, or a list of {"type": "text", …}')

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _possible(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given and logprobs is not true")
        return self


def fault(error: pydantic.ValidationError, kind: type[BaseModel]) -> tuple[str, str | None]:
    """What is wrong with a request, in one line, and the name of its field."""
    faults = error.errors(include_url=False)
    first = faults[0]
    where = ".".join(str(key) for key in first["loc"])
    field = str(first["loc"][0]) if first["loc"] else None
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}", None
    if field is None:
        return message.replace("it must be", "the body must be"), None
    if first["type"] == "missing":
        return f"{where} is missing", field
    if first["type"] == "extra_forbidden":
        return f"{where} is not a field that this server knows", field
    forms = {name: f.description for k in (kind, Message) for name, f in k.model_fields.items()}
    for i, key in enumerate(first["loc"], 1):
        if forms.get(str(key)):  # one of several forms: no use in naming what each lacks
            message = f"it must be {forms[str(key)]}"
            where = ".".join(str(key) for key in first["loc"][:i])
            break
    given = repr(first["input"])
    return f"{where} = {given if len(given) <= 60 else given[:60] + '…'}: {message}", field


# --- answers --------------------------------------------------------------------------------------


class Token(NamedTuple):
    """A token of the answer with its log-probability and the likeliest in its place."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


class Piece(NamedTuple):
    """What is new of one choice."""

    text: str
    tokens: list[Token] | None
    """None: log-probabilities were not asked for."""
    at: int
    """Characters of the choice before this."""
    finish: Literal["stop", "length"] | None


def completion_choice(index: int, piece: Piece, streamed: bool, first: bool) -> dict:
    logprobs = None
    if piece.tokens is not None:
        offsets, at = [], piece.at
        for token in piece.tokens:
            offsets.append(at)
            at += len(token.text)
        logprobs = {
            "tokens": [t.text for t in piece.tokens],
            "token_logprobs": [t.logprob for t in piece.tokens],
            "top_logprobs": [dict(t.top) for t in piece.tokens],
            "text_offset": offsets,
        }
    return {
        "index": index,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": piece.finish,
    }


def chat_choice(index: int, piece: Piece, streamed: bool, first: bool) -> dict:
    role = {"role": "assistant"} if first else {}
    logprobs = None
    if piece.tokens is not None:
        logprobs = {
            "content": [
                _scored(t.text, t.logprob) | {"top_logprobs": [_scored(*pair) for pair in t.top]}
                for t in piece.tokens
            ],
            "refusal": None,
        }
    return {
        "index": index,
        "delta" if streamed else "message": role | {"content": piece.text},
        "logprobs": logprobs,
        "finish_reason": piece.finish,
    }


def _scored(text: str, logprob: float) -> dict:
    # A token that ends inside a character has no text of its own.
    bytes_ = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": bytes_}


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, type_: str, param: str | None, code: str | None) -> dict:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}
