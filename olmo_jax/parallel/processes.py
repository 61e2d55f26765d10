"""Starting and ending the processes of a run: who they are, where they meet, how they leave.

A TPU host, a SLURM task or a pod runs one process each, all with the same command. What they tell
one another while they run is watch.py's.
"""

import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from olmo_jax.errors import UserError
from olmo_jax.parallel.local import gpus
from olmo_jax.parallel.watch import (
    KNOWN_AFTER,
    SHOW_CURSOR,
    STATUS_LOST,
    Watch,
    set_watch,
    the_watch,
)

STATUS_USER_ERROR = 2
# jax's own limit, which aborts a process without naming the one that died: a backstop for ours
# (watch.DEAD_AFTER). It sends a sign of life every half of it, so notices a death after 50 to 100
# s; with 55 it was once the first, after 29 s.
_HEARTBEAT_TIMEOUT = 100
_SLURM_PORT, _JOBSET_PORT = 61000, 8476


@dataclass(frozen=True)
class Cluster:
    """This process's place among the others."""

    coordinator: str | None
    """HOST:PORT at which process 0 listens; None: jax finds all of it out (TPU)."""
    count: int | None
    index: int | None
    gpu: int | None = None
    """The one GPU of its host that the process uses; None: all."""


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    timeout: int | None = None,
) -> None:
    """Joins the other processes; returns at once, having done nothing, where there are none.

    Call it before any device is touched. The others are found from, in this order: the arguments
    or OLMO_JAX_COORDINATOR (HOST:PORT of process 0), OLMO_JAX_PROCESSES and OLMO_JAX_PROCESS_ID;
    SLURM's variables in an `srun` step; a GKE JobSet's (JOBSET_NAME, REPLICATED_JOB_NAME and
    JOB_COMPLETION_INDEX, with OLMO_JAX_PROCESSES); a TPU host's metadata. Ends in one line when
    not all have met within `timeout` seconds (OLMO_JAX_START_TIMEOUT, or 300).
    """
    if the_watch() is not None:  # a second run in this process
        return
    given: dict[str, Any] = {
        "OLMO_JAX_COORDINATOR": coordinator,
        "OLMO_JAX_PROCESSES": processes,
        "OLMO_JAX_PROCESS_ID": process_id,
        "OLMO_JAX_START_TIMEOUT": timeout,
    }
    environment = os.environ | {k: str(v) for k, v in given.items() if v is not None}
    cluster = find_cluster(environment)
    if cluster is None:
        return
    seconds = _number(environment, "OLMO_JAX_START_TIMEOUT", 300)
    _connect(cluster, seconds)
    jax_state = _state()  # jax.process_count() would begin to use the devices
    if jax_state.num_processes == 1:
        return
    if jax_state.process_id:  # warnings too come from the first process only
        logging.getLogger("olmo_jax").setLevel(logging.ERROR)
    address = jax_state.coordinator_address
    watch = Watch(jax_state.client, jax_state.process_id, jax_state.num_processes, address)
    watch.start()
    set_watch(watch)
    _explain_aborts(lambda: _lost(watch, address))


def is_first() -> bool:
    """Whether this process is the one that prints, logs and reports."""
    watch = the_watch()
    return watch is None or watch.index == 0


def leave(status: int) -> NoReturn:
    """Ends the process. After a failure without waiting for the others, whom it has told; else
    together with them."""
    watch = the_watch()
    if watch is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        if not watch.close_together(failed=status not in (0, 75)):
            os._exit(status)
    sys.exit(status)


# --- who and where --------------------------------------------------------------------------------


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """This process's place, from the environment alone; None: it is on its own."""
    names = ("OLMO_JAX_COORDINATOR", "OLMO_JAX_PROCESSES", "OLMO_JAX_PROCESS_ID")
    explicit = [name for name in names if environment.get(name)]
    if set(explicit) - {"OLMO_JAX_PROCESSES"}:
        return _explicit(environment, names)
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return _slurm(environment)
    if "JOBSET_NAME" in environment and "JOB_COMPLETION_INDEX" in environment:
        return _jobset(environment)
    if explicit and _number(environment, "OLMO_JAX_PROCESSES") > 1:
        return _explicit(environment, names)
    return Cluster(None, None, None) if on_tpu_host(environment) else None


def _explicit(environment: Mapping[str, str], names: tuple[str, str, str]) -> Cluster | None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(n for n in names if n not in missing)} given without "
            f"{', '.join(missing)}: give all three, or --coordinator=HOST:PORT, --processes=N and "
            "--process_id=0 to N - 1"
        )
    address = environment[names[0]]
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"coordinator {address!r}: give HOST:PORT of process 0, as 10.0.0.1:8476")
    count, index = (_number(environment, name) for name in names[1:])
    if not 0 <= index < count:
        raise UserError(f"process_id = {index} of {count} processes: it must be 0 to {count - 1}")
    return Cluster(address, count, index) if count > 1 else None


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """A task of `srun`; several tasks on a node share its GPUs, one each."""
    count = _number(environment, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return None
    nodes = environment["SLURM_STEP_NODELIST"]
    # "gpu[001-004,009],login1" begins with gpu001.
    first = re.sub(r"^([^,\[]*)\[([^-,\]]*).*$", r"\1\2", nodes).partition(",")[0]
    # Another job, or another step of this one, on the same node has another port.
    job, step = (_number(environment, f"SLURM_{name}_ID", 0) for name in ("JOB", "STEP"))
    port = _SLURM_PORT + (job * 16 + step % 16) % 4096
    tasks_here = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    given = environment.get("CUDA_VISIBLE_DEVICES")
    visible = gpus() if given is None else given.split(",")
    shared = tasks_here is not None and int(tasks_here[0]) > 1 and len(visible) > 1
    gpu = _number(environment, "SLURM_LOCALID") if shared else None
    return Cluster(f"{first}:{port}", count, _number(environment, "SLURM_PROCID"), gpu)


def _jobset(environment: Mapping[str, str]) -> Cluster | None:
    """A pod of a GKE JobSet with one indexed job, whose first pod has a fixed name."""
    count = _number(environment, "OLMO_JAX_PROCESSES", 1)
    if count == 1:
        return Cluster(None, None, None) if on_tpu_host(environment) else None
    jobset, job = environment["JOBSET_NAME"], environment.get("REPLICATED_JOB_NAME", "workers")
    address = f"{jobset}-{job}-0-0.{jobset}:{_JOBSET_PORT}"
    return Cluster(address, count, _number(environment, "JOB_COMPLETION_INDEX"))


def on_tpu_host(environment: Mapping[str, str]) -> bool:
    """Whether jax will use TPUs here, and can find out about the other hosts."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    if importlib.util.find_spec("libtpu") is None:
        return False
    if "TPU_WORKER_HOSTNAMES" in environment or "TPU_PROCESS_ADDRESSES" in environment:
        return True
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and "TPU_SKIP_MDS_QUERY" not in environment


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(f"{name} = {text!r}: it must be a whole number")
    return int(text)


# --- meeting --------------------------------------------------------------------------------------


def _connect(cluster: Cluster, timeout: int) -> None:
    """jax.distributed.initialize; jax would end in an abort when it takes too long."""
    import jax

    # Its own handler of SIGTERM would take the place of the loop's.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(timeout, _give_up, (cluster, timeout))
    timer.daemon = True
    timer.start()
    options: dict[str, Any] = {
        "initialization_timeout": timeout + 60,
        "heartbeat_timeout_seconds": _HEARTBEAT_TIMEOUT,
    }
    if cluster.coordinator is not None:
        options |= {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.count,
            "process_id": cluster.index,
            "local_device_ids": None if cluster.gpu is None else [cluster.gpu],
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        where = f" at {cluster.coordinator}" if cluster.coordinator else ""
        raise UserError(
            f"the processes could not meet{where}: {' '.join(str(error).split())}"
        ) from error
    finally:
        timer.cancel()


def _give_up(cluster: Cluster, timeout: int) -> None:
    address, count = cluster.coordinator or "the TPU's first host", cluster.count or "all"
    reached = cluster.coordinator is not None and _reaches(cluster.coordinator)
    if cluster.index == 0 or reached:
        reason = f"not all of {count} processes have come to the coordinator {address}"
        advice = "see whether each was started, with the same number of processes"
    else:
        reason = f"process {cluster.index} of {count} cannot reach the coordinator {address}"
        advice = "see whether process 0 runs there and its port is open"
    _end(f"{reason} within {timeout} s: {advice} (--start_timeout)", STATUS_USER_ERROR)


def _reaches(address: str, seconds: float = 2.0) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except OSError:
        return False
    return True


def _state() -> Any:
    """Where jax keeps its client of the coordination service: the only door, used by Orbax too."""
    from jax._src import distributed

    return distributed.global_state


# --- the last words -------------------------------------------------------------------------------

_kept: list[Any] = []  # the handler must outlive everything


def _explain_aborts(explain: Callable[[], None]) -> None:
    """Has `explain` called when the C++ side aborts the process, as jax does the moment that the
    coordinator is gone: no exception reaches Python then.

    Python's own handlers wait for the main thread, which is gone: so one through libc, called in
    the thread that aborts.
    """
    import ctypes

    def handler(number: int) -> None:
        explain()

    # When it returns, abort() ends the process all the same.
    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handler))
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), _kept[-1])


def _lost(watch: Watch, address: str) -> None:
    """Before an abort: says that the coordinator is gone, where it is, or who was not heard of any
    more. (The thread that aborts is the one that answers come by, so the watch may be stuck.) It
    returns when no death is the cause."""
    deadline = time.monotonic() + KNOWN_AFTER
    while time.monotonic() < deadline:
        if silent := watch.silent():
            again = "the same command goes on from the newest checkpoint"
            _end(f"no sign of life from {silent}; {again}", STATUS_LOST)
        if watch.index != 0 and not _reaches(address):
            _end(
                f"process 0 ({address.rpartition(':')[0]}), the coordinator, has died or cannot be "
                "reached; the same command goes on from the newest checkpoint",
                STATUS_LOST,
            )
        time.sleep(0.5)


def _end(message: str, status: int) -> NoReturn:
    os.write(2, SHOW_CURSOR * os.isatty(2) + f"error: {message}\n".encode())
    os._exit(status)
