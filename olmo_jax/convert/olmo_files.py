"""Folders of the original OLMo program: config.yaml beside model.pt or model.safetensors.

And those of its `hf_olmo` package, which keep its names and fields in transformers' files.
"""

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from olmo_jax.convert.olmo import from_olmo_config, olmo_rows, plain_names, to_olmo_config
from olmo_jax.convert.safetensors_io import SafetensorsFolder
from olmo_jax.convert.source import Source, TableSource, Tensors, repaired_eos, small_files
from olmo_jax.convert.target import Options, planned
from olmo_jax.convert.torch_files import TorchTensors
from olmo_jax.convert.torch_pickle import unpickle
from olmo_jax.convert.torch_write import write_state_dict
from olmo_jax.errors import UserError

CONFIG = "config.yaml"
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def open_olmo(folder: Path) -> TableSource:
    """A folder with config.yaml and the unsharded weights. UserError when one is not as it should
    be."""
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_text())
        model = content["model"]
        assert isinstance(model, dict)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path}: has no `model` as an OLMo checkpoint's has") from None
    return _source(folder, model, str(path), _tensors(folder, "model.pt"))


def is_hf_olmo(hf: dict[str, Any]) -> bool:
    """Whether this config.json is of the `hf_olmo` package, and not of transformers' own OLMo."""
    return hf.get("model_type") in ("hf_olmo", "olmo") and "d_model" in hf


def open_hf_olmo(folder: Path, hf: dict[str, Any]) -> TableSource:
    """A folder of the `hf_olmo` package (config.json, pytorch_model.bin or safetensors)."""
    tensors = _tensors(folder, "pytorch_model.bin")
    names = {n.removeprefix("model."): n for n in tensors.names()}
    return _source(folder, hf, str(folder / "config.json"), Renamed(tensors, names))


def _tensors(folder: Path, torch_name: str) -> Tensors:
    if any((folder / name).is_file() for name in _SAFETENSORS):
        return SafetensorsFolder(folder)
    if any((folder / f"{torch_name}{end}").is_file() for end in ("", ".index.json")):
        return TorchTensors(folder, torch_name)
    sharded = [n for n in ("model", "model_and_optim", "rank0.pt") if (folder / n).exists()]
    hint = "; it holds a sharded training state: join it with ai2-olmo's scripts/unshard.py first"
    raise UserError(
        f"{folder}: has neither {torch_name} nor {_SAFETENSORS[0]}{hint if sharded else ''}"
    )


def _source(folder: Path, model: dict[str, Any], where: str, tensors: Tensors) -> TableSource:
    config = from_olmo_config(model, where)
    names = {_decoded(name, folder): name for name in tensors.names()}
    plain = {new: names[old] for new, old in plain_names(names).items()}
    ids = {k: model[k] for k in ("eos_token_id", "pad_token_id") if model.get(k) is not None}
    eos = repaired_eos(config, ids.get("eos_token_id"))
    generation = json.dumps(ids | ({} if eos is None else {"eos_token_id": eos})).encode()
    files = {"generation_config.json": generation} | small_files(folder)
    # Some programs write the tied head a second time.
    ignored = frozenset({"transformer.ff_out.weight"} if config.tie_embeddings else ())
    return TableSource(
        config, olmo_rows(config), Renamed(tensors, plain), folder, eos, files, ignored
    )


def _decoded(name: str, folder: Path) -> str:
    """A tensor's name. ai2-olmo's own safetensors have, for a name, base64 of a pickle of
    ((name,), False): it is read with no class or function allowed in it."""
    try:
        content = base64.b64decode(name, b"-_", validate=True)
    except (binascii.Error, ValueError):
        return name
    if content[:1] != b"\x80":  # how a pickle begins; other names can be base64 by chance
        return name
    where = f"{folder}: a tensor's name"
    match unpickle(io.BytesIO(content), {}, where):
        case ((str(plain),), False):
            return plain
    raise UserError(f"{where}: is a pickle, but not as ai2-olmo writes it: {name[:60]!r}")


class Renamed:
    """Tensors under other names."""

    def __init__(self, tensors: Tensors, names: dict[str, str]):
        self._tensors, self._names = tensors, names

    def names(self) -> set[str]:
        """The new names."""
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._tensors.shape(self._names[name])

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it."""
        return self._tensors.dtype(self._names[name])

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor as it is stored, or some of its rows."""
        return self._tensors.read(self._names[name], rows)


def write(folder: Path, source: Source, options: Options) -> None:
    """config.yaml and model.pt as ai2-olmo 0.6.0 loads them, and the source's small files. Raises
    UserError when it has no such model, OSError from the disk."""
    model = to_olmo_config(source.config) | special_tokens(source)
    content: dict[str, Any] = {"run_name": "olmo_jax", "model": model}
    if "tokenizer.json" in source.files:
        # Found from the folder itself, or by a path given instead.
        content["tokenizer"] = {"identifier": "tokenizer.json", "truncate_direction": "right"}
    tensors = planned(source, olmo_rows(source.config), options)
    (folder / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False))
    write_state_dict(folder / "model.pt", tensors, options.progress)
    for name, data in source.files.items():
        (folder / name).write_bytes(data)


def special_tokens(source: Source) -> dict[str, int]:
    """eos_token_id and pad_token_id, those that are known; padding is end of text otherwise."""
    try:
        generation = json.loads(source.files.get("generation_config.json", b"{}"))
    except ValueError:
        generation = {}
    eos = source.eos_token_id
    pad = generation.get("pad_token_id")
    ids = {"eos_token_id": eos, "pad_token_id": eos if pad is None else pad}
    return {name: i for name, i in ids.items() if i is not None}
