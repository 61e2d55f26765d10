"""A model on disk, whoever wrote it: its configuration, and its weights one by one, by our names.

Looking is enough to tell the formats apart; nothing is unpickled.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import ValidationError
from tokenizers import Tokenizer

from olmo_jax.checkpoint import CheckpointReader, find_checkpoint
from olmo_jax.convert.hf import from_hf_config, rows_of
from olmo_jax.convert.safetensors_io import SafetensorsFolder
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig


class Source(Protocol):
    """What every format offers."""

    config: ModelConfig
    eos_token_id: int | None
    tokenizer_json: bytes | None

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A weight by our dotted path, (in, out); of a stacked one a single layer, if given."""
        ...


@contextmanager
def open_source(path: str | Path, step: int | None = None) -> Iterator[Source]:
    """Opens a run folder (its newest checkpoint, or `step`'s), a checkpoint, or a transformers
    folder. UserError says what was looked for."""
    folder = Path(path).expanduser()
    with ExitStack() as stack:
        if (folder / "config.json").is_file() and "model_type" in _json(folder / "config.json"):
            yield _Transformers(folder, stack)
            return
        found = find_checkpoint(folder, step)
        if found is None:
            what = "is no folder" if not folder.is_dir() else "holds no model"
            raise UserError(
                f"{path}: {what}; give a run folder (with checkpoints/), a checkpoint in it, or a "
                "transformers folder (with config.json and safetensors)"
            )
        yield _Checkpoint(*found)


def parse_tokenizer(content: bytes, where: str | Path) -> Tokenizer:
    """A tokenizer.json's tokenizer. UserError when it is none."""
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{where}: is not a tokenizer of the `tokenizers` library: {error}"
        ) from None


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def saved_model(metadata: dict, where: str | Path) -> ModelConfig:
    """The architecture in a checkpoint's metadata. UserError when this version cannot read it."""
    try:
        return ModelConfig(**metadata["config"]["Model"])
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc']}: {fault['msg']}" for fault in error.errors())
        raise UserError(
            f"{where}: its Model is not one of this version ({faults}); use the version that "
            "wrote it"
        ) from None


class _Checkpoint:
    """One of our own checkpoints, read by slices."""

    def __init__(self, reader: CheckpointReader, step: int):
        saved = reader.metadata(step)
        self.config = saved_model(saved, reader.path(step))
        self.eos_token_id = saved["config"]["Data"].get("eos_token_id")
        try:
            self.tokenizer_json: bytes | None = reader.read_file(step, "tokenizer.json")
        except UserError:
            self.tokenizer_json = None
        self._tensors = reader.tensors(step)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        tensor = self._tensors[path.replace(".", "/")]
        return np.asarray((tensor if layer is None else tensor[layer]).read().result())


class _Transformers:
    """A folder that transformers wrote, or that we wrote for it."""

    def __init__(self, folder: Path, stack: ExitStack):
        hf = _json(folder / "config.json")
        file = folder / "tokenizer.json"
        self.tokenizer_json = file.read_bytes() if file.is_file() else None
        vocab_size = None
        if self.tokenizer_json is not None:
            vocab_size = parse_tokenizer(self.tokenizer_json, file).get_vocab_size()
        self.config, architecture = from_hf_config(hf, vocab_size)
        eos = hf.get("eos_token_id")
        self.eos_token_id = eos[0] if isinstance(eos, list) else eos
        self._files = SafetensorsFolder(folder, stack)
        self._rows = {row.ours: row for row in rows_of(self.config, architecture)}
        self._refuse_other_names(folder)

    def _refuse_other_names(self, folder: Path) -> None:
        layers = range(self.config.n_layers)
        wanted = {
            row.theirs.format(layer=i)
            for row in self._rows.values()
            for i in (layers if row.stacked else [0])
        }
        there = self._files.names()
        if self.config.tie_embeddings:
            there -= {"lm_head.weight"}  # some programs write the tied head a second time
        missing, extra = sorted(wanted - there), sorted(there - wanted)
        if missing or extra:
            raise UserError(
                f"{folder}: the tensors are not those of its config.json: "
                f"{len(missing)} missing {missing[:2]}, {len(extra)} unexpected {extra[:2]}"
            )

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        row = self._rows[path]
        if row.stacked and layer is None:
            return np.stack([self.read(path, i) for i in range(self.config.n_layers)])
        values = self._files.read(row.theirs.format(layer=layer))
        return values.T if row.transposed else values
