"""`load`: any checkpoint that this program knows, as a model."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from olmo_jax.convert.average import open_mean, refuse_other_model
from olmo_jax.convert.rows import with_rows
from olmo_jax.convert.source import Source, open_moments, open_source, parse_tokenizer
from olmo_jax.convert.table import leading_axes, weight_axes
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, abstract_model, bind, parameters


def load(path: str | Path, step: int | None = None, revision: str | None = None) -> Transformer:
    """A model with the weights of a checkpoint: a run folder (the newest, or `step`), one of its
    checkpoints, or another program's folder; on this machine, at gs://, s3:// or http(s)://, or a
    hub id (of a `revision`). Weights become float32. Raises UserError.
    """
    with open_source(path, step, revision) as source:
        model = abstract_model(source.config)
        return bind(model, _read_parameters(source, parameters(model), path))


def load_tokenizer(
    path: str | Path, step: int | None = None, revision: str | None = None
) -> tuple[Tokenizer, int | None]:
    """The tokenizer that lies with a checkpoint (as `load` takes it), and the id that ends a
    document: the model's own, or where it gives none what the tokenizer calls <|endoftext|>.
    UserError without a tokenizer.
    """
    with open_source(path, step, revision) as source:
        if "tokenizer.json" not in source.files:
            raise UserError(f"{path}: the checkpoint has no tokenizer.json")
        tokenizer = parse_tokenizer(source.files["tokenizer.json"], path)
        eos = source.eos_token_id
        return tokenizer, tokenizer.token_to_id("<|endoftext|>") if eos is None else eos


def fingerprint(model: Transformer) -> str:
    """Of the architecture and of a sample of every weight and layer: what was made by it belongs
    to it."""
    digest = hashlib.sha256(repr(model.config).encode())
    for weight in jax.tree.leaves(parameters(model)):
        stride = max(1, len(weight) // 128)  # rows of an embedding; each one of the layers
        at = (0,) * max(0, weight.ndim - 2)
        digest.update(np.asarray(weight[(slice(None, None, stride), *at)][..., :64]).tobytes())
    return digest.hexdigest()


def load_sharded(paths: Sequence[str | Path], config: ModelConfig, shardings: Any) -> dict:
    """The weights of a checkpoint (or the uniform mean of several, a soup) as float32 arrays on
    the devices that `shardings`, a tree like `parameters`, names.

    Each weight is put together layer by layer and only where a device of this process holds a part
    of it: no host ever has more than one weight beside its devices' own. The embedding gets
    `config`'s rows (see rows.py). Raises UserError when a checkpoint is not of `config`'s
    architecture.
    """
    with open_mean(paths, rows=config.rows) as source:
        refuse_other_model(source.config, config, paths[0])
        return _placed(source, shardings)


def load_moments(
    path: str | Path, config: ModelConfig, shardings: Any
) -> tuple[int, dict, dict] | None:
    """AdamW's steps, and its first and second moments as `load_sharded` gives weights, where
    another program's checkpoint has them."""
    moments = open_moments(path)
    if moments is None:
        return None
    first, second = (
        _placed(with_rows(source, config.rows), shardings)
        for source in (moments.first, moments.second)
    )
    return moments.steps, first, second


def _placed(source: Source, shardings: Any) -> dict:
    """Every weight of a source, each device's part of it."""
    axes = weight_axes(source.config)

    def place(keys, shape, sharding):
        name = ".".join(key.key for key in keys)
        leading = leading_axes(axes[name])

        def part(index: Any) -> np.ndarray:
            """What one device holds."""
            spans = [range(*i.indices(n)) for i, n in zip(index, shape.shape, strict=True)]
            out = np.empty([len(span) for span in spans], np.float32)
            for at in itertools.product(*(enumerate(span) for span in spans[:leading])):
                to, of = [i for i, _ in at], [i for _, i in at]
                out[tuple(to)] = source.read(name, *of)[index[leading:]]
            return out

        return jax.make_array_from_callback(shape.shape, sharding, part)

    shapes = parameters(abstract_model(source.config))
    return jax.tree.map_with_path(place, shapes, shardings)


def _read_parameters(source: Source, shapes: dict, path: str | Path) -> dict:
    def read(keys, shape):
        name = ".".join(key.key for key in keys)
        values = np.asarray(source.read(name), np.float32)
        if values.shape != shape.shape:
            raise UserError(f"{path}: {name} has shape {values.shape}, wanted {shape.shape}")
        return values

    return jax.tree.map_with_path(read, shapes)
