"""Starts several processes of a run on this machine, and ends them together.

For trying out on a laptop what runs on many hosts, or one process a GPU. What they say to one
another is watch.py's.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from olmo_jax.errors import UserError
from olmo_jax.parallel.watch import STATUS_LOST

_GRACE = 10.0  # seconds for the others to end by themselves after one has failed
_KILLED_GRACE = 2.0  # they would need half a minute to be sure that one is dead; we know
_FINE = (0, 75)


def launch_local(arguments: Sequence[str], processes: int, devices_each: int | None = None) -> int:
    """Runs `olmo-jax ARGUMENTS` in `processes` processes; returns their exit status.

    The first writes to this terminal; of the others come their errors, marked with their number.
    SIGTERM and Ctrl-C are handed on. When one fails, all end, and its status is returned; that of
    one that was killed is 76. `devices_each` devices each: GPUs where there are any, else virtual
    CPU devices.
    """
    if processes < 1 or (devices_each is not None and devices_each < 1):
        raise UserError(
            f"--processes={processes} --devices_each={devices_each}: both must be at least 1"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environments = [
        {
            **os.environ,
            "OLMO_JAX_COORDINATOR": coordinator,
            "OLMO_JAX_PROCESSES": str(processes),
            "OLMO_JAX_PROCESS_ID": str(index),
            **devices(index, processes, devices_each, os.environ),
        }
        for index in range(processes)
    ]
    return _Group(arguments, environments).run()


def devices(
    index: int, processes: int, each: int | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables that give a process its own devices of this machine."""
    visible = [] if environment.get("JAX_PLATFORMS", "").startswith(("cpu", "tpu")) else gpus()
    if visible and "CUDA_VISIBLE_DEVICES" in environment:
        visible = [gpu for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if not visible:
        return {} if each is None else {"JAX_NUM_CPU_DEVICES": str(each)}
    each = each or len(visible) // processes
    if not each or each * processes > len(visible):
        raise UserError(
            f"{processes} processes with {each or 1} GPU each, and there are {len(visible)}: give "
            "fewer, or JAX_PLATFORMS=cpu"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[index * each : (index + 1) * each])}


def gpus() -> list[str]:
    """The numbers of this machine's NVIDIA GPUs."""
    found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted(found, key=int)


class _Group:
    """The processes, each in a session of its own: a Ctrl-C reaches them from here alone."""

    def __init__(self, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]):
        self.children: list[subprocess.Popen] = []
        self.written: list[deque[str]] = [deque(maxlen=20) for _ in environments]
        self.threads: list[threading.Thread] = []
        with_parent = _ends_with_parent()
        for index, environment in enumerate(environments):
            first = index == 0
            child = subprocess.Popen(
                [sys.executable, "-m", "olmo_jax.cli", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if first else subprocess.PIPE,
                stderr=None if first else subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=with_parent,
            )
            self.children.append(child)
            if not first:
                reader = threading.Thread(target=self._read, args=(index,), daemon=True)
                reader.start()
                self.threads.append(reader)

    def run(self) -> int:
        old = {n: signal.signal(n, self._hand_on) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            failed = self._wait()
            if failed is not None:
                self._end_others(failed)
            for reader in self.threads:
                reader.join(2)
        finally:
            for child in self.children:
                if child.poll() is None:
                    child.kill()
            for number, handler in old.items():
                signal.signal(number, handler)
        if failed is None:
            return max(child.returncode for child in self.children)
        status = self.children[failed].returncode
        self._explain(failed, status)
        return status if status > 0 else STATUS_LOST

    def _wait(self) -> int | None:
        """The first that fails, or None when all have ended well."""
        while True:
            codes = [child.poll() for child in self.children]
            for index, code in enumerate(codes):
                if code is not None and code not in _FINE:
                    return index
            if None not in codes:
                return None
            time.sleep(0.05)

    def _end_others(self, failed: int) -> None:
        killed = self.children[failed].returncode < 0
        deadline = time.monotonic() + (_KILLED_GRACE if killed else _GRACE)
        while time.monotonic() < deadline and any(c.poll() is None for c in self.children):
            time.sleep(0.05)
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()

    def _explain(self, failed: int, status: int) -> None:
        if status < 0:
            name = signal.Signals(-status).name
            print(
                f"error: process {failed} was ended by {name}, and so were the others; the same "
                "command goes on from the newest checkpoint",
                file=sys.stderr,
            )
        elif failed and not any(line.startswith("error: ") for line in self.written[failed]):
            for line in self.written[failed]:
                self._show(failed, line)

    def _read(self, index: int) -> None:
        pipe = self.children[index].stdout
        assert pipe is not None
        for line in pipe:
            self.written[index].append(line)
            if line.startswith("error: "):
                self._show(index, line)

    def _show(self, index: int, line: str) -> None:
        print(f"[{index}] {line.rstrip()}", file=sys.stderr, flush=True)

    def _hand_on(self, number: int, frame: object) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)


def _ends_with_parent():
    """What a child does before it starts: asks the kernel to end it when this process dies."""
    if sys.platform != "linux":
        return None
    prctl, PR_SET_PDEATHSIG = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
