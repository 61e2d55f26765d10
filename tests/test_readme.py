"""Every olmo-jax command and every line of Python in README.md, then docs/study.md, runs, in order,
as written.

In a folder where the demo's files are smaller: a few sentences instead of plays, six steps.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = "".join((ROOT / path).read_text() for path in ("README.md", "docs/study.md"))
SMALLER = {
    "Train.steps = 1000": "Train.steps = 6",
    "Checkpoint.every = 500": "Checkpoint.every = 3",
    "Checkpoint.ephemeral_every = 100": "Checkpoint.ephemeral_every = 2",
    "VOCAB = 2048": "VOCAB = 300",
}


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    demo = (tmp_path / "configs" / "demo.gin").read_text()
    for old, new in SMALLER.items():
        assert old in demo, f"configs/demo.gin no longer says {old}"
        demo = demo.replace(old, new)
    (tmp_path / "configs" / "demo.gin").write_text(demo)
    text = "**MACBETH**  \nTo-morrow, and to-morrow, and to-morrow,\n" * 400
    folder = tmp_path / "data" / "demo" / "text"
    folder.mkdir(parents=True)
    other = "**ARIEL**  \nFull fathom five thy father lies;\n" * 400
    for name, content in (("train", text), ("heldout", other)):
        (folder / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": content}) + "\n")
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }

    def run(command):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"

    out = "--out=data/demo/tokenizer.json --vocab_size=300"
    run(f"olmo-jax data tokenizer data/demo/text/train.jsonl {out}")
    run("olmo-jax data build configs/curate/demo.yaml")
    tokenizer = "--tokenizer=data/demo/tokenizer.json"
    run(f"olmo-jax data tokenize data/demo/text/heldout.jsonl --out=data/demo/heldout {tokenizer}")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
    commands = [
        line
        for kind, block in blocks
        if kind == "sh"
        for line in block.splitlines()
        if line.startswith("olmo-jax")
    ]
    assert len(commands) >= 10
    servers = [command for command in commands if command.startswith("olmo-jax serve")]
    for command in commands:
        if command not in servers:
            run(re.sub("steps?=500", lambda found: found[0].replace("500", "3"), command))
    run("olmo-jax convert runs/demo runs/demo/hf --to=hf")
    [command] = servers
    command = f"exec {command} --port=0"
    with subprocess.Popen(
        command, shell=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        port = server.stdout.readline().partition("127.0.0.1:")[2].partition(" ")[0]
        try:
            for kind, block in blocks:
                if kind == "python":
                    (tmp_path / "readme.py").write_text(block.replace(":8000", f":{port}"))
                    run(f"{sys.executable} readme.py")
        finally:
            server.terminate()
    assert server.returncode == 0
