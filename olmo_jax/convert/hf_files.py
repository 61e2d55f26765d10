"""Writes the folder that PyTorch's transformers loads with no code of ours."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from olmo_jax.convert.card import model_card
from olmo_jax.convert.hf import architecture_of, rows_of
from olmo_jax.convert.hf_config import to_hf_config
from olmo_jax.convert.safetensors_io import write_folder
from olmo_jax.convert.source import Source
from olmo_jax.convert.target import Options, planned, stored_dtype

_EOS_NAMES = ("<|endoftext|>", "|||IP_ADDRESS|||")
_PAD_NAMES = ("<|pad|>", "<|padding|>", "<pad>")


def write(folder: Path, source: Source, options: Options) -> None:
    """config.json, safetensors (in shards, with an index), generation_config.json, the tokenizer's
    files where the source has any, and a model card. Raises UserError when no transformers class
    computes this model, OSError from the disk."""
    config, architecture = source.config, architecture_of(source.config)
    tensors = planned(source, rows_of(config, architecture), options)
    files = _small_files(source, options.dtype or stored_dtype(source, ["embed.weight"]))
    files["README.md"] = model_card(source, architecture.class_name).encode()
    write_folder(folder, tensors, options.max_shard_bytes, options.progress)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else _dumps(content))


def _small_files(source: Source, dtype: str) -> dict[str, Any]:
    """Made from the source's tokenizer; a file that the source has itself is kept as it is, but
    for the end-of-text id, where that was repaired."""
    kept = dict(source.files)
    generation = _parsed(kept, "generation_config.json")
    eos, pad = source.eos_token_id, generation.get("pad_token_id")
    files: dict[str, Any] = {}
    if "tokenizer.json" in kept:
        tokenizer = Tokenizer.from_buffer(kept["tokenizer.json"])
        if eos is None:
            eos = _first_id(tokenizer, _EOS_NAMES)
        if pad is None:
            pad = _first_id(tokenizer, _PAD_NAMES)
        special = {
            name: tokenizer.id_to_token(i)
            for name, i in (("eos_token", eos), ("pad_token", pad))
            if i is not None
        }
        files = {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": source.config.context_length,
                "clean_up_tokenization_spaces": False,
                **special,
            },
            "special_tokens_map.json": special,
        }
    ids = {"eos_token_id": eos, "pad_token_id": pad}
    given = {name: i for name, i in ids.items() if i is not None}
    if isinstance(generation.get("eos_token_id"), list) and eos in generation["eos_token_id"]:
        given.pop("eos_token_id", None)
    if generation and {**generation, **given} != generation:
        kept["generation_config.json"] = _dumps(generation | given)
    config = to_hf_config(source.config, dtype, **ids)
    return {"generation_config.json": given} | files | kept | {"config.json": config}


def _parsed(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _first_id(tokenizer: Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)


def _dumps(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
