"""Held-out files: every token scored once after what came before it, and checked beforehand."""

import math

import jax
import numpy as np
import pytest

from olmo_jax.data.tokenizer import token_bytes, train_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import init
from olmo_jax.parallel.mesh import MeshConfig, build_mesh
from olmo_jax.train.evaluate import HeldOut

VOCABULARY, T, EOS = 300, 8, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_text('{"id": "a", "text": "to be or not to be"}\n')
    return train_tokenizer([str(folder / "a.jsonl")], folder / "t.json", 260)


@pytest.fixture
def open_files(tmp_path, tokenizer):
    def open_files(*files, batch_size=2, known=tokenizer):
        for k, tokens in enumerate(files):
            np.asarray(tokens, np.uint16).tofile(tmp_path / f"{k}.npy")
        return HeldOut(
            [str(tmp_path / "*.npy")],
            sequence_length=T,
            batch_size=batch_size,
            vocab_size=VOCABULARY,
            eos_token_id=EOS,
            document_masking=False,
            tokenizer=known,
            mesh=build_mesh(MeshConfig(), jax.devices()[:1]),
        )

    return open_files


def test_the_loss_is_that_of_windows_scored_one_by_one(open_files, tokenizer):
    rng = np.random.default_rng(0)
    files = [rng.integers(0, 260, n) for n in (1, 16, 53)]
    model = init(
        ModelConfig(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2, mlp_width=32)
    )
    nats = 0.0
    for tokens in files:
        stream = np.concatenate([[EOS], tokens])
        for start in range(0, len(tokens), T):
            window = stream[start : start + T + 1]
            logits_TV = np.asarray(model(window[None, :-1]))[0].astype(np.float64)
            of_each = (
                np.log(np.exp(logits_TV).sum(-1)) - logits_TV[range(len(window) - 1), window[1:]]
            )
            nats += of_each.sum()
    sizes = token_bytes(tokenizer)
    for batch_size in (1, 2, 5):
        found = open_files(*files, batch_size=batch_size)(model, 1).metrics
        assert found["heldout/loss"] == pytest.approx(nats / 70, rel=1e-5)
        n_bytes = sum(int(sizes[tokens].sum()) for tokens in files)
        assert found["heldout/bytes"] == n_bytes
        assert found["heldout/bits_per_byte"] == pytest.approx(
            nats / math.log(2) / n_bytes, rel=1e-5
        )


@pytest.mark.parametrize("bad", [VOCABULARY, 280])
def test_an_id_that_is_no_tokens_is_named_before_training(open_files, bad):
    tokens = np.full(100_000, 7)
    tokens[45_678] = bad  # between the blocks that are looked at when a file is opened
    with pytest.raises(UserError, match=rf"0\.npy: token {bad} at token offset 45678"):
        open_files(tokens)
    if bad < VOCABULARY:  # without a tokenizer there is no table that it could be missing from
        assert open_files(tokens, known=None).table()[0]["bytes"] is None
