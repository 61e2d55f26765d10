"""Cached decoding against the plain forward pass, and sampling against its definition."""

import dataclasses

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
from olmo_jax.generate import Sampling, generate, generate_text
from olmo_jax.generate.sampling import SamplingRows, sample
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import init, parameters

TINY = ModelConfig(
    vocab_size=128,
    d_model=32,
    n_layers=4,
    n_heads=4,
    mlp_width=48,
    context_length=256,
    init_std=0.3,
)
VARIANTS = {
    "plain": TINY,
    "gqa": dataclasses.replace(TINY, n_kv_heads=2),
    "windows": dataclasses.replace(TINY, window_pattern=(5, 5, 5, 0)),
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "olmo3 long": dataclasses.replace(
        TINY,
        window_pattern=(5, 5, 5, 0),
        rope_scaling="yarn",
        rope_factor=8.0,
        rope_original_context=64,
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
        rope_original_context=64,
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_greedy_decoding_is_the_uncached_forwards_argmax(variant):
    model = init(VARIANTS[variant])
    ids = list(generate(model, PROMPT, 200))
    assert len(ids) == 200 and len(set(ids)) > 5
    row = np.array([[*PROMPT, *ids]])
    logits = jax.jit(lambda m, t: m(t))(model, row)[0]
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist() == ids


def test_transformers_generates_the_same(tmp_path):
    model = init(TINY)
    config = {"Model": dataclasses.asdict(TINY), "Data": {}}
    (tmp_path / "checkpoints").mkdir()
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"params": parameters(model)}, {"config": config})
    convert(tmp_path, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    out = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=60, do_sample=False)
    assert out[0, len(PROMPT) :].tolist() == list(generate(model, PROMPT, 60))


def test_decoding_ends_before_the_eos():
    model = init(TINY)
    ids = list(generate(model, PROMPT, 50))
    eos = ids[20]
    assert list(generate(model, PROMPT, 50, eos_id=eos)) == ids[: ids.index(eos)]


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)])
def test_cutting_to_one_token_is_greedy(sampling):
    model = init(TINY)
    assert list(generate(model, PROMPT, 30, sampling)) == list(generate(model, PROMPT, 30))


def test_the_seed_decides_the_text():
    model, sampling = init(TINY), Sampling(1.0)
    a, again, b = (list(generate(model, PROMPT, 30, sampling, seed=s)) for s in (1, 1, 2))
    assert a == again != b


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(1.0), 6),
        (Sampling(0.5), 6),
        (Sampling(1.0, top_k=3), 3),
        (Sampling(1.0, top_p=0.8), 3),  # 0.5 and 0.3 do not quite reach it in float32
    ],
)
def test_frequencies_are_the_softmax_of_what_is_kept(sampling, kept):
    probabilities = np.array([0.05, 0.5, 0.04, 0.29, 0.02, 0.1])
    weights = probabilities ** (1 / sampling.temperature)
    weights[np.argsort(-probabilities)[kept:]] = 0
    expected = weights / weights.sum()
    n = 20_000
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (n, 1))
    rows = SamplingRows.of([(sampling, seed) for seed in range(n)])
    draws = sample(logits, rows, jnp.zeros(logits.shape, bool), jnp.full(n, 7))
    got = np.bincount(draws, minlength=6) / n
    assert np.all(got[expected == 0] == 0)
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert np.all(np.abs(got - expected) <= 5 * deviation + 1e-12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_text('{"id": "a", "text": "né ñandú 漢字 🙂"}\n')
    return train_tokenizer([str(folder / "a.jsonl")], folder / "tokenizer.json", 258)


def test_streamed_pieces_are_whole_characters_and_join_to_the_text(tokenizer, monkeypatch):
    text = "né 漢字 🙂 ok"
    ids = tokenizer.encode(text).ids  # bytes: characters of up to four tokens
    monkeypatch.setattr("olmo_jax.generate.text.generate", lambda *_, **__: iter(ids))
    pieces = list(generate_text(init(TINY), tokenizer, "x", 10, eos_id=None))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_text_ends_at_the_models_own_eos_and_not_at_the_tokenizers(tokenizer):
    model = init(dataclasses.replace(TINY, vocab_size=300))

    def ids(eos_id):
        kept: list[int] = []
        text = "".join(generate_text(model, tokenizer, "n", 50, eos_id=eos_id, ids=kept))
        assert text == tokenizer.decode(kept, skip_special_tokens=False)
        return kept

    whole = ids(None)
    assert len(whole) == 50
    eos = whole[20]
    assert ids(eos) == whole[: whole.index(eos)]
    begun = list(generate(model, [eos], 5))  # an empty prompt begins a document
    kept: list[int] = []
    list(generate_text(model, tokenizer, "", 5, eos_id=eos, ids=kept))
    assert kept == (begun[: begun.index(eos)] if eos in begun else begun)


@pytest.mark.parametrize(
    "prompt, max_tokens, words",
    [
        ([], 5, "has no tokens"),
        ([5], 0, "at least 1"),
        ([500], 5, "outside the vocabulary"),
        ([5] * 200, 100, "exceed the model's context of 256"),
    ],
)
def test_bad_requests_are_refused(prompt, max_tokens, words):
    with pytest.raises(UserError, match=words):
        generate(init(TINY), prompt, max_tokens)


@pytest.mark.parametrize("values", [(-1.0, None, 1.0), (1.0, 0, 1.0), (1.0, None, 0.0)])
def test_bad_sampling_is_refused(values):
    with pytest.raises(UserError):
        Sampling(*values)
