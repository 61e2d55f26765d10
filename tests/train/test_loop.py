"""What the loop does when something goes wrong around the steps, in this process and quickly.

Kills and restarts of real processes are test_kill.py's.
"""

import errno
import json
import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from olmo_jax.checkpoint import CheckpointReader
from olmo_jax.checkpoint.checksums import write_manifest
from olmo_jax.checkpoint.fork import fork
from olmo_jax.config import to_gin
from olmo_jax.errors import UserError
from olmo_jax.train.config import RunConfig
from olmo_jax.train.evaluate import Evaluation
from olmo_jax.train.loop import STATUS_DONE, STATUS_PREEMPTED, train

MODEL = {"vocab_size": 64, "d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_width": 32}


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Six steps of four instances, in file order, a checkpoint only at the end."""
    rng = np.random.default_rng(0)
    rng.integers(0, 64, 16 * 200).astype(np.uint8).tofile(tmp_path / "tokens.npy")
    return RunConfig.from_json(
        {
            "Model": MODEL,
            "Schedule": {"kind": "constant"},
            "Data": {
                "paths": (str(tmp_path / "tokens.npy"),),
                "sequence_length": 16,
                "batch_size": 4,
                "order": "sequential",
                "eos_token_id": 0,
            },
            "Train": {"run_dir": str(tmp_path / "run"), "steps": 6, "tensorboard": False},
        }
    )


def change(config: RunConfig, **parts: dict) -> RunConfig:
    return replace(
        config, **{part: replace(getattr(config, part), **values) for part, values in parts.items()}
    )


def run(config: RunConfig, *evaluators, **options) -> int:
    return train(config, to_gin(config), evaluators, **options)


def rows(config: RunConfig, name: str = "metrics") -> list[dict]:
    lines = (Path(config.train.run_dir) / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoints(config: RunConfig) -> CheckpointReader:
    return CheckpointReader(Path(config.train.run_dir) / "checkpoints")


def failing(error: Exception):
    def evaluator(model, step):
        raise error

    return evaluator


def test_an_evaluator_that_fails_loses_no_step(config):
    config = change(config, train={"heldout_every": 3})
    with pytest.raises(RuntimeError, match="out of memory"):
        run(config, failing(RuntimeError("out of memory")))
    assert checkpoints(config).steps() == [3]
    assert run(config) == STATUS_DONE
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_system_is_told_as_it_is(config):
    reset = OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    with pytest.raises(UserError, match="Connection reset") as caught:
        run(config, failing(reset))
    assert "cannot write" not in str(caught.value) and "\n" not in str(caught.value)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    again = change(config, train={"run_dir": config.train.run_dir + "2"})
    with pytest.raises(UserError, match=r"cannot write .*run2: the disk is full"):
        run(again, failing(full))


DIVERGES = {"learning_rate": 1e30, "clip_norm": None}


def test_sigterm_among_steps_that_are_not_finite_saves_the_last_good_one(config):
    config = change(config, optimizer=DIVERGES, train={"heldout_every": 4, "nonfinite_steps": 99})

    def terminate(model, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return Evaluation({})

    assert run(config, terminate) == STATUS_PREEMPTED
    finite = [row["step"] for row in rows(config) if row["loss"] is not None]
    assert finite and finite[-1] < 4
    assert checkpoints(config).steps() == [finite[-1]]


def test_a_first_step_that_is_not_finite_keeps_the_weights_as_step_0(config):
    config = change(config, model={"init_std": 1e30}, train={"nonfinite_steps": 2})
    ended = []
    with pytest.raises(UserError, match=r"first is step 1 .* kept as step 0"):
        run(config, at_end=lambda: ended.append(True))
    assert checkpoints(config).steps() == [0] and ended == [True]
    assert checkpoints(config).metadata(0)["n"] == 0


def test_evaluation_is_no_part_of_a_steps_time(config):
    def slow(model, step):
        time.sleep(0.5)
        return Evaluation({})

    config = change(config, train={"heldout_every": 1})
    run(config, slow)
    assert all(row["step_seconds"] < 0.4 for row in rows(config)[1:])


def test_a_damaged_data_json_is_written_anew_and_baselines_stay(config, caplog):
    path = Path(config.train.run_dir) / "data.json"
    run(change(config, train={"stop_at": 2}))
    written = json.loads(path.read_text())
    path.write_text(json.dumps({"baselines": {"xz": 2.3}}))
    run(change(config, train={"stop_at": 3}))
    assert json.loads(path.read_text()) == written | {"baselines": {"xz": 2.3}}
    path.write_text('{"sources": [')
    with caplog.at_level(logging.WARNING):
        run(config)
    assert json.loads(path.read_text()) == written and "was damaged" in caplog.text


def test_a_fork_with_another_batch_size_neither_skips_nor_repeats(config, tmp_path):
    run(change(config, train={"stop_at": 4}))
    fork(config.train.run_dir, tmp_path / "new")
    new = change(config, train={"run_dir": str(tmp_path / "new")})
    with pytest.raises(UserError) as caught:
        run(change(new, data={"batch_size": 8}))
    assert "consumed 16 instances, and would have consumed 32" in str(caught.value)
    advised = {"batch_size": 4, "batch_size_schedule": ((4, 8),)}
    for field, value in advised.items():
        assert f"Data.{field} = {value}" in str(caught.value)
    run(change(new, data=advised))
    ids = [i for row in rows(new, "instances") for i in row["instance_ids"]]
    assert ids == list(range(16, 32))


def test_a_checkpoint_of_an_older_version_without_a_field_goes_on(config):
    run(change(config, train={"stop_at": 2}))
    folder = checkpoints(config).path(2)
    metadata = json.loads((folder / "metadata.json").read_text())
    del metadata["config"]["Train"]["deterministic"], metadata["config"]["Mesh"]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    write_manifest(folder)
    assert run(config) == STATUS_DONE


def test_weights_that_mean_something_else_are_refused(config, tmp_path):
    run(config)
    other = change(
        config,
        model={"rope_theta": 1e4, "norm_eps": 1e-5},
        train={"run_dir": str(tmp_path / "b"), "init_from": (config.train.run_dir,)},
    )
    with pytest.raises(UserError, match=r"another model: norm_eps = 1e-06 \(wanted 1e-05\), rope"):
        run(other)


def test_a_profile_of_some_steps_is_written(config):
    assert run(config, profile_steps=(2, 3)) == STATUS_DONE
    folder = Path(config.train.run_dir) / "profile"
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))  # TensorBoard, XProf
    assert list(folder.glob("plugins/profile/*/perfetto_trace.json.gz"))


def test_a_flag_that_the_compiler_does_not_know_is_told_in_one_line(config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_nonsense=1")
    with pytest.raises(UserError, match="does not know --xla_nonsense=1"):
        run(config)
    assert not Path(config.train.run_dir).exists()
