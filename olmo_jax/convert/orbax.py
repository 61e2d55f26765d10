"""Writes a checkpoint of our own from any source, weight by weight, layer by layer."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from olmo_jax import storage
from olmo_jax.checkpoint.streamed import StreamedCheckpoint
from olmo_jax.convert.safetensors_io import DTYPES, cast
from olmo_jax.convert.source import Source
from olmo_jax.convert.table import slices, weight_shapes
from olmo_jax.convert.target import Options, weight_bytes


def write(folder: Path, source: Source, options: Options) -> None:
    """A run folder with one checkpoint, step 0: the weights, without an optimizer's state."""
    config = source.config
    shapes = weight_shapes(config)
    dtypes = {path: options.dtype or source.dtype(path) for path in shapes}
    done, total = 0, weight_bytes(source, options.dtype)
    checkpoint = StreamedCheckpoint(storage.location(folder) / "checkpoints" / "step0")
    try:
        for path, at in slices(config):
            name = path.replace(".", "/")
            values = cast(source.read(path, *at), DTYPES[dtypes[path]], path)
            if not any(at):
                flipped = values.flags.f_contiguous and not values.flags.c_contiguous
                order: Literal["C", "F"] = "F" if flipped else "C"
                checkpoint.add(name, shapes[path], dtypes[path], len(at), order)
            done += checkpoint.write(name, at, values)
            if options.progress:
                options.progress(done, total)
        model, data = asdict(config), {"eos_token_id": source.eos_token_id}
        metadata = {"config": {"Model": model, "Data": data}, "step": 0, "permanent": True}
        checkpoint.commit(metadata | {"n": 0, "tokens": 0, "fingerprint": ""}, source.files)
    finally:
        checkpoint.close()
