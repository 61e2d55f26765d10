"""launch/tpu.py: what it would run, and what it runs when a `gcloud` answers this or that.

The gcloud here is a stand-in that gives scripted answers: the real one needs a project and a TPU.
Its flags are checked against the real one's help where that is installed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import LAUNCH, load

tpu = load("tpu")
ONE = "--name=run --zone=us-east5-a --accelerator_type=v5p-128 --image=reg.pkg.dev/p/r/olmo:1"
TRAIN = ["--", "--gin_file=configs/olmo2/7b.gin", "--gin.Data.paths=('gs://b/*.npy',)"]

SSH = "gcloud compute tpus queued-resources ssh run --zone=us-east5-a"
EVERY = f"{SSH} --node=all --worker=all --quiet"
DRY_RUN = rf"""
# if there is no such queued resource:
gcloud compute tpus queued-resources create run --zone=us-east5-a --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-count=2 --spot --async
# until it says ACTIVE:
gcloud compute tpus queued-resources describe run --zone=us-east5-a '--format=value(state.state)'
# on every host of every slice:
{EVERY} '--command=sudo gcloud auth configure-docker reg.pkg.dev --quiet && sudo docker pull --quiet reg.pkg.dev/p/r/olmo:1'
# again on every host:
{EVERY} '--command=sudo docker inspect run >/dev/null 2>&1 || sudo docker run --detach --name=run --privileged --user=root --network=host --ipc=host --stop-timeout=300 reg.pkg.dev/p/r/olmo:1 olmo-jax train --gin_file=configs/olmo2/7b.gin '"'"'--gin.Data.paths=('"'"'"'"'"'"'"'"'gs://b/*.npy'"'"'"'"'"'"'"'"',)'"'"''
# on the first host, whose status decides:
{SSH} --quiet '--command=sudo docker logs --follow --tail=100 run; exit $(sudo docker wait run)'
# after status 75 or a failure, and on from the pull:
{EVERY} '--command=sudo docker rm --force run'
# at the end; and after a pre-emption, then on from the start:
gcloud compute tpus queued-resources delete run --zone=us-east5-a --force --quiet
"""  # noqa: E501


def test_a_dry_run_prints_what_is_run_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert tpu.main([*ONE.split(), "--slices=2", "--spot", "--dry_run", *TRAIN]) == 0
    assert capsys.readouterr().out == DRY_RUN.lstrip()


def test_one_slice_is_a_node_and_several_are_counted():
    one = tpu.Commands(tpu.parse(ONE.split())).create()
    assert "--node-id=run" in one and not any(flag.startswith("--node-count") for flag in one)
    four = tpu.Commands(tpu.parse([*ONE.split(), "--slices=4", "--reserved", "--project=p"]))
    assert {"--node-count=4", "--reserved", "--project=p"} <= set(four.create())


def test_arguments_come_to_the_training_as_they_were_given():
    options = tpu.parse([*ONE.split(), *TRAIN, "--gin.Train.run_dir=it's $HOME `x`"])
    command = tpu.Commands(options).start()[-1].removeprefix("--command=")
    assert shlex.split(command)[-3:] == [*TRAIN[1:], "--gin.Train.run_dir=it's $HOME `x`"]


@pytest.mark.parametrize(
    "changed, says",
    [
        ("--accelerator_type=h100-8", "give one of v4-N, v5litepod-N, v5p-N, v6e-N"),
        ("--slices=0", "give at least 1"),
        ("--spot --reserved", "give one of them"),
        ("--name=a;b", "a letter first"),
        ("--zoen=x", "unrecognized arguments: --zoen=x"),
    ],
)
def test_wrong_options_end_before_gcloud_in_one_line(changed, says, capsys):
    with pytest.raises(SystemExit) as ended:
        tpu.parse([*ONE.split(), *changed.split()])
    assert ended.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


GCLOUD = """#!/bin/sh
# The next line of the file for what is asked: a state (none: NOT_FOUND), or an exit status.
what=$4
case "$*" in *pull*) what=pull;; *inspect*) what=start;; *logs*) what=watch;; *rm\\ *) what=clear;;
esac
echo "$what" >> log
answer=$(head -n 1 "$what" 2>/dev/null)
sed -i 1d "$what" 2>/dev/null
if [ "$what" = describe ]; then
  [ -n "$answer" ] || { echo "NOT_FOUND: no such resource" >&2; exit 1; }
  echo "$answer"
else
  exit "${answer:-0}"
fi
"""


def run(folder: Path, *options: str, states: list[str], watched: list[int], **answers: list[int]):
    """Runs the script with these answers; its exit status, what it asked for, what it said."""
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    for what, lines in {"describe": states, "watch": watched, **answers}.items():
        (folder / what).write_text("".join(f"{line}\n" for line in lines))
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "tpu.py"), *ONE.split(), *options],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OLMO_JAX_POLL_SECONDS": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, (folder / "log").read_text().split(), done.stderr


UP = ["pull", "start", "watch"]


def test_asks_waits_trains_and_deletes(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE"]
    status, log, _ = run(tmp_path, states=states, watched=[0])
    assert status == 0
    assert log == ["describe", "create", "describe", "describe", *UP, "delete"]


def test_a_preempted_slice_is_asked_for_anew_and_75_starts_again(tmp_path):
    states = ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"]
    status, log, _ = run(tmp_path, states=states, watched=[75, 255, 0])
    assert status == 0
    assert log == [
        *("describe", *UP, "describe", "clear"),  # 75, and still there
        *("describe", *UP, "describe"),  # the connection broke, and it is being taken away
        *("describe", "delete", "describe", "create", "describe", *UP, "delete"),
    ]


def test_a_broken_connection_attaches_again_and_starts_nothing_anew(tmp_path):
    status, log, _ = run(tmp_path, "--keep", states=["ACTIVE"] * 3, watched=[255, 0])
    assert status == 0
    assert log == ["describe", *UP, "describe", "describe", *UP]


def test_a_mistake_and_too_many_failures_end_it_and_say_how_to_delete(tmp_path):
    status, log, said = run(tmp_path, states=["ACTIVE"], watched=[2])
    assert status == 2 and log == ["describe", *UP]
    assert said.splitlines()[-1].endswith("delete run --zone=us-east5-a --force --quiet")
    (tmp_path / "log").unlink()
    failing = {"states": ["ACTIVE"] * 9, "watched": [76, 75, 76, 76]}
    status, log, _ = run(tmp_path, "--max_restarts=1", **failing)
    assert status == 76 and log.count("watch") == 4 and "delete" not in log


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud here")
def test_the_real_gcloud_knows_every_flag():
    options = tpu.parse(
        [*ONE.split(), "--slices=2", "--spot", "--project=p", "--service_account=s"]
    )
    commands = tpu.Commands(options)
    for command in (commands.create(), commands.state(), commands.delete(), commands.start()):
        verb = command[:5]
        done = subprocess.run([*verb, "--help"], capture_output=True, text=True, timeout=600)
        known = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        for flag in command[6:]:
            name = flag.partition("=")[0]
            assert re.search(rf"{name}\b", known), f"{' '.join(verb)} has no {name}"
