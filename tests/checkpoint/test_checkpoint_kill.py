"""Checkpoints survive what happens to processes and disks; real ones, started, killed, filled."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from olmo_jax.checkpoint.checksums import first_damage

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def start(*arguments: object, devices: int = 1) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[list[dict], str]:
    """Waits; gives the lines it printed and its standard error."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    lines = [line for line in output.splitlines() if line.startswith("{")]  # Gloo prints too
    return [json.loads(line) for line in lines], errors


def run(*arguments: object, status: int = 0) -> tuple[list[dict], str]:
    return finish(start(*arguments), status)


def test_a_save_killed_before_its_commit_leaves_the_one_before(tmp_path):
    run("save_steps", tmp_path, 5, 5)
    run("die_before_commit", tmp_path, 10, status=-signal.SIGKILL)
    (there,) = tmp_path.glob("step10*")
    assert (there / "manifest.json").is_file()  # all that was missing is the rename
    (found,), errors = run("resume", tmp_path)
    assert found == {"step": 5, "identical": True, "steps": [5]}
    assert "step10.tmp" in errors and "killed" in errors
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_in_retention_leaves_the_newer_ones(tmp_path, when):
    run("save_steps", tmp_path, 5, 10)
    run("die_in_retention", tmp_path, 15, when, status=-signal.SIGKILL)
    (found,), _ = run("resume", tmp_path)
    assert found == {"step": 15, "identical": True, "steps": [10, 15]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step10", "step15"]


@pytest.mark.slow
def test_a_save_killed_at_any_moment_never_loses_what_was_promised(tmp_path):
    """Kills at rising delays after a save began, over 64 MB, until a save gets through."""
    rows = 330_000  # 3 × 21 MB: the write takes long enough to be hit
    run("save_steps", tmp_path, 3, 3, rows)
    hit = 0
    for delay in (0.0, 0.02, 0.08, 0.2):
        process = start("save_steps", tmp_path, 5, 15, rows)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert json.loads(line) == {"started": 5} or "steps" in line
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        hit += bool(list(tmp_path.glob("*.tmp")))
        complete = [p.parent.name for p in tmp_path.glob("step*/manifest.json")]
        assert "step3" in complete
        for name in complete:
            assert first_damage(tmp_path / name) is None
    assert hit, "no kill fell into a save: the test is too slow to see anything"


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own; needs the right to mount."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("when", ["start", "middle"])
def test_a_full_disk_is_said_in_one_line_and_given_back(tmp_path, when):
    with disk(tmp_path / "disk", "size=4m") as small:
        (failed, later, *refused), errors = run("fill_disk", small / "run", when)
    assert re.search(r"the disk is full \(it needs about \d.* MB, \d.* free\)", failed["error"])
    assert "newest complete one is step 1" in failed["error"] and "\n" not in failed["error"]
    assert failed["left"] == ["step1"] and failed["latest"] == 1
    assert later == {"steps": [1, 2]}  # the space was given back: a smaller one fits
    assert len(refused) == 2 and all("disk is full" in line["error"] for line in refused)
    assert "Traceback" not in errors


def test_a_read_only_place_is_refused_in_one_line(tmp_path):
    with disk(tmp_path / "disk", "ro,size=1m") as read_only:
        lines, _ = run("open_refused", read_only / "run")
    assert len(lines) == 2
    assert all("Read-only" in line["error"] and "\n" not in line["error"] for line in lines)


def test_two_processes_save_and_restore_and_one_reads_it_alone(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start("many", tmp_path, rank, port, devices=2) for rank in (0, 1)]
    for process in both:
        (found, refused), _ = finish(process)
        assert found == {"step": 15, "identical": True, "steps": [10, 15]}
        assert "step15 is damaged" in refused["error"] and "take step 10" in refused["error"]
    alone, _ = run("save_steps", tmp_path, 1, 1)  # cleans nothing that counts
    (tmp_path / "step15").rename(tmp_path / "step15.damaged")
    (found,), _ = run("resume", tmp_path)
    assert alone == [] and found == {"step": 10, "identical": True, "steps": [10]}
