"""A SLURM of one node on this machine, from Debian's slurm-wlm and munge, in its own folder."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def find(daemon: str) -> str | None:
    return shutil.which(daemon, path=f"/usr/sbin:/sbin:{os.environ['PATH']}")


def missing() -> str | None:
    """Why there can be no cluster here; None: there can."""
    absent = [daemon for daemon in DAEMONS if find(daemon) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which SLURM's commands find the cluster; ends it afterwards."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, folder=folder, ports=_free_ports(2)))
    files = {n: f"{folder}/munge.{n}" for n in ("socket", "pid", "log", "seed")}
    munge = [f"--key-file={key}", f"--socket={files['socket']}", f"--pid-file={files['pid']}"]
    munge += [f"--log-file={files['log']}", f"--seed-file={files['seed']}"]
    commands = {
        "munged": ["--foreground", "--force", "--num-threads=1", *munge],
        "slurmctld": ["-D"],
        "slurmd": ["-D"],
    }
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    started = []
    try:
        for daemon, options in commands.items():
            with open(folder / f"{daemon}.out", "wb") as out:
                command = [str(find(daemon)), *options]
                started.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
            if daemon == "munged":
                _wait(Path(files["socket"]).exists, folder)
        _wait(lambda: "idle" in output(environment, "sinfo", "--noheader"), folder)
        try:
            yield environment
        finally:  # the jobs first: their steps would outlive the daemons
            output(environment, "scancel", "--user=root", "--signal=KILL", "--full")
            output(environment, "scancel", "--user=root")
            _wait(lambda: not output(environment, "squeue", "--noheader"), folder)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def output(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout


def _wait(condition, folder: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        said = "\n".join(p.read_text()[-1000:] for p in folder.glob("*.out"))
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
