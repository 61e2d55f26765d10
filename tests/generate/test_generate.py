"""Cached decoding against the plain forward pass, and sampling against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer
from olmo_jax.convert.export import convert
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.generate import (
    Engine,
    Request,
    Sampling,
    generate,
    generate_batch,
    generate_text,
)
from olmo_jax.generate.sampling import SamplingRows, sample
from olmo_jax.generate.text import TextStream
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, init, parameters

TINY = ModelConfig(
    vocab_size=128,
    d_model=32,
    n_layers=2,
    n_heads=4,
    mlp_width=48,
    context_length=64,
    init_std=0.3,
)
VARIANTS = {
    "olmo3": dataclasses.replace(
        TINY,
        window_pattern=(5, 0),
        rope_scaling="yarn",
        rope_factor=8.0,
        rope_original_context=16,
    ),
    "olmoe": dataclasses.replace(TINY, norm_place="pre", n_experts=5, experts_per_token=2),
    "pythia": dataclasses.replace(
        TINY,
        norm="layer",
        norm_place="pre",
        qk_norm=False,
        bias=True,
        parallel_residual=True,
        mlp="gelu",
        rope_fraction=0.25,
    ),
    "llama3": dataclasses.replace(
        TINY,
        n_kv_heads=2,
        norm_place="pre",
        qk_norm=False,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_context=16,
    ),
    "mpt": dataclasses.replace(
        TINY,
        norm="layer",
        norm_place="pre",
        qk_norm=False,
        mlp="gelu",
        position="alibi",
        tie_embeddings=True,
    ),
}
PROMPT = [5, 17, 3, 99, 2]


model_of = functools.cache(init)


def uncached(model: Transformer, prompt: tuple[int, ...], n: int) -> list[int]:
    """One prompt, without a cache: the likeliest token after a whole forward pass, n times."""
    row, at = np.zeros((1, model.config.context_length), np.int32), len(prompt)
    row[0, :at] = prompt
    for i in range(at, at + n):
        row[0, i] = forward(model, row)[0, i - 1].argmax()
    return row[0, at : at + n].tolist()


forward = jax.jit(lambda model, tokens_BT: model(tokens_BT))
compiled_sample = jax.jit(sample)


def ragged(model: Transformer, *lengths: tuple[int, int], **options) -> list[Request]:
    """Requests of random prompts of (prompt's, text's) lengths."""
    rng, V = np.random.default_rng(0), model.config.vocab_size
    return [Request(tuple(rng.integers(0, V, p).tolist()), n, **options) for p, n in lengths]


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_ragged_cached_decoding_is_one_by_one_without_a_cache(variant):
    """Five requests in three slots: some wait, and take a slot that another has left; the longest
    are far past the windows of 5, of which prompts fill rings whole and in part."""
    model = model_of(VARIANTS[variant])
    requests = ragged(model, (5, 55), (14, 20), (1, 3), (16, 48), (3, 33))
    for request, completion in zip(requests, generate_batch(model, requests, slots=3), strict=True):
        assert completion.token_ids == uncached(model, request.prompt_ids, request.max_tokens)
        assert completion.finish == "length"


def test_a_cache_grows_with_its_texts(monkeypatch):
    """Windows as large as the first cache, so that rings become whole, and turn, on the way."""
    for name, value in (("_SMALLEST", 8), ("_AHEAD", 1)):
        monkeypatch.setattr(f"olmo_jax.generate.engine.{name}", value)
    model = init(dataclasses.replace(TINY, window_pattern=(12, 0)))
    requests = ragged(model, (3, 20), (9, 50), (15, 9))
    engine, lengths = Engine(model, slots=2), set()
    texts: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            texts[event.id] += event.token_ids
            lengths.add(engine._length)
    assert lengths == {32, 64}
    for request, text in zip(requests, texts.values(), strict=True):
        assert text == uncached(model, request.prompt_ids, request.max_tokens)


def test_transformers_generates_the_same(tmp_path):
    model = model_of(TINY)
    config = {"Model": dataclasses.asdict(TINY), "Data": {}}
    (tmp_path / "checkpoints").mkdir()
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"params": parameters(model)}, {"config": config})
    convert(tmp_path, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    out = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=55, do_sample=False)
    assert out[0, len(PROMPT) :].tolist() == list(generate(model, PROMPT, 55))


def test_decoding_ends_before_the_eos():
    model = model_of(TINY)
    ids = list(generate(model, PROMPT, 50))
    eos = ids[20]
    assert list(generate(model, PROMPT, 50, eos_id=eos)) == ids[: ids.index(eos)]


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)])
def test_cutting_to_one_token_is_greedy(sampling):
    model = model_of(TINY)
    assert list(generate(model, PROMPT, 30, sampling)) == list(generate(model, PROMPT, 30))


MIXED = (
    Sampling(),
    Sampling(1.3, top_k=20),
    Sampling(0.7, top_p=0.9, repetition_penalty=1.3),
    Sampling(1.0, min_p=0.05),
    Sampling(repetition_penalty=1.2),
)


def test_a_text_does_not_depend_on_what_runs_beside_it():
    """Different choices, seeds and lengths share the slots; each text is that of its request alone,
    and so are its log-probabilities, which are the plain forward pass's."""
    model = model_of(TINY)
    plain = ragged(model, (5, 30), (14, 20), (1, 13), (16, 28), (3, 33))
    requests = [
        dataclasses.replace(request, sampling=sampling, seed=i, logprobs=3 if i % 2 else None)
        for i, (request, sampling) in enumerate(zip(plain, MIXED, strict=True))
    ]
    for request, together in zip(requests, generate_batch(model, requests, slots=3), strict=True):
        (alone,) = generate_batch(model, [request])
        assert together.token_ids == alone.token_ids
        if request.logprobs is None:
            assert together.logprobs == []
            continue
        row, n = np.zeros((1, TINY.context_length), np.int32), len(request.prompt_ids)
        row[0, : n + request.max_tokens] = [*request.prompt_ids, *together.token_ids]
        expected = np.asarray(jax.nn.log_softmax(forward(model, row)[0]))[n - 1 :]
        assert len(together.logprobs) == len(together.token_ids)
        for at, found in enumerate(together.logprobs):
            token = together.token_ids[at]
            assert found.logprob == pytest.approx(expected[at, token], abs=1e-4)
            assert [i for i, _ in found.top] == np.argsort(-expected[at])[:3].tolist()


def test_a_cancelled_request_frees_its_slot():
    model = model_of(TINY)
    requests = ragged(model, (5, 50), (14, 20), (1, 13), (16, 28), (3, 33))
    engine = Engine(model, slots=3)
    ids = [engine.submit(request) for request in requests]
    assert (engine.waiting, engine.running) == (5, 0)
    texts: dict[int, list[int]] = {id: [] for id in ids}
    texts |= {event.id: event.token_ids for event in engine.step()}
    assert (engine.waiting, engine.running) == (2, 3)
    for id in (0, 3, 0):  # one that runs, one that waits, one that is no more
        engine.cancel(id)
    assert (engine.waiting, engine.running) == (1, 2)
    while engine.busy:
        for event in engine.step():
            texts[event.id] += event.token_ids
    assert not texts[3] and len(texts[0]) < 50
    for id in (1, 2, 4):
        assert texts[id] == uncached(model, requests[id].prompt_ids, requests[id].max_tokens)
    assert engine.tokens == sum(map(len, texts.values()))
    assert engine.prompt_tokens == 5 + 14 + 1 + 3


def test_the_seed_decides_the_text():
    model, sampling = model_of(TINY), Sampling(1.0)
    a, again, b = (list(generate(model, PROMPT, 30, sampling, seed=s)) for s in (1, 1, 2))
    assert a == again != b


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(1.0), 6),
        (Sampling(0.5), 6),
        (Sampling(1.0, top_k=3), 3),
        (Sampling(1.0, top_p=0.8), 3),  # 0.5 and 0.29 do not reach it
        (Sampling(1.0, top_k=3, top_p=0.89), 3),  # of what top_k leaves, two have 0.888
        (Sampling(1.0, min_p=0.15), 3),
        (Sampling(1.0, repetition_penalty=1.5), 6),
    ],
)
def test_frequencies_are_the_softmax_of_what_is_kept(sampling, kept):
    probabilities = np.array([0.05, 0.5, 0.04, 0.29, 0.02, 0.1])
    penalty = np.where(np.arange(6) == 1, sampling.repetition_penalty, 1)
    weights = probabilities ** (penalty / sampling.temperature)  # logits below 0 are multiplied
    weights[np.argsort(-weights)[kept:]] = 0
    expected = weights / weights.sum()
    n = 20_000
    logits_V1 = jnp.log(jnp.asarray(probabilities, jnp.float32))[:, None]
    rows = SamplingRows.of([(sampling, seed) for seed in range(n)])
    seen_BV = jnp.zeros((n, 6), bool).at[:, 1].set(True)
    draws = compiled_sample(jnp.tile(logits_V1, n), rows, seen_BV, jnp.full(n, 7))
    got = np.bincount(draws, minlength=6) / n
    assert np.all(got[expected == 0] == 0)
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert np.all(np.abs(got - expected) <= 5 * deviation + 1e-12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_text('{"id": "a", "text": "né ñandú 漢字 🙂"}\n')
    return train_tokenizer([str(folder / "a.jsonl")], folder / "tokenizer.json", 258)


def shown(tokenizer, ids, stop=()) -> tuple[list[str], TextStream]:
    """What a stream shows when ids come one by one."""
    stream = TextStream(tokenizer, [2], stop)
    return [*(stream.push([i]) for i in ids), stream.push([], last=True)], stream


def test_streamed_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    text = "né 漢字 🙂 ok"
    ids = tokenizer.encode(text).ids  # bytes: characters of up to four tokens
    pieces, _ = shown(tokenizer, ids)
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) == len(text)
    cut = shown(tokenizer, ids[:-4])[0]  # in the middle of 🙂
    assert "".join(cut) == tokenizer.decode(ids[:-4])


@pytest.mark.parametrize(
    "stop, kept",
    [
        (["ob"], "ab ab ab"),
        (["ab a", "zz"], ""),
        (["b aq", " abo"], "ab ab"),
        (["bab"], "ab ab abo"),
        (["obabx", "o"], "ab ab ab"),
        (["babx"], "ab ab abobab"),
    ],
)
def test_nothing_of_a_stop_string_is_shown_and_all_else_is(tokenizer, stop, kept):
    text = "ab ab abobab"
    pieces, stream = shown(tokenizer, tokenizer.encode(text).ids, stop)
    assert "".join(pieces) == kept
    assert stream.stopped == any(s in text for s in stop)


def test_text_ends_at_the_models_own_eos_and_not_at_the_tokenizers(tokenizer):
    model = init(dataclasses.replace(TINY, vocab_size=300))

    def ids(*eos_ids, stop=()):
        kept: list[int] = []
        options = {"eos_ids": eos_ids, "stop": stop, "ids": kept}
        text = "".join(generate_text(model, tokenizer, "n", 50, **options))
        assert stop or text == tokenizer.decode(kept, skip_special_tokens=False)
        return kept, text

    whole, text = ids()
    assert len(whole) == 50
    eos = whole[20]
    assert ids(eos)[0] == whole[: whole.index(eos)]
    begun = list(generate(model, [eos], 5))  # an empty prompt begins a document
    kept: list[int] = []
    list(generate_text(model, tokenizer, "", 5, eos_ids=(eos,), ids=kept))
    assert kept == (begun[: begun.index(eos)] if eos in begun else begun)
    stop = text[10:13]
    assert ids(stop=(stop,))[1] == text[: text.index(stop)]


@pytest.mark.parametrize(
    "prompt, max_tokens, words",
    [
        ([], 5, "has no tokens"),
        ([5], 0, "at least 1"),
        ([500], 5, "outside the vocabulary"),
        ([5] * 40, 30, "exceed the model's context of 64"),
    ],
)
def test_bad_requests_are_refused(prompt, max_tokens, words):
    with pytest.raises(UserError, match=words):
        generate(model_of(TINY), prompt, max_tokens)


@pytest.mark.parametrize("values", [(-1.0, None, 1.0), (1.0, 0, 1.0), (1.0, None, 0.0)])
def test_bad_sampling_is_refused(values):
    with pytest.raises(UserError):
        Sampling(*values)
