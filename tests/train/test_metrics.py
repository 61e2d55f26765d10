"""The logs of a run have neither gap nor repeat, whatever killed it."""

import importlib.util
import json
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_jax.errors import UserError
from olmo_jax.train.metrics import JsonlLog, MetricsWriter

STEPS = 4000

# A run without a model: resumes from the step that "checkpoint" names, logs each step, and commits
# a checkpoint by renaming it into place, as the training loop does.
WRITER = f"""
import os, sys
from pathlib import Path
from olmo_jax.train.metrics import MetricsWriter

run_dir = Path(sys.argv[1])
checkpoint = run_dir / "checkpoint"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
with MetricsWriter(run_dir, tensorboard=True, wandb=False, resume_step=first) as metrics:
    print("open", flush=True)
    for step in range(first + 1, {STEPS} + 1):
        metrics.write_instances(step, range(4 * step, 4 * step + 4))
        metrics.write({{"step": step, "loss": 1 / step}})
        if step % 7 == 0:
            metrics.flush()
            (run_dir / "new").write_text(str(step))
            os.replace(run_dir / "new", checkpoint)
"""


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_gap_and_no_repeat_after_kills_at_random_moments(tmp_path):
    moments = random.Random(0)
    kills = 0
    for _ in range(100):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        if kills < 8:
            # Some kills fall into opening the files, the others among the rows.
            if kills % 4:
                assert writer.stdout is not None
                writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.1))
            writer.kill()
        writer.communicate(timeout=600)
        if writer.returncode == 0:
            break
        assert writer.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 4
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [*range(1, STEPS + 1)]
    instances = read_rows(tmp_path / "instances.jsonl")
    assert [row["step"] for row in instances] == [*range(1, STEPS + 1)]
    fed = [instance_id for row in instances for instance_id in row["instance_ids"]]
    assert fed == [*range(4, 4 * STEPS + 4)]


@settings(max_examples=40, deadline=None)
@given(resume_step=st.integers(1, 20), torn_bytes=st.integers(0, 400))
def test_a_file_torn_anywhere_after_the_checkpoint_resumes(
    tmp_path_factory, resume_step, torn_bytes
):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    log = JsonlLog(path, 0)
    durable = 0
    for step in range(1, 21):
        log.write({"step": step, "loss": step / 3})
        durable = path.stat().st_size if step == resume_step else durable
    log.close()
    with open(path, "r+b") as file:
        file.truncate(max(durable, path.stat().st_size - torn_bytes))
    log = JsonlLog(path, resume_step)
    log.write({"step": resume_step + 1})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [*range(1, resume_step + 2)]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_nothing_starts_with_empty_logs(tmp_path):
    for _ in range(2):  # the first was killed before its first checkpoint
        with MetricsWriter(tmp_path, tensorboard=False, wandb=False, resume_step=0) as metrics:
            metrics.write({"step": 0, "heldout/loss": 5.0})
            metrics.write_sample(0, "O", " Romeo")
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 0, "prompt": "O", "text": " Romeo"}]


def test_a_damaged_row_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\0\0\0\n{"step": 2}\n')
    with pytest.warns(UserWarning, match="line 2"):
        JsonlLog(path, 5).close()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_rows_are_strict_json_whatever_the_numbers(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True, wandb=False, resume_step=0) as metrics:
        metrics.write(
            {"step": np.int32(1), "loss": np.float32("nan"), "mfu": float("inf"), "skipped": True}
        )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "mfu": None, "skipped": 1}


def test_tensorboard_reads_every_scalar_and_where_the_resumed_run_starts(tmp_path):
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")  # a parser that is not ours
    crc32c = pytest.importorskip("tensorboardX.record_writer").masked_crc32c
    for first, last in ((0, 300), (200, 400)):
        with MetricsWriter(tmp_path, tensorboard=True, wandb=False, resume_step=first) as metrics:
            for step in range(first + 1, last + 1):
                metrics.write({"step": step, "time": 7.5, "loss": 1 / step, "heldout/loss": 2.0})

    seen: dict[int, dict[str, float]] = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert data[8:12] == struct.pack("<I", crc32c(data[:8]))
            body, data = data[12 : 12 + length], data[12 + length :]
            assert data[:4] == struct.pack("<I", crc32c(body))
            data = data[4:]
            event = proto.Event.FromString(body)
            if event.session_log.status == proto.SessionLog.START:
                seen = {step: row for step, row in seen.items() if step < event.step}
            if event.summary.value:
                assert event.step not in seen and event.wall_time == 7.5
                seen[event.step] = {v.tag: v.simple_value for v in event.summary.value}
    assert list(seen) == [*range(1, 401)]
    assert all(
        row == {"loss": np.float32(1 / step), "heldout/loss": 2} for step, row in seen.items()
    )


def test_wandb_asked_for_and_missing_is_one_clear_line(tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match=r"pip install 'olmo-jax\[wandb\]'"):
        MetricsWriter(tmp_path, tensorboard=False, wandb=True, resume_step=0)


def test_a_run_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give a run folder that can be"):
        MetricsWriter(tmp_path / "file", tensorboard=False, wandb=False, resume_step=0)
