"""`olmo-jax serve` as a process: it comes up, and SIGTERM ends it when its work is done."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from tiny_server import tiny_run

import olmo_jax.cli as cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


@contextmanager
def started(run, *more):
    """The process and its port."""
    command = [sys.executable, "-m", "olmo_jax.cli", "serve", str(run), "--port=0", *more]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, int(line.partition("127.0.0.1:")[2].partition(" ")[0])
        finally:
            process.kill()


def ask(port, **body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"prompt": "To-morrow", **body})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_leaves_with_status_0(run):
    with started(run, "--slots=2") as (process, port):
        body = {"model": str(run), "max_tokens": 50, "temperature": 0}
        whole = json.loads(ask(port, **body).read())["choices"][0]
        answers = []

        def client():
            response = ask(port, **body, n=20, stream=True)
            begun.release()
            answers.append(response.read().decode())

        begun = threading.Semaphore(0)
        clients = [threading.Thread(target=client) for _ in range(4)]
        for one in clients:
            one.start()
        for _ in clients:
            assert begun.acquire(timeout=120)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # some supervisors are impatient
        for one in clients:
            one.join(120)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "", "")
        assert len(answers) == 4
        for answer in answers:
            *events, done = [line[6:] for line in answer.split("\n\n")[:-1]]
            assert done == "[DONE]"
            texts = [""] * 20
            for event in events:
                [choice] = json.loads(event)["choices"]
                texts[choice["index"]] += choice["text"]
            assert texts == [whole["text"]] * 20
        with pytest.raises(ConnectionRefusedError):
            ask(port, **body)


@pytest.mark.slow
def test_a_client_that_is_killed_in_the_middle_leaves_nothing_behind(run):
    with started(run, "--slots=1") as (process, port):
        code = f"""
import http.client, json, os, signal
c = http.client.HTTPConnection("127.0.0.1", {port}, timeout=120)
body = {{"model": {str(run)!r}, "prompt": "a", "max_tokens": 60, "n": 100, "stream": True}}
c.request("POST", "/v1/completions", json.dumps(body), {{"Content-Type": "application/json"}})
c.getresponse().read(100)
os.kill(os.getpid(), signal.SIGKILL)
"""
        assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
        made = json.loads(ask(port, model=str(run), max_tokens=5, temperature=0).read())
        assert made["usage"]["completion_tokens"] <= 5
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert float(rows["olmo_jax_generated_tokens_total"]) < 60 * 100 / 2
        assert rows["olmo_jax_running"] == rows["olmo_jax_waiting"] == "0.0"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_who_presses_ctrl_c_twice_does_not_wait(run):
    with started(run, "--slots=1") as (process, port):
        response = ask(port, model=str(run), max_tokens=50, n=128, stream=True)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (130, "")
        with pytest.raises(http.client.IncompleteRead):
            response.read()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--port=99999", "port = 99999"),
        ("--host=no.such.host.invalid", "--host=no.such.host.invalid"),
        ("--port=0 --slots=0", "slots = 0"),
        ("--port=0 --queue=-1", "queue = -1"),
        ("--port=0 --max_length=1000", "max_length = 1000"),
    ],
)
def test_mistakes_are_one_line(run, line, words, capsys):
    assert cli.run(["serve", str(run), *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_without_its_extra_it_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "olmo_jax.generate.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.run(["serve", str(run)]) == 2
    assert "serve needs uvicorn: pip install 'olmo-jax[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken(run, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.run(["serve", str(run), f"--port={port}"]) == 2
    assert f"--port={port}: Address already in use" in capsys.readouterr().err
