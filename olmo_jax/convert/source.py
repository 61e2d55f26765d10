"""A model on disk, whoever wrote it: its configuration, and its weights one by one, by our names.

Looking is enough to tell the formats apart; nothing is unpickled.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from pydantic import ValidationError
from tokenizers import Tokenizer

from olmo_jax.checkpoint import CheckpointReader, find_checkpoint
from olmo_jax.convert.hf import ignored_names, rows_of
from olmo_jax.convert.hf_config import from_hf_config
from olmo_jax.convert.remote import TOKENIZER_FILES as TRAVELLING
from olmo_jax.convert.remote import local_folder
from olmo_jax.convert.run_facts import RunFacts, run_facts
from olmo_jax.convert.safetensors_io import INDEX, SINGLE, SafetensorsFolder, common_dtype
from olmo_jax.convert.table import Row
from olmo_jax.convert.torch_files import TorchTensors
from olmo_jax.errors import UserError, validation_faults
from olmo_jax.model.config import ModelConfig
from olmo_jax.storage import is_remote, is_web, reason

TORCH = "pytorch_model.bin"
_MAX_SMALL_FILE = 64 * 2**20


class Source(Protocol):
    """What every format offers."""

    config: ModelConfig
    eos_token_id: int | None
    files: Mapping[str, bytes]
    """The small files that go along (`TRAVELLING`), those that are there; by name."""

    def dtype(self, path: str) -> str:
        """The type in which a weight is stored, by our dotted path."""
        ...

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        """A weight by our dotted path, (in, out); of a stacked one a single layer, if given, and
        of that a single expert."""
        ...

    def run_facts(self) -> RunFacts | None:
        """What is known of the run that trained it; None where that is nothing."""
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


class Moments(NamedTuple):
    """AdamW's state of another program."""

    steps: int
    """How many it has counted."""
    first: Source
    """The mean of the gradients, by the names of the weights."""
    second: Source
    """The mean of their squares."""


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
    files: Mapping[str, bytes] = field(default_factory=dict)
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
        for row in self.rows:
            shape = row.shape(self.config)
            for name, _ in row.places(self.config):
                if self.tensors.shape(name) != shape:
                    raise UserError(
                        f"{self.where}: {name} has shape {self.tensors.shape(name)}, its config "
                        f"says {shape}"
                    )

    def dtype(self, path: str) -> str:
        """The type in which a weight is stored; float32 where its layers' types differ."""
        places = self._rows[path].places(self.config)
        return common_dtype(self.tensors.dtype(name) for name, _ in places)

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        row, config = self._rows[path], self.config
        if row.stacked and layer is None:
            return np.stack([self.read(path, i, expert) for i in range(config.n_layers)])
        if row.by_expert and expert is None:
            return np.stack([self.read(path, layer, i) for i in range(config.n_experts)])
        name = row.theirs.format(layer=layer, expert=expert)
        inside = None if row.by_expert else expert  # one of the experts that this tensor holds
        rows = self.tensors.read(name, row.span(path, config, inside))
        return row.extract_span(rows, path, config, inside)

    def run_facts(self) -> None:
        """Other programs' files tell nothing."""


@contextmanager
def open_source(
    path: str | Path, step: int | None = None, revision: str | None = None
) -> Iterator[Source]:
    """Opens a run folder (its newest checkpoint, or `step`'s), a checkpoint, a transformers folder,
    one of the original OLMo program or a step of OLMo-core; on this machine or elsewhere (see
    remote.py). UserError says what was looked for."""
    from olmo_jax.convert import core_files, olmo_core, olmo_files  # they need what is here

    if (found := _in_bucket(path, step)) is not None:
        reader, at = found
        if not (reader.path(at) / "params" / "manifest.ocdbt").is_file():
            yield _Checkpoint(reader, at)
            return
        # As it lies on a disk, copied to a bucket: one database, which is copied back.
        path, step = str(reader.path(at)), None
    folder = local_folder(path, revision)
    has_steps = (folder / "checkpoints").is_dir() or folder.name == "checkpoints"
    if step is not None and not has_steps and folder.is_dir():
        raise UserError(f"--step={step}: {path} is no run folder, which alone has several steps")
    hf = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if olmo_files.is_hf_olmo(hf):
        yield olmo_files.open_hf_olmo(folder, hf)
        return
    if "model_type" in hf:
        yield _transformers(folder)
        return
    if olmo_core.is_core_config(hf):
        yield core_files.open_core(folder, hf)
        return
    if (folder / olmo_files.CONFIG).is_file():
        yield olmo_files.open_olmo(folder)
        return
    found = find_checkpoint(folder, step)
    if found is None:
        what = "is no folder" if not folder.is_dir() else "holds no model"
        raise UserError(
            f"{path}: {what}; give a run folder (with checkpoints/), a checkpoint in it, a "
            "transformers folder (with config.json and safetensors), an OLMo folder (with "
            "config.yaml and model.pt), or an OLMo-core step (with config.json and "
            "model_and_optim/)"
        )
    yield _Checkpoint(*found)


def open_moments(path: str | Path) -> Moments | None:
    """The optimizer's state in another program's checkpoint (OLMo-core's), if there is any."""
    from olmo_jax.convert import core_files, olmo_core  # they need what is here

    folder = local_folder(path)
    hf = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "model_type" in hf or not olmo_core.is_core_config(hf):
        return None
    return core_files.open_core_moments(folder, hf)


def _in_bucket(path: str | Path, step: int | None) -> tuple[CheckpointReader, int] | None:
    """A checkpoint of ours in a bucket, which is read where it lies."""
    if not is_remote(path) or is_web(path):
        return None
    try:
        return find_checkpoint(path, step)
    except UserError:
        raise
    except Exception as error:  # the libraries of buckets have each their own classes
        raise UserError(f"{path}: cannot be fetched: {reason(error)}") from error


def small_files(folder: Path) -> dict[str, bytes]:
    """The contents of the `TRAVELLING` files that a folder has."""
    paths = [path for name in TRAVELLING if (path := folder / name).is_file()]
    for path in paths:
        if path.stat().st_size > _MAX_SMALL_FILE:
            raise UserError(
                f"{path}: has {path.stat().st_size:,} bytes, and such files at most "
                f"{_MAX_SMALL_FILE:,}; move it elsewhere"
            )
    try:
        return {path.name: path.read_bytes() for path in paths}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None


def repaired_eos(config: ModelConfig, eos_token_id: int | None) -> int | None:
    """The end-of-document id that a released model was trained with.

    The first OLMo checkpoints say 0, while their data ended documents with 50279: as the original
    converters do, that is put right for whatever has OLMo 1's norm and vocabulary.
    """
    # Without a tokenizer a transformers folder tells only the embedding's rows.
    sizes = {config.vocab_size, config.rows} & {50280, 50304}
    early_olmo = config.norm == "layer_nonparametric" and sizes
    return 50279 if early_olmo and eos_token_id == 0 else eos_token_id


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
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def saved_model(metadata: dict, where: str | Path) -> ModelConfig:
    """The architecture in a checkpoint's metadata. UserError when this version cannot read it."""
    try:
        return ModelConfig(**metadata["config"]["Model"])
    except ValidationError as error:
        faults = "; ".join(validation_faults(error))
        raise UserError(
            f"{where}: its Model is not one of this version ({faults}); use the version that "
            "wrote it"
        ) from None


class _Checkpoint:
    """One of our own checkpoints, read by slices."""

    def __init__(self, reader: CheckpointReader, step: int):
        self._reader, self._step = reader, step
        self._metadata = saved = reader.metadata(step)
        self.config = saved_model(saved, reader.path(step))
        self.eos_token_id = saved["config"]["Data"].get("eos_token_id")
        self.files: Mapping[str, bytes] = {
            name: reader.read_file(step, name)
            for name in TRAVELLING
            if (reader.path(step) / name).is_file()
        }
        self._tensors = reader.tensors(step)

    def dtype(self, path: str) -> str:
        return str(self._tensors[path.replace(".", "/")].dtype.numpy_dtype)

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        tensor = self._tensors[path.replace(".", "/")]
        # In the order in which the bytes lie (streamed.py), so that nothing is transposed here.
        order: Literal["C", "F"] = "F" if (tensor.chunk_layout.inner_order or (0,))[0] else "C"
        for index in (layer, expert):
            tensor = tensor if index is None else tensor[index]
        return np.asarray(tensor.read(order=order).result())

    def run_facts(self) -> RunFacts | None:
        return run_facts(self._reader, self._step, self._metadata)


def _transformers(folder: Path) -> TableSource:
    """A folder that transformers wrote, or that we wrote for it."""
    hf, files = _json(folder / "config.json"), small_files(folder)
    vocab_size = None
    if "tokenizer.json" in files:
        where = folder / "tokenizer.json"
        vocab_size = parse_tokenizer(files["tokenizer.json"], where).get_vocab_size()
    try:
        config, architecture = from_hf_config(hf, vocab_size)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    eos = hf.get("eos_token_id")
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    if not isinstance(eos, int | None):
        raise UserError(f"{folder}: eos_token_id = {eos!r} in config.json: is no whole number")
    return TableSource(
        config,
        rows_of(config, architecture),
        _tensors(folder),
        folder,
        repaired_eos(config, eos),
        files,
        ignored_names(config, architecture),
    )


def _tensors(folder: Path) -> Tensors:
    """safetensors where there are any, else PyTorch's own file."""
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return SafetensorsFolder(folder)
    if (folder / TORCH).is_file() or (folder / f"{TORCH}.index.json").is_file():
        return TorchTensors(folder, TORCH)
    raise UserError(f"{folder}: has none of {SINGLE}, {INDEX} and {TORCH}")
