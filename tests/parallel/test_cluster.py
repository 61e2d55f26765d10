"""Who the other processes are, what is said when they do not come, and which devices each gets."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmo_jax.errors import UserError
from olmo_jax.parallel import local
from olmo_jax.parallel.processes import Cluster, find_cluster

SLURM = {
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
}


def test_alone_there_is_nothing_to_join():
    assert find_cluster({}) is None
    assert find_cluster({"OLMO_JAX_PROCESSES": "1"}) is None
    assert find_cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    # A batch script outside srun has SLURM's variables, and is no task.
    assert find_cluster({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12]", "gpu007"),
        ("gpu7", "gpu7"),
        ("gpu7,login[1-3]", "gpu7"),
        ("a-b[3,5-7]", "a-b3"),
    ],
)
def test_slurm_tasks_meet_on_the_first_node(nodes, first):
    cluster = find_cluster(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert cluster == Cluster(f"{first}:{61000 + 12 * 16}", 4, 2)


def test_slurm_tasks_of_one_node_share_its_gpus_and_steps_have_ports_of_their_own():
    shared = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "2"}
    all_gpus = find_cluster(SLURM | shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert all_gpus is not None and all_gpus.gpu == 2
    one_each = find_cluster(SLURM | shared | {"CUDA_VISIBLE_DEVICES": "2"})
    assert one_each is not None and one_each.gpu is None
    other = find_cluster(SLURM | {"SLURM_STEP_ID": "1"})
    assert other is not None and other.coordinator != all_gpus.coordinator


def test_pods_of_a_jobset_meet_at_its_first_pod():
    pod = {"JOBSET_NAME": "olmo", "REPLICATED_JOB_NAME": "gpu", "JOB_COMPLETION_INDEX": "3"}
    cluster = find_cluster(pod | {"OLMO_JAX_PROCESSES": "4"})
    assert cluster == Cluster("olmo-gpu-0-0.olmo:8476", 4, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"OLMO_JAX_COORDINATOR": "h:1"}, "without OLMO_JAX_PROCESSES, OLMO_JAX_PROCESS_ID"),
        ({"OLMO_JAX_PROCESSES": "4"}, "without OLMO_JAX_COORDINATOR, OLMO_JAX_PROCESS_ID"),
        ({"OLMO_JAX_PROCESS_ID": "4"}, "process_id = 4 of 4 processes: it must be 0 to 3"),
        ({"OLMO_JAX_PROCESSES": "x"}, "OLMO_JAX_PROCESSES = 'x': it must be a whole number"),
        ({"OLMO_JAX_COORDINATOR": "host"}, "'host': give HOST:PORT"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    whole = {
        "OLMO_JAX_COORDINATOR": "h:1",
        "OLMO_JAX_PROCESSES": "4",
        "OLMO_JAX_PROCESS_ID": "0",
    }
    environment = given if "without" in message else whole | given
    with pytest.raises(UserError, match=message):
        find_cluster(environment)


def test_processes_that_do_not_come_are_missed_in_one_line(tmp_path):
    (tmp_path / "a.npy").write_bytes(bytes(1000))
    (tmp_path / "a.gin").write_text(
        f'Train.steps = 1\nData.paths = ("{tmp_path}/a.npy",)\nData.sequence_length = 8\n'
        "Data.batch_size = 2\nModel.vocab_size = 8\nModel.d_model = 8\nModel.n_layers = 1\n"
        "Model.n_heads = 1\nModel.mlp_width = 8\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    begun = time.monotonic()
    # Nobody listens on port 1; the other is the coordinator itself, on a port of its own.
    waiting = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "olmo_jax.cli", "train", f"--gin_file={tmp_path}/a.gin"),
                *(f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process_id={index}"),
                "--start_timeout=3",
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, port in ((1, 1), (0, 20000 + os.getpid() % 10000))
    ]
    for process, expected in zip(
        waiting, ("process 1 of 2 cannot reach the coordinator", "not all of 2"), strict=True
    ):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 2
        [line] = errors.splitlines()
        assert line.startswith(f"error: {expected}") and "127.0.0.1:" in line
    assert time.monotonic() - begun < 45


def test_each_process_on_a_machine_has_devices_of_its_own(monkeypatch):
    monkeypatch.setattr(local, "gpus", lambda: ["0", "1", "2", "3"])

    def visible(processes, each, environment):
        every = [local.devices(i, processes, each, environment) for i in range(processes)]
        return [d["CUDA_VISIBLE_DEVICES"] for d in every]

    assert visible(2, None, {}) == ["0,1", "2,3"]
    assert visible(2, 1, {"CUDA_VISIBLE_DEVICES": "2,5,7"}) == ["2", "5"]
    with pytest.raises(UserError, match="8 processes with 1 GPU each, and there are 4"):
        visible(8, None, {})
    assert local.devices(1, 2, 4, {"JAX_PLATFORMS": "cpu"}) == {"JAX_NUM_CPU_DEVICES": "4"}
    assert local.devices(1, 2, None, {"JAX_PLATFORMS": "cpu"}) == {}
