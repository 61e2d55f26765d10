"""A tiny OLMo 2 and a tiny Pythia with weights that matter, in our format and in transformers'."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import torch
from transformers import AutoModelForCausalLM

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer
from olmo_jax.convert.export import convert
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, bind, init, parameters

VOCAB = 300
TEXT = "To-morrow, and to-morrow, and to-morrow, creeps in this petty pace from day to day. né 漢字"
OLMO2 = ModelConfig(
    vocab_size=VOCAB,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    mlp_width=48,
    context_length=128,
    init_std=0.2,
)
PYTHIA = dataclasses.replace(
    OLMO2,
    n_kv_heads=None,
    norm="layer",
    norm_eps=1e-5,
    norm_place="pre",
    qk_norm=False,
    bias=True,
    parallel_residual=True,
    mlp="gelu",
    rope_theta=1e4,
    rope_fraction=0.25,
)
FAMILIES = {"olmo2": OLMO2, "pythia": PYTHIA}


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights, those that begin alike (norms, biases) made different."""
    model = init(config, seed)
    leaves, structure = jax.tree.flatten(parameters(model))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        a + 0.1 * jax.random.normal(k, a.shape) if a.std() < 1e-6 else a
        for a, k in zip(leaves, keys, strict=True)
    ]
    return bind(model, jax.tree.unflatten(structure, noisy))


def export(model: Transformer, folder: Path) -> Path:
    """FOLDER with our checkpoint and a tokenizer, FOLDER/hf with transformers'; returns FOLDER."""
    (folder / "checkpoints").mkdir(parents=True)
    documents = folder / "text.jsonl"
    documents.write_text(json.dumps({"id": "a", "text": TEXT * 20}) + "\n")
    train_tokenizer([str(documents)], folder / "tokenizer.json", VOCAB)
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    config = {"Model": dataclasses.asdict(model.config), "Data": {"eos_token_id": 0}}
    with Checkpointer(folder / "checkpoints", CheckpointConfig(), files) as checkpointer:
        checkpointer.save(1, {"params": parameters(model)}, {"config": config})
    convert([folder], folder / "hf")
    return folder


def transformers_model(folder: Path):
    """The exported model, in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()


def close(ours, theirs, tolerance: float = 2e-5) -> bool:
    """Whether the largest difference is at most `tolerance` of the largest value."""
    ours, theirs = jnp.asarray(ours), jnp.asarray(theirs)
    return bool(jnp.abs(ours - theirs).max() <= tolerance * jnp.abs(theirs).max())
