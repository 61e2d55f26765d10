"""OLMo-core's checkpoint folders: config.json beside model_and_optim/, read and written."""

import json
from pathlib import Path
from typing import Any

from olmo_jax.convert.core_config import to_core_config
from olmo_jax.convert.distcp import METADATA, DistcpTensors, write_distcp
from olmo_jax.convert.olmo_core import TIED, core_rows, from_core_config
from olmo_jax.convert.olmo_files import Renamed, special_tokens
from olmo_jax.convert.remote import CORE
from olmo_jax.convert.source import (
    Moments,
    Source,
    TableSource,
    Tensors,
    repaired_eos,
    small_files,
)
from olmo_jax.convert.target import Options, planned, stored_dtype
from olmo_jax.errors import UserError

_VERSION = "3.0.0"


def open_core(folder: Path, content: dict[str, Any], tensors: Tensors | None = None) -> TableSource:
    """A step's folder, by its config.json; `tensors` by the weights' names if they are not the
    weights themselves. UserError when one is not as it should be."""
    config, dropless = from_core_config(content, str(folder / "config.json"))
    tokenizer = (content.get("dataset") or {}).get("tokenizer") or {}
    names = ("eos_token_id", "pad_token_id")
    ids = {name: tokenizer[name] for name in names if tokenizer.get(name) is not None}
    return TableSource(
        config,
        core_rows(config, dropless),
        tensors or DistcpTensors(_inner(folder)),
        folder,
        repaired_eos(config, ids.get("eos_token_id")),
        {"generation_config.json": json.dumps(ids).encode()} | small_files(folder),
        frozenset(TIED.theirs for _ in range(config.tie_embeddings)),
    )


def open_core_moments(folder: Path, content: dict[str, Any]) -> Moments | None:
    """AdamW's state beside the weights; None where there is none (or not all of it, as where only
    the weights were fetched)."""
    try:
        tensors = DistcpTensors(_inner(folder), "optim.state.")
    except UserError:
        return None
    sources = []
    for ending in (".exp_avg", ".exp_avg_sq"):
        names = {n.removesuffix(ending): n for n in tensors.names() if n.endswith(ending)}
        if not names:
            return None
        sources.append(open_core(folder, content, Renamed(tensors, names)))
    steps = {int(tensors.read(n)) for n in tensors.names() if n.endswith(".step")}
    return Moments(max(steps, default=0), *sources)


def _inner(folder: Path) -> Path:
    return folder if (folder / METADATA).is_file() else folder / CORE


def write(folder: Path, source: Source, options: Options) -> None:
    """A folder that OLMo-core 3.0.0 loads: config.json, .metadata.json, model_and_optim/ with the
    weights, and the source's small files. Raises UserError when it has no such model, OSError from
    the disk."""
    config = source.config
    dtype = options.dtype or stored_dtype(source, ["embed.weight"])
    model = to_core_config(config, dtype)
    rows = core_rows(config) + [TIED for _ in range(config.tie_embeddings)]
    tokenizer: dict[str, Any] = {"vocab_size": config.vocab_size, **special_tokens(source)}
    tokenizer["_CLASS_"] = "olmo_core.data.tokenizer.TokenizerConfig"
    content = {
        "model": model,
        "dataset": {"sequence_length": config.context_length, "tokenizer": tokenizer},
    }
    for name, value in (
        ("config.json", content),
        (".metadata.json", {"ephemeral": False, "version": _VERSION}),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    tensors = planned(source, rows, options)
    write_distcp(folder / CORE, tensors, options.max_shard_bytes, options.progress)
    for name, data in source.files.items():
        (folder / name).write_bytes(data)
