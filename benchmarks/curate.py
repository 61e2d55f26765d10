"""Tagging, de-duplication and tokenizing beside dolma, on the same files and number of processes.

    python -m benchmarks.curate FOLDER --dolma=DOLMA_VENV/bin/python [--workers=2]

FOLDER has documents/*.jsonl and tokenizer.json. dolma 1.2.1 runs in an environment of its own
(tests/oracles/make_dolma.py). Prints seconds, documents/s and MB/s of text as stored; the times
are of whole commands, with starting up, as people run them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

TAGGERS = ["gopher_v1", "c4_v1", "char_length_v1", "pii_regex_with_counts_fast_v2"]
DEDUPE = {"name": "seen", "skip_empty": True, "paragraphs": {"attribute_name": "seen"}}
BLOOM = {"estimated_doc_count": 10_000_000, "desired_false_positive_rate": 1e-5}


def main(folder: Path, dolma: Annotated[Path, typer.Option()], workers: int = 2) -> None:
    folder = folder.absolute()
    files = sorted(map(str, (folder / "documents").glob("*.jsonl")))
    size = sum(map(os.path.getsize, files)) / 1e6
    n = sum(Path(file).read_bytes().count(b"\n") for file in files)
    print(f"{n:,} documents, {size:.1f} MB in {len(files)} files, {workers} workers")
    ours = [sys.executable, "-m", "olmo_jax.cli", "data"]
    theirs = [str(dolma.absolute()), "-m", "dolma.cli"]
    pattern = f"{folder}/documents/*.jsonl"
    bloom = BLOOM | {"file": f"{folder}/bloom.bin", "read_only": False}
    config = {"documents": [pattern], "dedupe": DEDUPE, "bloom_filter": bloom}
    (folder / "dedupe.json").write_text(json.dumps({**config, "processes": workers}))
    tokenizer = f"{folder}/tokenizer.json"
    many = [f"--workers={workers}"]
    there = ["--documents", pattern, "--processes", str(workers)]
    to = f"{folder}/tokens"
    tag = [f"--tagger={tagger}" for tagger in TAGGERS]
    names = ["--tokenizer.name_or_path", tokenizer, "--tokenizer.eos_token_id", "0"]
    names += ["--tokenizer.pad_token_id", "1", "--dtype", "uint16"]
    commands = {
        "tag": (
            [*ours, "tag", pattern, "--experiment=x", *tag, *many],
            [*theirs, "tag", *there, "--experiment", "x", "--taggers", *TAGGERS],
        ),
        "dedupe": (
            [*ours, "dedupe", f"{folder}/dedupe.json", *many],
            [*theirs, "-c", f"{folder}/dedupe.json", "dedupe"],
        ),
        "tokenize": (
            [*ours, "tokenize", *files, f"--out={to}", f"--tokenizer={tokenizer}", *many],
            [*theirs, "tokens", *there, "--destination", to, *names],
        ),
    }
    for step, pair in commands.items():
        seconds, cpu = [], []
        for who, command in zip(("olmo_jax", "dolma"), pair, strict=True):
            for name in ("attributes", "tokens"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "bloom.bin").unlink(missing_ok=True)
            start, before = time.perf_counter(), _cpu()
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}")
            seconds.append(time.perf_counter() - start)
            cpu.append(_cpu() - before)
            rate = f"{n / seconds[-1]:8.0f} documents/s {size / seconds[-1]:6.2f} MB/s"
            if workers == 1:  # the children of a fork server are not counted
                rate += f", {cpu[-1]:.1f} s of CPU"
            print(f"{step:9} {who:9} {seconds[-1]:7.2f} s {rate}", flush=True)
        by_cpu = f", {cpu[1] / cpu[0]:.2f} by time of CPU" if workers == 1 else ""
        print(f"{step:9} {seconds[1] / seconds[0]:.2f} times dolma's speed{by_cpu}", flush=True)


def _cpu() -> float:
    """Seconds of CPU that finished child processes took; steadier than the clock."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    typer.run(main)
