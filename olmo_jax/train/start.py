"""How a run starts: its first state, and the files that explain it.

Going on from a checkpoint is resume.py's and checkpoint/'s.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from tokenizers import Tokenizer

from olmo_jax.checkpoint import RunFolder, find_checkpoint
from olmo_jax.convert.average import refuse_other_model
from olmo_jax.convert.load import load_moments, load_sharded
from olmo_jax.convert.source import saved_model
from olmo_jax.data.dataset import DataSet
from olmo_jax.data.tokenizer import load_tokenizer, read_tokenizer
from olmo_jax.model.transformer import Transformer, parameters
from olmo_jax.parallel.environment import environment
from olmo_jax.train.config import RunConfig
from olmo_jax.train.evaluate import Evaluator, HeldOut
from olmo_jax.train.step import Trainer, TrainState

log = logging.getLogger("olmo_jax.train")


def initial_state(run: RunConfig, trainer: Trainer) -> TrainState:
    """The state before the first step: random weights, or those of Train.init_from."""
    if not run.train.init_from:
        kernels = trainer.model.kernels
        return trainer.init_state(
            lambda: parameters(Transformer(run.model, run.train.seed, kernels))
        )
    sources = run.train.init_from
    found = find_checkpoint(sources[0]) if len(sources) == 1 else None
    if found and found[0].has_train_state(found[1]):  # it comes along
        reader, step = found
        saved = saved_model(reader.metadata(step), reader.path(step))
        refuse_other_model(saved, run.model, reader.path(step))
        state = reader.restore(step, trainer.abstract_state)
        zero = jax.device_put(np.int32(0), trainer.shardings.step)
        return state._replace(step=zero, skip=trainer.empty_skip_state())
    params = load_sharded(sources, run.model, trainer.shardings.params)
    state = trainer.init_state(params)
    if len(sources) > 1 or run.optimizer.kind == "muon":
        return state
    moments = load_moments(sources[0], run.model, trainer.shardings.params)
    if moments is None:
        return state
    steps, first, second = moments
    log.warning("AdamW's state comes along from %s, after %s steps", sources[0], f"{steps:,}")

    def converted(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        return optax.ScaleByAdamState(
            jax.device_put(np.int32(steps), part.count.sharding), first, second
        )

    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    return state._replace(opt_state=jax.tree.map(converted, state.opt_state, is_leaf=is_adam))


def write_facts(
    run: RunConfig,
    folder: RunFolder,
    files: Mapping[str, bytes],
    dataset: DataSet | None,
    evaluators: Iterable[Evaluator],
) -> None:
    """The files that explain the run to a reader; whole, and again at every start (once it is
    sure that the run may go on)."""
    for name, kept_file in files.items():
        folder.write_bytes(folder.path / name, kept_file)
    data: dict[str, Any] = {
        "sources": dataset.table() if dataset else [],
        "fingerprint": dataset.fingerprint if dataset else "",
    }
    try:
        # What `olmo-jax report` puts there stays.
        data["baselines"] = json.loads(folder.data_json.read_text())["baselines"]
    except (FileNotFoundError, KeyError):
        pass
    except (ValueError, TypeError):
        log.warning("%s was damaged and is written anew", folder.data_json)
    heldout = [h.table() for h in evaluators if isinstance(h, HeldOut)]
    data |= {"heldout": heldout[0] if heldout else []}
    for path, content in (
        (folder.config_json, run.as_json()),
        (folder.environment_json, environment()),
        (folder.data_json, data),
    ):
        folder.write_text(path, json.dumps(content, indent=2) + "\n")


def open_tokenizer(path: str | None) -> tuple[Tokenizer | None, dict[str, bytes]]:
    """The run's tokenizer, and its file to be kept with each checkpoint."""
    if path is None:
        return None, {}
    return load_tokenizer(path), {"tokenizer.json": read_tokenizer(path)}
