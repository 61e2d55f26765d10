"""`load`: any checkpoint that this program knows, as a model."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from olmo_jax.convert.source import Source, open_source, parse_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, abstract_model, bind, parameters

# What no weight's shape shows, and the weights were trained with.
_MUST_AGREE = (
    "norm",
    "norm_eps",
    "norm_place",
    "clip_qkv",
    "parallel_residual",
    "mlp",
    "rope_theta",
    "rope_fraction",
    "window_pattern",
)


def load(path: str | Path, step: int | None = None) -> Transformer:
    """A model with the weights of a checkpoint: a run folder (the newest, or `step`), one of its
    checkpoints, or a transformers folder. Weights become float32. Raises UserError.
    """
    with open_source(path, step) as source:
        model = abstract_model(source.config)
        return bind(model, _read_parameters(source, parameters(model), path))


def load_tokenizer(path: str | Path) -> tuple[Tokenizer, int | None]:
    """The tokenizer that lies with a checkpoint, and the id that ends a document: the model's own,
    or where it gives none what the tokenizer calls <|endoftext|>. UserError without a tokenizer.
    """
    with open_source(path) as source:
        if source.tokenizer_json is None:
            raise UserError(f"{path}: the checkpoint has no tokenizer.json")
        tokenizer, eos = parse_tokenizer(source.tokenizer_json, path), source.eos_token_id
        return tokenizer, tokenizer.token_to_id("<|endoftext|>") if eos is None else eos


def load_mean(paths: Sequence[str | Path], config: ModelConfig) -> dict:
    """The uniform mean of several checkpoints' weights (a soup), or one's, as a parameter tree.

    Raises UserError when one of them is not of `config`'s shape.
    """
    shapes = parameters(abstract_model(config))
    total = None
    for path in paths:
        with open_source(path) as source:
            refuse_other_model(source.config, config, path)
            tree = _read_parameters(source, shapes, path)
        total = tree if total is None else jax.tree.map(np.add, total, tree)
    return jax.tree.map(lambda a: a / np.float32(len(paths)), total)


def refuse_other_model(saved: ModelConfig, config: ModelConfig, path: str | Path) -> None:
    """Raises UserError when weights of `saved`, in `path`, mean something else in `config`, though
    they may have its shapes."""
    differs = [
        f"{field} = {getattr(saved, field)!r} (wanted {getattr(config, field)!r})"
        for field in _MUST_AGREE
        if getattr(saved, field) != getattr(config, field)
    ]
    if differs:
        raise UserError(f"{path}: is another model: {', '.join(differs)}")


def _read_parameters(source: Source, shapes: dict, path: str | Path) -> dict:
    def read(keys, shape):
        name = ".".join(key.key for key in keys)
        values = np.asarray(source.read(name), np.float32)
        if values.shape != shape.shape:
            raise UserError(f"{path}: {name} has shape {values.shape}, wanted {shape.shape}")
        return values

    return jax.tree.map_with_path(read, shapes)
