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
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FlexOlmoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
)

import olmo_jax
from olmo_jax.checkpoint import CheckpointConfig, Checkpointer
from olmo_jax.convert.export import convert
from olmo_jax.convert.hf import ARCHITECTURES, rows_of
from olmo_jax.convert.load import load_sharded, load_tokenizer
from olmo_jax.convert.safetensors_io import SafetensorsFolder
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, abstract_model, bind, parameters
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


def our_loss_gradients(model: Transformer, model_type: str) -> dict[str, np.ndarray]:
    """Gradients of the mean cross-entropy by transformers' names and layouts."""
    tokens, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    weights = jnp.full(targets.shape, 1 / targets.size)

    def loss(params):
        bound = bind(model, params)
        return cross_entropy(bound.hidden(tokens), bound.head_DV(), targets, weights, 0.0, 32)[0]

    grads = jax.jit(jax.grad(loss))(parameters(model))
    architecture = next(a for a in ARCHITECTURES if a.model_type == model_type)
    out = {}
    for row in rows_of(model.config, architecture):
        for name, at in row.places(model.config):
            parts = [np.asarray(at_path(grads, path)[at]) for path in row.ours]
            out[name] = row.assemble(parts, model.config)
    return out


def at_path(tree, path: str):
    for key in path.split("."):
        tree = tree[key]
    return tree


def compare(model: Transformer, theirs) -> tuple[float, float]:
    """The largest logit difference, and the worst gradient error, both relative."""
    tokens = torch.tensor(TOKENS)
    logits = theirs(tokens).logits
    ours = np.asarray(jax.jit(lambda m, t: m(t))(model, TOKENS))
    logit_error = np.abs(logits.detach().numpy() - ours).max() / np.abs(ours).max()
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1)).backward()
    grads = our_loss_gradients(model, theirs.config.model_type)
    # In memory, transformers 5 calls GPT-NeoX's head otherwise than in its files.
    head = {"lm_head.weight": "embed_out.weight"} if "embed_out.weight" in grads else {}
    named = {head.get(name, name): p.grad.numpy() for name, p in theirs.named_parameters()}
    named = apart(named)
    assert set(named) == set(grads)
    gradient_error = max(
        np.linalg.norm(named[name] - grads[name])
        / max(np.linalg.norm(grads[name]), 1e-30)  # an expert that no token visits has none
        for name in grads
    )
    return float(logit_error), float(gradient_error)


def apart(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts, which transformers 5 holds fused in memory, by the names that they have in files."""
    out = dict(named)
    for name in [name for name in named if ".mlp.experts." in name]:
        layer, _, kind = name.rpartition(".")
        for expert, matrix in enumerate(out.pop(name)):
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for one, part in zip(kinds, np.split(matrix, len(kinds)), strict=True):
                out[f"{layer}.{expert}.{one}.weight"] = part
    return out


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


def alterations(config: ModelConfig) -> dict[str, dict]:
    """Changes that leave the weights' shapes alone and that each comparison has to notice."""
    out = {
        "eps": {"norm_eps": 1e-2},
        "norm place": {"norm_place": "pre" if config.norm_place == "post" else "post"},
        "clip": {"clip_qkv": 0.5 if config.clip_qkv else 0.2},
        "parallel": {"parallel_residual": not config.parallel_residual},
    }
    if config.n_experts:
        out["top-k normalization"] = {
            "normalize_expert_weights": not config.normalize_expert_weights
        }
        out["top-k"] = {"experts_per_token": 1}
    if config.mlp != "swiglu":
        out["gelu"] = {"mlp": "gelu" if config.mlp == "gelu_tanh" else "gelu_tanh"}
    if config.position == "alibi":
        return out | {"alibi": {"position": "rope"}}
    out["theta"] = {"rope_theta": 2 * config.rope_theta}
    out["fraction"] = {"rope_fraction": 0.5}
    if any(config.windows):
        for by in (-1, 1):
            pattern = tuple(w and w + by for w in config.window_pattern)
            out[f"window {by:+}"] = {"window_pattern": pattern}
        out["window place"] = {"window_pattern": config.window_pattern[::-1]}
    if config.rope_scaling != "none":
        out["factor"] = {"rope_factor": config.rope_factor * 1.01}
        out["unscaled"] = {"rope_scaling": "none", "rope_factor": 1.0}
    if config.rope_scaling == "yarn":
        out["attention factor"] = {"rope_attention_factor": 1.0}
        out["beta fast"] = {"rope_beta_fast": 4.0}
        out["beta slow"] = {"rope_beta_slow": 0.5}
    if config.rope_scaling in ("yarn", "llama3"):
        out["original context"] = {"rope_original_context": 48}
    if config.rope_scaling == "llama3":
        out["low"] = {"rope_low_freq_factor": 2.0}
        out["high"] = {"rope_high_freq_factor": 3.0}
    return out


def test_the_comparison_fails_when_the_architecture_is_altered(exported):
    _, model, folder = exported
    theirs = from_transformers(folder)
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        wanted = theirs(tokens).logits.numpy()
    for name, changes in alterations(model.config).items():
        config = dataclasses.replace(model.config, **changes)
        wrong = bind(abstract_model(config, model.kernels), parameters(model))
        logits = np.asarray(jax.jit(lambda m, t: m(t))(wrong, TOKENS))
        assert np.abs(wanted - logits).max() > 3e-5 * np.abs(wanted).max(), name


@pytest.mark.parametrize("changes", [{"rope_theta": 2e4}, {"norm_eps": 1e-2}, {"clip_qkv": 0.2}])
def test_the_gradients_comparison_fails_too(changes, tmp_path):
    model = perturbed(OLMO1)
    convert(save(model, tmp_path / "run"), tmp_path / "hf")
    config = dataclasses.replace(model.config, **changes)
    wrong = bind(abstract_model(config, model.kernels), parameters(model))
    assert compare(wrong, from_transformers(tmp_path / "hf"))[1] > 1e-4


THEIRS = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    eos_token_id=3,
    pad_token_id=255,  # torch gives this row no gradient
)
YARN = dict(
    rope_type="yarn",
    factor=8.0,
    original_max_position_embeddings=16,
    beta_fast=4,
    beta_slow=0.25,
    attention_factor=1.2079441541679836,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    original_max_position_embeddings=32,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
NEOX = {name: value for name, value in THEIRS.items() if name != "num_key_value_heads"}
SOME_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, norm_topk_prob=True)
MADE = {
    "olmo": OlmoConfig(**THEIRS),
    "olmo2": Olmo2Config(**THEIRS),
    "olmo3": Olmo3Config(**THEIRS, sliding_window=7),
    "olmo3 long": Olmo3Config(**THEIRS, sliding_window=7, rope_theta=5e5, rope_scaling=YARN),
    "olmoe": OlmoeConfig(**THEIRS, **SOME_EXPERTS),
    "flex olmo": FlexOlmoConfig(**THEIRS, **SOME_EXPERTS),
    "llama": LlamaConfig(**THEIRS),
    "llama3": LlamaConfig(**THEIRS, rope_theta=5e3, rope_scaling=LLAMA3, head_dim=8),
    "pythia": GPTNeoXConfig(**NEOX, rotary_pct=0.5, rotary_emb_base=5000),
    "neox": GPTNeoXConfig(**NEOX, use_parallel_residual=False, hidden_act="gelu_new"),
    "mpt": MptConfig(
        vocab_size=256, d_model=64, n_heads=4, n_layers=3, max_seq_len=64, initializer_range=0.2
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_model_made_by_transformers_loads_here(name, tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(MADE[name])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    logit_error, gradient_error = compare(olmo_jax.load(tmp_path / "theirs"), theirs)
    assert logit_error <= 1e-5
    assert gradient_error <= 1e-4
    # and goes back with every name, shape and byte
    convert(tmp_path / "theirs", tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True)
    before, after = (SafetensorsFolder(tmp_path / name) for name in ("theirs", "back"))
    assert before.names() == after.names()
    for tensor in before.names():
        assert before.shape(tensor) == after.shape(tensor)
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor


def test_the_buffers_of_pythias_files_are_passed_over(tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(MADE["pythia"])
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(4):
        name = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{name}.bias"] = torch.ones(
            1, 1, 64, 64, dtype=(torch.bool, torch.uint8)[layer % 2]
        )
        tensors[f"{name}.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert compare(olmo_jax.load(tmp_path), theirs)[0] <= 1e-5
    tensors["embed_out.weight"] = tensors["embed_out.weight"].to(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"embed_out\.weight has type I32: weights are read of F32"):
        olmo_jax.load(tmp_path)


def test_the_embedding_gets_the_rows_that_the_target_has(tmp_path):
    """OLMo 3's recipe has 100,352 rows, its transformers folders 100,278."""
    model = perturbed(dataclasses.replace(OLMO2, vocab_size=250, embedding_rows=256))
    run = save(model, tmp_path / "run")
    convert(run, tmp_path / "cut", rows=250, verify=True)
    cut = olmo_jax.load(tmp_path / "cut")
    assert cut.config.rows == 250
    np.testing.assert_allclose(cut(TOKENS % 250), model(TOKENS % 250)[..., :250], rtol=1e-6)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one_device, parameters(model))
    again = load_sharded([tmp_path / "cut"], model.config, shardings)
    for path, axis in (("embed", 0), ("lm_head", 1)):
        got, had = (
            np.moveaxis(np.asarray(p[path]["weight"]), axis, 0) for p in (again, parameters(model))
        )
        assert np.array_equal(got[:250], had[:250]) and not got[250:].any()
    with pytest.raises(UserError, match=r"249 rows .* too few .* 250 tokens"):
        convert(tmp_path / "cut", tmp_path / "no", rows=249)


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
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one_device, parameters(models[0]))
    mean = load_sharded(runs, OLMO2, shardings)
    jax.tree.map(
        lambda m, a, b: np.testing.assert_allclose(m, (a + b) / 2, rtol=1e-6, atol=1e-7),
        mean,
        *map(parameters, models),
    )
    with pytest.raises(UserError, match="another model: rope_theta"):
        load_sharded(runs, dataclasses.replace(OLMO2, rope_theta=1e4), shardings)


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
    config["n_layers" if config["model_type"] == "mpt" else "num_hidden_layers"] += 1
    config.pop("layer_types", None)  # the class's default has any number
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"\d+ missing"):
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
