"""Runs that start from another's weights, in any format, and go on with its data."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
import torch.distributed.checkpoint as dcp

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointReader
from olmo_jax.config import load_config
from olmo_jax.convert.distcp import DistcpTensors
from olmo_jax.convert.export import convert
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import abstract_model, init, parameters
from olmo_jax.parallel.mesh import build_mesh
from olmo_jax.train.start import initial_state
from olmo_jax.train.step import Trainer

ROOT = Path(__file__).parents[2]
GIN = """
Model.vocab_size = 64
Model.d_model = 32
Model.n_layers = 2
Model.n_heads = 2
Model.mlp_width = 32
Data.sequence_length = 16
Data.batch_size = 4
Data.batch_size_schedule = ((4, 8),)
Data.eos_token_id = 0
Train.steps = 8
Train.tensorboard = False
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a gin file, token files, and the run `first` of 8 steps."""
    folder = tmp_path_factory.mktemp("init")
    tokens = np.random.default_rng(0).integers(0, 64, 40_000)
    tokens.astype(np.uint8).tofile(folder / "tokens.npy")
    (folder / "test.gin").write_text(GIN + f'Data.paths = ("{folder}/tokens.npy",)\n')
    train(folder, "first")
    return folder


def train(place: Path, run: str, *bindings: str, status: int = 0) -> str:
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "olmo_jax.cli", "train", f"--gin_file={place}/test.gin"]
    command += [f"--gin.Train.run_dir={place / run}", *(f"--gin.{b}" for b in bindings)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr
    return done.stderr


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
    tensors = CheckpointReader(run / "checkpoints").tensors(step)
    return {name: np.asarray(t.read().result()) for name, t in tensors.items()}


def instances(run: Path) -> dict[int, list[int]]:
    rows = map(json.loads, (run / "instances.jsonl").read_text().splitlines())
    return {row["step"]: row["instance_ids"] for row in rows}


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_run_starts_from_converted_weights(place, to):
    convert(place / "first", place / to, to)
    start = f'Train.init_from=("{place / to}",)'
    train(place, f"from_{to}", start, "Train.steps=0")
    first, again = weights(place / "first", 8), weights(place / f"from_{to}", 0)
    assert first.keys() == again.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    train(place, f"on_{to}", start, "Train.steps=1")


def test_weights_of_another_model_are_refused(place):
    bindings = (f'Train.init_from=("{place / "first"}",)', "Model.mlp_width=48")
    soup = f'Train.init_from=("{place / "first"}", "{place / "first"}")'
    assert "mlp" in train(place, "other", *bindings, status=2)
    error = train(place, "other", soup, "Model.mlp_width=48", status=2)
    assert "first: is another model: layers.mlp.down.weight has shape" in error


def test_the_data_goes_on_from_a_given_step(place):
    """Over a change of the batch size, and over a stop and a resume."""
    bindings = (
        f'Train.init_from=("{place / "first"}",)',
        "Train.data_from_step=3",
        "Train.steps=5",
    )
    train(place, "later", *bindings, "Train.stop_at=2")
    train(place, "later", *bindings)
    first, later = instances(place / "first"), instances(place / "later")
    assert later == {step: first[step + 3] for step in range(1, 6)}
    saved = CheckpointReader(place / "later" / "checkpoints").metadata(5)
    # Steps 3 to 7 of the order: 1 of 4 instances and 4 of 8; before them 3 of 4.
    assert (saved["tokens"], saved["n"]) == ((4 + 4 * 8) * 16, 3 * 4 + 4 + 4 * 8)
    error = train(place, "later", *bindings[:1], "Train.steps=5", status=2)
    assert "Train.data_from_step = 0 (was 3)" in error


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adamws_state_comes_along_from_olmo_core(tmp_path, kind):
    """Written by torch's own writer, with the weights doubled and squared in place of moments."""
    config = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2, mlp_width=32)
    model = init(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    metadata = {"config": {"Model": asdict(config), "Data": {}}}
    with Checkpointer(checkpoints, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"params": parameters(model)}, metadata)
    convert(tmp_path / "run", tmp_path / "core", "olmo_core")
    tensors = DistcpTensors(tmp_path / "core" / "model_and_optim")
    weights = {name: torch.tensor(np.array(tensors.read(name))) for name in tensors.names()}
    moments = {
        name: {"step": torch.tensor(7.0), "exp_avg": 2 * w, "exp_avg_sq": w * w}
        for name, w in weights.items()
    }
    shutil.rmtree(tmp_path / "core" / "model_and_optim")
    state = {"model": weights, "optim": {"state": moments}}
    dcp.save(state, checkpoint_id=tmp_path / "core" / "model_and_optim", no_dist=True)
    run = load_config(
        [],
        [
            *(f"Model.{k}={getattr(config, k)}" for k in ("vocab_size", "d_model", "n_layers")),
            *(f"Model.{k}={getattr(config, k)}" for k in ("n_heads", "mlp_width")),
            f"Train.init_from=('{tmp_path}/core',)",
            f"Optimizer.kind={kind}",
            "Train.steps=10",
        ],
    )
    trainer = Trainer(abstract_model(config), run.optimizer, build_mesh(run.mesh))
    started = initial_state(run, trainer)
    adam = [
        part
        for part in jax.tree.leaves(
            started.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState)
        )
        if isinstance(part, optax.ScaleByAdamState)
    ]
    assert len(adam) == 1 and int(started.step) == 0
    if kind == "muon":  # whose state is another
        assert int(adam[0].count) == 0
        return
    assert int(adam[0].count) == 7
    same = jax.tree.map(
        lambda w, m, v: np.array_equal(m, 2 * w) and np.array_equal(v, w * w),
        parameters(model),
        adam[0].mu,
        adam[0].nu,
    )
    assert all(jax.tree.leaves(same))
