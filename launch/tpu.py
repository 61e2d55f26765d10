"""Trains on Cloud TPU: asks for one slice or several as a queued resource, and restarts.

Runs on any machine with `gcloud`, for as long as the training does (in tmux, say); the training
itself runs in a container on each host and doesn't need it. The same command again attaches to what
is there. What happens after an end depends on the training's status: launch/README.md.
Not for TPU7x, which only GKE hands out: launch/gke.py.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

# Cloud TPU documentation, "TPU software versions": the images that hold docker and no framework.
RUNTIME_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
STATUS_RESTART, STATUS_USER_ERROR = 75, 2
SSH_FAILED = 255  # ssh's own; the training goes on without it
SECONDS_BETWEEN_LOOKS = float(os.environ.get("OLMO_JAX_POLL_SECONDS", 60))
LOOKS = 5  # before giving up on a gcloud that fails


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; everything after -- goes to `olmo-jax train` as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python launch/tpu.py --name=NAME --zone=ZONE --accelerator_type=v5p-128 "
        "--image=IMAGE [options] -- --gin_file=… --gin.Train.run_dir=gs://…",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the queued resource, its slices and the container")
    add("--zone", required=True, help="such as us-east5-a")
    add("--project", help="default: gcloud's own setting")
    add("--accelerator_type", required=True, help="v4-N, v5litepod-N, v5p-N or v6e-N, a slice")
    add("--slices", type=int, default=1, help="joined by the data-centre network; default 1")
    add("--image", required=True, help="built by launch/docker/Dockerfile, in a registry")
    add("--spot", action="store_true", help="cheap capacity that may be taken away")
    add("--reserved", action="store_true", help="from the project's reservation")
    add("--service_account", help="of the hosts; it needs to read and write the run's bucket")
    add("--runtime_version", help="of the hosts' system; default: by accelerator type")
    add("--max_restarts", type=int, default=10, help="after failures in a row; default 10")
    add("--keep", action="store_true", help="don't delete the queued resource at the end")
    add("--dry_run", action="store_true", help="print the commands, run none")
    add("train", nargs="*", metavar="-- ARGUMENTS", help="of olmo-jax train")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        parser.error(f"--name={options.name}: give at most 40 of a-z, 0-9 and -, a letter first")
    chip = options.accelerator_type.partition("-")[0]
    if chip not in RUNTIME_VERSIONS:
        known = ", ".join(f"{name}-N" for name in RUNTIME_VERSIONS)
        parser.error(f"--accelerator_type={options.accelerator_type}: give one of {known}")
    if options.slices < 1:
        parser.error(f"--slices={options.slices}: give at least 1")
    if options.spot and options.reserved:
        parser.error("--spot and --reserved: give one of them")
    options.runtime_version = options.runtime_version or RUNTIME_VERSIONS[chip]
    return options


class Commands:
    """The gcloud commands for one set of options (checked with Google Cloud SDK 528.0.0)."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.where = [f"--zone={options.zone}"]
        if options.project:
            self.where.append(f"--project={options.project}")

    def _gcloud(self, verb: str, *flags: str) -> list[str]:
        group = ["gcloud", "compute", "tpus", "queued-resources", verb, self.options.name]
        return [*group, *self.where, *flags]

    def create(self) -> list[str]:
        options = self.options
        flags = [
            f"--accelerator-type={options.accelerator_type}",
            f"--runtime-version={options.runtime_version}",
        ]
        if options.slices == 1:
            flags.append(f"--node-id={options.name}")
        else:  # gcloud takes --node-count from 2 on, and names the slices NAME-0, NAME-1, …
            flags.append(f"--node-count={options.slices}")
        flags += [f"--{tier}" for tier in ("spot", "reserved") if getattr(options, tier)]
        if options.service_account:
            flags.append(f"--service-account={options.service_account}")
        return self._gcloud("create", *flags, "--async")

    def state(self) -> list[str]:
        return self._gcloud("describe", "--format=value(state.state)")

    def delete(self) -> list[str]:
        return self._gcloud("delete", "--force", "--quiet")  # --force: with its slices

    def _ssh(self, command: str, *where: str) -> list[str]:
        return self._gcloud("ssh", *where, "--quiet", f"--command={command}")

    def _everywhere(self, command: str) -> list[str]:
        # gcloud works through 64 hosts at a time, so nothing here may wait for the other hosts
        return self._ssh(command, "--node=all", "--worker=all")

    def pull(self) -> list[str]:
        """On its own, so that afterwards all hosts start within jax's time-out."""
        image, registry = self.options.image, self.options.image.partition("/")[0]
        pull = f"sudo docker pull --quiet {shlex.quote(image)}"
        if registry.endswith(("pkg.dev", "gcr.io")):
            pull = f"sudo gcloud auth configure-docker {shlex.quote(registry)} --quiet && {pull}"
        return self._everywhere(pull)

    def start(self) -> list[str]:
        """Starts the container on each host where there is none.

        Detached, so that a broken ssh connection ends nothing. On the host's network, where several
        slices find their coordinator; as root, which the TPU's device files belong to; with 300 s
        to save when it is stopped (a spot host that is taken away has 30).
        """
        name, train = self.options.name, shlex.join(["olmo-jax", "train", *self.options.train])
        return self._everywhere(
            f"sudo docker inspect {name} >/dev/null 2>&1 || sudo docker run --detach --name={name} "
            "--privileged --user=root --network=host --ipc=host --stop-timeout=300 "
            f"{shlex.quote(self.options.image)} {train}"
        )

    def watch(self) -> list[str]:
        """Follows the first host's log, and ends with its status."""
        name = self.options.name
        return self._ssh(
            f"sudo docker logs --follow --tail=100 {name}; exit $(sudo docker wait {name})"
        )

    def clear(self) -> list[str]:
        return self._everywhere(f"sudo docker rm --force {self.options.name}")


def show(commands: Commands) -> None:
    """What `launch` runs, and when."""
    for why, command in (
        ("if there is no such queued resource:", commands.create()),
        ("until it says ACTIVE:", commands.state()),
        ("on every host of every slice:", commands.pull()),
        ("again on every host:", commands.start()),
        ("on the first host, whose status decides:", commands.watch()),
        (f"after status {STATUS_RESTART} or a failure, and on from the pull:", commands.clear()),
        ("at the end; and after a pre-emption, then on from the start:", commands.delete()),
    ):
        print(f"# {why}\n{shlex.join(command)}")


def launch(commands: Commands) -> int:
    """Creates, trains, restarts; the training's status when nothing is left to try."""
    options, failures = commands.options, 0
    while True:
        _wait_until_active(commands)
        status = _run(commands.pull()) or _run(commands.start()) or _run(commands.watch())
        if status in (0, STATUS_USER_ERROR):
            break
        if status == STATUS_RESTART:
            failures = 0
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)  # until a pre-emption shows in the state
        if _state(commands) != "ACTIVE":
            say("the slices were taken away; asking again")
            failures = 0
            continue
        failures += status != STATUS_RESTART
        if failures > options.max_restarts:
            break
        say(f"status {status}: starting again")
        if status != SSH_FAILED:
            _run(commands.clear())
    if status == 0 and not options.keep:
        return _run(commands.delete())
    say(f"status {status}; the queued resource is still there, and costs. To delete it:")
    print(shlex.join(commands.delete()), file=sys.stderr)
    return status


def _wait_until_active(commands: Commands) -> None:
    shown = None
    while (state := _state(commands)) != "ACTIVE":
        if state == "FAILED":  # never to be granted: asked for what there isn't
            raise SystemExit(f"error: it FAILED; see and delete it:\n{_advice(commands)}")
        if state == "SUSPENDED":
            _run(commands.delete())
            continue
        if not state and _run(commands.create()) != 0:
            raise SystemExit("error: gcloud could not ask for the queued resource; see above")
        if state != shown:
            say(f"queued resource {commands.options.name}: {state or 'asked for'}")
        shown = state
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _state(commands: Commands) -> str:
    """CREATING, WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, …; empty where there is none."""
    for _ in range(LOOKS):
        done = subprocess.run(commands.state(), capture_output=True, text=True)
        if done.returncode == 0 or "NOT_FOUND" in done.stderr:
            return done.stdout.strip()
        say(done.stderr.strip())
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise SystemExit("error: gcloud did not say how the queued resource is; see above")


def _advice(commands: Commands) -> str:
    see = commands.state()[:-1]  # all of it, not the state alone
    return f"{shlex.join(see)}\n{shlex.join(commands.delete())}"


def _run(command: Sequence[str]) -> int:
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    return subprocess.run(command).returncode


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    commands = Commands(parse(arguments))
    if commands.options.dry_run:
        show(commands)
        return 0
    try:
        return launch(commands)
    except KeyboardInterrupt:
        say("left; the training goes on, and the same command attaches to it. To end it all:")
        print(shlex.join(commands.delete()), file=sys.stderr)
        return 130
    except FileNotFoundError:
        raise SystemExit("error: no gcloud here; install the Google Cloud CLI") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
