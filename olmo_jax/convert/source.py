"""A model on disk, whoever wrote it: its configuration, and its weights one by one, by our names.

Looking is enough to tell the formats apart; nothing is unpickled.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from olmo_jax.checkpoint import CheckpointReader, find_checkpoint
from olmo_jax.convert.hf import from_hf_config, rows_of
from olmo_jax.convert.safetensors_io import SafetensorsFolder
from olmo_jax.convert.table import Row
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig


class Source(Protocol):
    """What every format offers."""

    config: ModelConfig
    eos_token_id: int | None
    tokenizer_json: bytes | None

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        """A weight by our dotted path, (in, out); of a stacked one a single layer, if given, and
        of that a single expert."""
        ...


class Tensors(Protocol):
    """Named tensors in another program's files, without a meaning yet."""

    def names(self) -> set[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        ...

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it, without reading it."""
        ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor as it is stored, or only some of its rows (axis 0)."""
        ...


@dataclass
class TableSource:
    """A `Source` over another program's tensors, by a table of rows (see table.py).

    UserError when the tensors' names are not those of the table; `where` is what it calls them.
    """

    config: ModelConfig
    rows: Sequence[Row]
    tensors: Tensors
    where: str | Path
    eos_token_id: int | None = None
    tokenizer_json: bytes | None = None
    ignored: frozenset[str] = frozenset()
    """Names that may be there and hold nothing of the model."""

    def __post_init__(self):
        self._rows = {path: row for row in self.rows for path in row.ours}
        wanted = {name for row in self.rows for name, _ in row.places(self.config)}
        there = self.tensors.names()
        missing, extra = sorted(wanted - there), sorted(there - wanted - self.ignored)
        if missing or extra:
            raise UserError(
                f"{self.where}: the tensors are not those of its config: "
                f"{len(missing)} missing {missing[:2]}, {len(extra)} unexpected {extra[:2]}"
            )

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        row, config = self._rows[path], self.config
        if row.stacked and layer is None:
            return np.stack([self.read(path, i, expert) for i in range(config.n_layers)])
        if row.by_expert and expert is None:
            return np.stack([self.read(path, layer, i) for i in range(config.n_experts)])
        name = row.theirs.format(layer=layer, expert=expert)
        if self.tensors.shape(name) != row.shape(config):
            raise UserError(
                f"{self.where}: {name} has shape {self.tensors.shape(name)}, its config says "
                f"{row.shape(config)}"
            )
        rows = self.tensors.read(name, row.span(path, config) if row.layout == "rows" else None)
        return row.extract_span(rows, path, config)


@contextmanager
def open_source(path: str | Path, step: int | None = None) -> Iterator[Source]:
    """Opens a run folder (its newest checkpoint, or `step`'s), a checkpoint, or a transformers
    folder. UserError says what was looked for."""
    folder = Path(path).expanduser()
    with ExitStack() as stack:
        if (folder / "config.json").is_file() and "model_type" in _json(folder / "config.json"):
            yield _transformers(folder, stack)
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


class _Checkpoint:
    """One of our own checkpoints, read by slices."""

    def __init__(self, reader: CheckpointReader, step: int):
        saved = reader.metadata(step)
        self.config = ModelConfig(**saved["config"]["Model"])
        self.eos_token_id = saved["config"]["Data"].get("eos_token_id")
        try:
            self.tokenizer_json: bytes | None = reader.read_file(step, "tokenizer.json")
        except UserError:
            self.tokenizer_json = None
        self._tensors = reader.tensors(step)

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        tensor = self._tensors[path.replace(".", "/")]
        for index in (layer, expert):
            tensor = tensor if index is None else tensor[index]
        return np.asarray(tensor.read().result())


def _transformers(folder: Path, stack: ExitStack) -> TableSource:
    """A folder that transformers wrote, or that we wrote for it."""
    hf = _json(folder / "config.json")
    file = folder / "tokenizer.json"
    tokenizer_json = file.read_bytes() if file.is_file() else None
    vocab_size = None
    if tokenizer_json is not None:
        vocab_size = parse_tokenizer(tokenizer_json, file).get_vocab_size()
    config, architecture = from_hf_config(hf, vocab_size)
    eos = hf.get("eos_token_id")
    return TableSource(
        config,
        rows_of(config, architecture),
        SafetensorsFolder(folder, stack),
        folder,
        eos[0] if isinstance(eos, list) else eos,
        tokenizer_json,
        # Some programs write the tied head a second time.
        frozenset({"lm_head.weight"} if config.tie_embeddings else ()),
    )
