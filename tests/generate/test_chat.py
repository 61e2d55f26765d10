"""Chat templates: the text is transformers', and a template cannot leave its sandbox."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from olmo_jax.errors import UserError
from olmo_jax.generate.chat import ChatTemplate, TextFiles, _special_tokens, _template_source

CHATML = """{{ bos_token }}{% for message in messages %}
    {% if message.role not in ["system", "user", "assistant"] %}
        {{ raise_exception("no role " ~ message.role) }}
    {% endif %}
    {{- "<|" ~ message.role ~ "|>\\n" }}
    {% if message.role == "assistant" %}
        {% generation %}{{ message.content ~ eos_token }}{% endgeneration %}
    {% else %}
        {{- message.content | trim }}
    {% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
    {{- "\\n" }}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}
{% if add_generation_prompt %}{{ "<|assistant|>\\n" }}{% endif %}"""
SETTINGS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
MESSAGES = [
    {"role": "system", "content": "Be <kind> & brief. "},
    {"role": "user", "content": "né 漢字?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "  Why?"},
]


def ours(source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(source, _special_tokens(SETTINGS))


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("tools", [None, [{"name": "é", "a": "<b>"}]])
def test_the_text_is_transformers(more, tools):
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    text = theirs.apply_chat_template(
        MESSAGES, chat_template=CHATML, tools=tools, tokenize=False, add_generation_prompt=more
    )
    assert ours().render(MESSAGES, add_generation_prompt=more, tools=tools) == text
    assert "Yes.</s>" in text


def test_where_a_template_is_found():
    several = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    assert _template_source({}, {"chat_template": ["x", None, {"name": []}, *several]}) == "b"
    assert _template_source({}, {"chat_template": several}) == "b"
    assert _template_source({}, {"chat_template": "c"}) == "c"
    assert _template_source({"chat_template.jinja": b"d"}, {"chat_template": "c"}) == "d"
    assert _template_source({}, json.loads("{}")) is None


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ raise_exception('give a user first') }}", "give a user first"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ strftime_now.__globals__.os }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "too big"),
    ],
)
def test_what_a_template_may_not_do_is_one_line(source, words):
    with pytest.raises(UserError, match="the chat template refuses these messages"):
        ours(source).render(MESSAGES)
    with pytest.raises(UserError, match=words):
        ours(source).render(MESSAGES)


def test_a_model_without_a_template_says_so():
    with pytest.raises(UserError, match="has no chat template"):
        TextFiles(Tokenizer(models.BPE()), (0,), None).chat_ids(MESSAGES)
    with pytest.raises(UserError, match="is not one of jinja's"):
        ours("{% for %}")
