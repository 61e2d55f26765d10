"""Exported models compute in transformers what they compute here, and the reverse.

Tolerances: logits to 1e-5 of the largest, gradients to 1e-4 relative in norm, both in float32: two
programs that sum in another order differ by a few 1e-7 a sum.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import OLMO1, OLMO2, TOKENS, VARIANTS, perturbed
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config, OlmoConfig

import olmo_jax
from olmo_jax.checkpoint import CheckpointConfig, Checkpointer
from olmo_jax.convert.export import convert
from olmo_jax.convert.hf import ARCHITECTURES, rows_of
from olmo_jax.convert.load import load_mean, load_tokenizer
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, bind, parameters
from olmo_jax.ops.cross_entropy import cross_entropy


def save(model: Transformer, folder: Path, tokenizer: bytes | None = None) -> Path:
    """Writes a run folder with one checkpoint of the model."""
    files = {"tokenizer.json": tokenizer} if tokenizer else {}
    config = {"Model": dataclasses.asdict(model.config), "Data": {"eos_token_id": None}}
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    with Checkpointer(checkpoints, CheckpointConfig(), files) as checkpointer:
        checkpointer.save(1, {"params": parameters(model)}, {"config": config})
    return folder


def from_transformers(folder: Path):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model


def our_loss_gradients(model: Transformer) -> dict[str, np.ndarray]:
    """Gradients of the mean cross-entropy by transformers' names and layouts."""
    tokens, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    weights = jnp.full(targets.shape, 1 / targets.size)

    def loss(params):
        bound = bind(model, params)
        return cross_entropy(bound.hidden(tokens), bound.head_DV(), targets, weights, 0.0, 32)[0]

    grads = jax.jit(jax.grad(loss))(parameters(model))
    architecture = ARCHITECTURES[model.config.norm == "rms"]
    out = {}
    for row in rows_of(model.config, architecture):
        node = grads
        for key in row.ours.split("."):
            node = node[key]
        for layer in range(model.config.n_layers) if row.stacked else [None]:
            value = np.asarray(node if layer is None else node[layer])
            out[row.theirs.format(layer=layer)] = value.T if row.transposed else value
    return out


def compare(model: Transformer, theirs) -> tuple[float, float]:
    """The largest logit difference, and the worst gradient error, both relative."""
    tokens = torch.tensor(TOKENS)
    logits = theirs(tokens).logits
    ours = np.asarray(jax.jit(lambda m, t: m(t))(model, TOKENS))
    logit_error = np.abs(logits.detach().numpy() - ours).max() / np.abs(ours).max()
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1)).backward()
    grads = our_loss_gradients(model)
    named = dict(theirs.named_parameters())
    assert set(named) == set(grads)
    gradient_error = max(
        np.linalg.norm(named[name].grad.numpy() - grads[name]) / np.linalg.norm(grads[name])
        for name in grads
    )
    return float(logit_error), float(gradient_error)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def exported(request, tmp_path_factory):
    """A variant, its model, and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("export")
    model = perturbed(VARIANTS[request.param])
    convert(save(model, folder / "run"), folder / "hf", max_shard_bytes=100_000)
    return request.param, model, folder / "hf"


def test_transformers_computes_the_same_logits_and_gradients(exported):
    _, model, folder = exported
    assert (folder / "model.safetensors.index.json").is_file()
    logit_error, gradient_error = compare(model, from_transformers(folder))
    assert logit_error <= 1e-5
    assert gradient_error <= 1e-4


def test_what_transformers_saves_loads_here(exported, tmp_path):
    _, model, folder = exported
    theirs = from_transformers(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    again = olmo_jax.load(tmp_path / "theirs")
    same = jax.tree.map(np.array_equal, parameters(model), parameters(again))
    assert all(jax.tree.leaves(same))
    logit_error, gradient_error = compare(again, theirs)
    assert logit_error <= 1e-5
    assert gradient_error <= 1e-4


ALTERED = {
    "theta": {"rope_theta": 2e4},
    "eps": {"norm_eps": 1e-2},
    "norm place": {"norm_place": "other"},
    "clip": {"clip_qkv": 0.5},
}


@pytest.mark.parametrize("altered", ALTERED)
def test_the_comparison_fails_when_the_architecture_is_altered(exported, altered):
    variant, model, folder = exported
    changes = dict(ALTERED[altered])
    if altered == "norm place":
        changes["norm_place"] = "pre" if model.config.norm_place == "post" else "post"
    if altered == "clip" and variant != "olmo1 clip":
        changes["clip_qkv"] = 0.2
    wrong = bind(
        Transformer(dataclasses.replace(model.config, **changes), kernels=model.kernels),
        parameters(model),
    )
    logit_error, gradient_error = compare(wrong, from_transformers(folder))
    assert logit_error > 1e-5
    assert gradient_error > 1e-4


@pytest.mark.parametrize("cls, config", [(OlmoConfig, OLMO1), (Olmo2Config, OLMO2)])
def test_a_model_made_by_transformers_loads_here(cls, config, tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        cls(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            eos_token_id=3,
            pad_token_id=255,  # torch gives this row no gradient
        )
    )
    theirs.save_pretrained(tmp_path)
    logit_error, gradient_error = compare(olmo_jax.load(tmp_path), theirs)
    assert logit_error <= 1e-5
    assert gradient_error <= 1e-4


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_text(json.dumps({"id": "a", "text": "to be or not to be " * 50}))
    train_tokenizer([str(folder / "a.jsonl")], folder / "tokenizer.json", 260)
    return (folder / "tokenizer.json").read_bytes()


def test_the_tokenizer_travels_along(tmp_path, tokenizer_json):
    run = save(
        perturbed(dataclasses.replace(OLMO2, vocab_size=260, embedding_rows=None)),
        tmp_path / "run",
        tokenizer_json,
    )
    convert(run, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "to be — or not\n to bé"
    assert theirs.encode(text) == load_tokenizer(run)[0].encode(text).ids
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|padding|>")
    for place in (run, tmp_path / "hf"):
        assert load_tokenizer(place)[1] == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 1)


def test_bfloat16_halves_the_bytes_and_loads(tmp_path):
    model = perturbed(OLMO2)
    run = save(model, tmp_path / "run")
    for dtype in ("float32", "bfloat16"):
        convert(run, tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("float32", "bfloat16")]
    assert 1.95 < sizes[0] / sizes[1] < 2
    rounded = jax.tree.map(
        lambda a: np.asarray(a.astype(jnp.bfloat16), np.float32), parameters(model)
    )
    same = jax.tree.map(np.array_equal, rounded, parameters(olmo_jax.load(tmp_path / "bfloat16")))
    assert all(jax.tree.leaves(same))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16


def test_a_soup_is_the_mean(tmp_path):
    models = [perturbed(OLMO2), olmo_jax.init(OLMO2, seed=5)]
    runs = [save(m, tmp_path / str(i)) for i, m in enumerate(models)]
    mean = load_mean(runs, OLMO2)
    jax.tree.map(
        lambda m, a, b: np.testing.assert_allclose(m, (a + b) / 2, rtol=1e-6, atol=1e-7),
        mean,
        *map(parameters, models),
    )
    with pytest.raises(UserError, match="another model: rope_theta"):
        load_mean(runs, dataclasses.replace(OLMO2, rope_theta=1e4))


def test_conversion_writes_all_or_nothing(tmp_path, monkeypatch):
    run = save(perturbed(OLMO2), tmp_path / "run")

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(run, tmp_path / "hf", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    (tmp_path / "hf").mkdir()
    convert(run, tmp_path / "hf")  # an empty folder is fine,
    with pytest.raises(UserError, match="not empty"):
        convert(run, tmp_path / "hf")  # a full one is not overwritten


def test_what_cannot_be_read_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="is no folder; give a run folder"):
        olmo_jax.load(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no model"):
        olmo_jax.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"model_type = 'gpt2'.*reads olmo, olmo2"):
        olmo_jax.load(tmp_path)


def test_a_missing_tensor_is_named(exported, tmp_path):
    _, _, folder = exported
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"7 missing|11 missing"):
        olmo_jax.load(tmp_path)


def test_an_architecture_without_a_transformers_class_is_refused(tmp_path):
    odd = ModelConfig(**{**dataclasses.asdict(OLMO2), "parallel_residual": True})
    run = save(olmo_jax.init(odd), tmp_path / "run")
    with pytest.raises(UserError, match=r"no transformers class .* parallel_residual = True"):
        convert(run, tmp_path / "hf")


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors.index.json", "not json"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../elsewhere"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}'),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, name, content):
    run = save(perturbed(OLMO2), tmp_path / "run")
    convert(run, tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(UserError, match=r"index|outside|missing|tokenizer"):
        olmo_jax.load(tmp_path / "hf")
