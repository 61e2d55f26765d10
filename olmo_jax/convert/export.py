"""Writes a checkpoint as a folder that PyTorch's transformers loads with no code of ours."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from olmo_jax.convert.hf import Row, architecture_of, rows_of, to_hf_config
from olmo_jax.convert.safetensors_io import Planned, write_folder
from olmo_jax.convert.source import Source, open_source
from olmo_jax.errors import UserError
from olmo_jax.files import write_error
from olmo_jax.model.transformer import abstract_model, parameters

_EOS_NAMES = ("<|endoftext|>", "|||IP_ADDRESS|||")
_PAD_NAMES = ("<|pad|>", "<|padding|>", "<pad>")


def convert(
    src: str | Path,
    dst: str | Path,
    to: Literal["hf"] = "hf",
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    step: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the model in `src` (see `load`) to the new folder `dst`, whole or not at all.

    config.json, safetensors (in shards of max_shard_bytes, with an index), generation_config.json,
    and the tokenizer's files where the checkpoint has a tokenizer. Tensors pass through one at a
    time. `progress(done, total)` counts bytes. Raises UserError.
    """
    if to != "hf":
        raise UserError(f"--to={to}: this version writes hf (a transformers folder)")
    dst = Path(dst).expanduser().absolute()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is there already and not empty; give a new folder")
    unfinished = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    with open_source(src, step) as source:
        files = _small_files(source, dtype)
        try:
            unfinished.mkdir(parents=True)
            write_folder(unfinished, _planned(source), dtype, max_shard_bytes, progress)
            for name, content in files.items():
                text = content if isinstance(content, bytes) else _dumps(content)
                (unfinished / name).write_bytes(text)
            os.replace(unfinished, dst)
        except OSError as error:
            raise write_error(dst, error) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _planned(source: Source) -> Iterator[Planned]:
    config = source.config
    weights = parameters(abstract_model(config))
    for row in rows_of(config, architecture_of(config)):
        node: Any = weights
        for key in row.ours.split("."):
            node = node[key]
        shape = node.shape[1:] if row.stacked else node.shape
        shape = shape[::-1] if row.transposed else shape
        for layer in range(config.n_layers) if row.stacked else [None]:
            yield Planned(row.theirs.format(layer=layer), shape, _reader(source, row, layer))


def _reader(source: Source, row: Row, layer: int | None):
    def read():
        values = source.read(row.ours, layer)
        return values.T if row.transposed else values

    return read


def _small_files(source: Source, dtype: str) -> dict[str, Any]:
    eos, pad = source.eos_token_id, None
    files: dict[str, Any] = {}
    if source.tokenizer_json is not None:
        tokenizer = Tokenizer.from_buffer(source.tokenizer_json)
        if eos is None:
            eos = _first_id(tokenizer, _EOS_NAMES)
        pad = _first_id(tokenizer, _PAD_NAMES)
        special = {
            name: tokenizer.id_to_token(i)
            for name, i in (("eos_token", eos), ("pad_token", pad))
            if i is not None
        }
        files = {
            "tokenizer.json": source.tokenizer_json,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": source.config.context_length,
                "clean_up_tokenization_spaces": False,
                **special,
            },
            "special_tokens_map.json": special,
        }
    ids = {"eos_token_id": eos, "pad_token_id": pad}
    return files | {
        "config.json": to_hf_config(source.config, dtype, **ids),
        "generation_config.json": {k: v for k, v in ids.items() if v is not None},
    }


def _first_id(tokenizer: Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)


def _dumps(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
