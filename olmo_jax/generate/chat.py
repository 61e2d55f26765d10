"""What lies beside a model's weights for text: tokenizer, the ids that end it, the chat template.

A template comes with the weights, from anyone: it is run in jinja's sandbox, as transformers does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from olmo_jax.convert.load import load_tokenizer
from olmo_jax.convert.source import open_source
from olmo_jax.errors import UserError
from olmo_jax.generate.text import encode_prompt

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks, for training, what the assistant says; here its inside counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A conversation as the text that the model was trained on."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """special_tokens: what the template may ask for, bos_token and so on. Raises UserError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        # jinja's own would escape what HTML reserves.
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is not one of jinja's: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Messages are {"role": …, "content": …}; the text ends where the assistant's next one
        begins. Raises UserError for what the template refuses."""
        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # whatever somebody else's program raises
            raise UserError(f"the chat template refuses these messages: {error}") from None


@dataclass(frozen=True)
class TextFiles:
    """What a model's folder says about text."""

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    """Tokens that end a text: the model's own first, then those of generation_config.json."""
    chat_template: ChatTemplate | None
    """None where the folder has none: a base model."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """What tokenizer_config.json calls bos_token and so on."""

    def chat_ids(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """The ids of a conversation up to where the assistant's next message begins. Raises
        UserError without a template, or as it does."""
        if self.chat_template is None:
            raise UserError(
                "the model has no chat template (chat_template.jinja, or one in "
                "tokenizer_config.json): use `olmo-jax generate`, or a model tuned to chat"
            )
        text = self.chat_template.render(messages)
        return encode_prompt(self.tokenizer, text, None)


def load_text_files(
    path: str | Path, step: int | None = None, revision: str | None = None
) -> TextFiles:
    """Of any checkpoint that `load` reads. Raises UserError where there is no tokenizer."""
    tokenizer, eos = load_tokenizer(path, step, revision)
    with open_source(path, step, revision) as source:
        files = dict(source.files)
    settings, generation = (
        _object(files, name, path) for name in ("tokenizer_config.json", "generation_config.json")
    )
    more = generation.get("eos_token_id")
    more = more if isinstance(more, list) else [more]
    eos_ids = dict.fromkeys(i for i in (eos, *more) if isinstance(i, int))
    template = _template_source(files, settings)
    special = _special_tokens(settings)
    chat = ChatTemplate(template, special) if template else None
    return TextFiles(tokenizer, tuple(eos_ids), chat, special)


def _template_source(files: Mapping[str, bytes], settings: Mapping[str, object]) -> str | None:
    if (own := files.get("chat_template.jinja")) is not None:
        return own.decode(errors="replace")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = (t for t in found if isinstance(t, dict) and t.get("name") == "default")
        found = next((t.get("template") for t in named), None)
    return found if isinstance(found, str) else None


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """By name, whether they are given as text or as an object with it."""
    out = {}
    for name in _SPECIAL:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            out[name] = token
    return out


def _object(files: Mapping[str, bytes], name: str, path: str | Path) -> dict:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"{path}: {name} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message):
    raise jinja2.TemplateError(message)
