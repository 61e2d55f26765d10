"""Streamed text is the whole text, cut where it has to be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_server import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from olmo_jax.generate.text import TextStream


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """LLaMA's kind: a word's space belongs to it, but for the first."""
    words = ["▁a", "▁the", "b", "ab", "▁", "<0xC3>", "<0xA9>", "<0xF0>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def streamed(tokenizer, ids, stops) -> tuple[list[str], TextStream]:
    stream, pieces = TextStream(tokenizer, [], stops), []
    for i in ids:
        pieces.append(stream.push([i]))
        if stream.stopped:
            break
    else:
        pieces.append(stream.push([], last=True))
    return pieces, stream


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=40))
def test_pieces_join_to_the_decoding_of_any_ids(byte_level, ids):
    pieces, _ = streamed(byte_level, ids, [])
    assert "".join(pieces) == byte_level.decode(ids, skip_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12))
def test_spaces_between_words_are_kept(sentencepiece, ids):
    pieces, _ = streamed(sentencepiece, ids, [])
    assert "".join(pieces) == sentencepiece.decode(ids, skip_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab c", max_size=30),
    st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(byte_level, text, stops):
    """One byte a token, so that the first to be complete is what counts."""
    ids = [byte_level.token_to_id("Ġ" if c == " " else c) for c in text]
    pieces, stream = streamed(byte_level, ids, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(pieces) == text and not stream.stopped
        return
    first = min(ends)
    longest = max(len(stop) for stop in stops if text[:first].endswith(stop))
    assert "".join(pieces) == text[: first - longest] and stream.stopped
    # Nothing that was given out had to be taken back.
    for i in range(len(pieces)):
        assert not any(stop in "".join(pieces[:i]) for stop in stops)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 299), max_size=40),
    st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text("ab c", max_size=30),
)
def test_the_text_does_not_depend_on_how_many_ids_come_at_once(byte_level, ids, stops, text):
    ids += [byte_level.token_to_id("Ġ" if c == " " else c) for c in text]
    pieces, one_by_one = streamed(byte_level, ids, stops)
    at_once = TextStream(byte_level, [], stops)
    assert at_once.push(ids, last=True) == "".join(pieces)
    assert (at_once.used, at_once.stopped) == (one_by_one.used, one_by_one.stopped)
    assert one_by_one.stopped or at_once.used == len(ids)


def test_whole_characters_only(byte_level):
    ids = byte_level.encode("漢🙂", add_special_tokens=False).ids
    pieces, _ = streamed(byte_level, [ids[0], *ids], [])
    assert all(
        piece in ("", "漢", "🙂") or piece.startswith("\N{REPLACEMENT CHARACTER}")
        for piece in pieces
    )


def test_a_token_with_more_after_the_stop_string_is_cut(byte_level):
    ids = byte_level.encode("to-morrow", add_special_tokens=False).ids
    assert len(ids) < 5
    pieces, stream = streamed(byte_level, ids, ["mo"])
    assert "".join(pieces) == "to-" and stream.stopped


def without_halves(text: str) -> str:
    return text.replace("\N{REPLACEMENT CHARACTER}", "")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=12), st.lists(st.integers(0, 299), max_size=40))
def test_the_text_is_what_follows_any_ids(byte_level, prompt, ids):
    """Half a character, for one."""
    stream = TextStream(byte_level, prompt)
    text = "".join(stream.push([i]) for i in ids) + stream.push([], last=True)
    before, whole = (
        byte_level.decode(part, skip_special_tokens=False) for part in (prompt, prompt + ids)
    )
    assert without_halves(before) + without_halves(text) == without_halves(whole)


def test_nothing_of_a_prompt_that_ends_in_half_a_character_is_repeated(byte_level):
    half = byte_level.encode("漢", add_special_tokens=False).ids[:1]
    prompt = byte_level.encode("xyz abc", add_special_tokens=False).ids + half
    for text in ("hello", "\N{REPLACEMENT CHARACTER}hello"):
        stream = TextStream(byte_level, prompt)
        ids = byte_level.encode(text, add_special_tokens=False).ids
        assert "".join(stream.push([i]) for i in ids) == text
