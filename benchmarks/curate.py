"""Tagging, de-duplication and tokenizing: beside dolma, and as the text grows.

    python -m benchmarks.curate corpus FOLDER
    python -m benchmarks.curate compare FOLDER --dolma=DOLMA_VENV/bin/python [--workers=2]
    python -m benchmarks.curate grow FOLDER NEW_FOLDER --to=1000

`corpus` writes some thousand real documents (benchmarks/corpus.py; needs Debian's apt) and a
tokenizer. `compare` prints seconds, documents/s and MB/s of text as stored; the times are of whole
commands, with starting up, as people run them; dolma 1.2.1 runs in an environment of its own
(tests/oracles/make_dolma.py). `grow` measures 10 MB to so many of text grown from FOLDER's, each
step in one process, and writes benchmarks/results/curate_growth.json, docs/curate_growth.svg.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import corpus as texts

ROOT = Path(__file__).parents[1]
TAGGERS = ["gopher_v1", "c4_v1", "char_length_v1", "pii_regex_with_counts_fast_v2"]
DEDUPE = {"name": "seen", "skip_empty": True, "paragraphs": {"attribute_name": "seen"}}
BLOOM = {"estimated_doc_count": 50_000_000, "desired_false_positive_rate": 1e-5}
OURS = [sys.executable, "-m", "olmo_jax.cli", "data"]
app = typer.Typer()


@app.command()
def corpus(folder: Path) -> None:
    """Write FOLDER/documents and FOLDER/tokenizer.json."""
    texts.write(folder)
    files = sorted(map(str, (folder / "documents").glob("*.jsonl")))
    tokenizer = f"--out={folder}/tokenizer.json"
    subprocess.run([*OURS, "tokenizer", *files, tokenizer, "--vocab_size=8192"], check=True)


@app.command()
def compare(folder: Path, dolma: Annotated[Path, typer.Option()], workers: int = 2) -> None:
    """The same steps on the same files by dolma and by this program."""
    folder = folder.absolute()
    files = sorted(map(str, (folder / "documents").glob("*.jsonl")))
    size = sum(map(os.path.getsize, files)) / 1e6
    n = sum(Path(file).read_bytes().count(b"\n") for file in files)
    print(f"{n:,} documents, {size:.1f} MB in {len(files)} files, {workers} workers")
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
            [*OURS, "tag", pattern, "--experiment=x", *tag, *many],
            [*theirs, "tag", *there, "--experiment", "x", "--taggers", *TAGGERS],
        ),
        "dedupe": (
            [*OURS, "dedupe", f"{folder}/dedupe.json", *many],
            [*theirs, "-c", f"{folder}/dedupe.json", "dedupe"],
        ),
        "tokenize": (
            [*OURS, "tokenize", *files, f"--out={to}", f"--tokenizer={tokenizer}", *many],
            [*theirs, "tokens", *there, "--destination", to, *names],
        ),
    }
    for step, pair in commands.items():
        seconds, cpu = [], []
        for who, command in zip(("olmo_jax", "dolma"), pair, strict=True):
            for name in ("attributes", "tokens"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "bloom.bin").unlink(missing_ok=True)
            took, used, _ = _run(command)
            seconds.append(took)
            cpu.append(used)
            rate = f"{n / took:8.0f} documents/s {size / took:6.2f} MB/s"
            if workers == 1:  # the children of a fork server are not counted
                rate += f", {used:.1f} s of CPU"
            print(f"{step:9} {who:9} {took:7.2f} s {rate}", flush=True)
        by_cpu = f", {cpu[1] / cpu[0]:.2f} by time of CPU" if workers == 1 else ""
        print(f"{step:9} {seconds[1] / seconds[0]:.2f} times dolma's speed{by_cpu}", flush=True)


@app.command()
def grow(folder: Path, new: Path, to: int = 100) -> None:
    """Time and memory of each step for 10 MB, 31 MB, 100 MB … up to `--to`."""
    results = ROOT / "benchmarks" / "results" / "curate_growth.json"
    rows = []
    for k in range(2, int(2 * math.log10(to) + 1e-9) + 1):
        size = int(10 ** (k / 2))
        place = new.absolute() / f"{size:05}"
        shutil.rmtree(place, ignore_errors=True)
        texts.grow(place, folder, size)
        measured = {step: _run(command) for step, command in _steps(folder.absolute(), place)}
        steps = {
            step: {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}
            for step, (seconds, cpu, peak) in measured.items()
        }
        rows.append({"megabytes": size, "steps": steps})
        for step, (seconds, cpu, peak) in measured.items():
            rest = f"{cpu:8.1f} s of CPU {peak / 1e6:7.0f} MB"
            print(f"{size:5} MB {step:9} {seconds:8.1f} s {rest}", flush=True)
        shutil.rmtree(place)
    results.write_text(json.dumps({"workers": 1, "rows": rows}, indent=1) + "\n")
    (ROOT / "docs" / "curate_growth.svg").write_text(_plot(rows))


def _steps(folder: Path, place: Path) -> Iterator[tuple[str, list[str]]]:
    """Names and commands; each is asked for when the one before has run."""
    pattern = f"{place}/documents/*.jsonl"
    config = {"documents": [pattern], "dedupe": DEDUPE, "bloom_filter": BLOOM, "processes": 1}
    (place / "dedupe.json").write_text(json.dumps(config))
    stream = {"name": "all", "documents": [pattern], "attributes": ["x", "seen"]}
    stream["span_replacement"] = [{"span": "$.attributes.seen", "min_score": 0.5}]
    words = "$.attributes[?(@.x__gopher_v1__word_count[0][2] > 20)]"
    stream |= {"filter": {"include": [words]}, "output": {"path": f"{place}/mixed"}}
    stream["output"] |= {"discard_fields": ["attributes"], "max_size_in_bytes": 20_000_000}
    (place / "mix.json").write_text(json.dumps({"streams": [stream], "processes": 1}))
    one = "--workers=1"
    tag = [f"--tagger={tagger}" for tagger in TAGGERS]
    tokenizer = f"--tokenizer={folder}/tokenizer.json"
    yield "tag", [*OURS, "tag", pattern, "--experiment=x", *tag, one]
    yield "dedupe", [*OURS, "dedupe", f"{place}/dedupe.json", one]
    yield "mix", [*OURS, "mix", f"{place}/mix.json", one]
    mixed = sorted(map(str, (place / "mixed").glob("*.gz")))
    # A token file is put together in memory: 16 MB here, not the usual 128.
    to = [f"--out={place}/tokens", tokenizer, "--max_tokens_per_file=8000000", one]
    yield "tokenize", [*OURS, "tokenize", *mixed, *to]
    yield "stat", [*OURS, "stat", pattern, f"--out={place}/stat.html", one]


def _run(command: list[str]) -> tuple[float, float, int]:
    """Seconds by the clock and of CPU, and the most memory in bytes that its main process held."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{output.decode()[-2500:]}")
    cpu = used.ru_utime + used.ru_stime
    return time.perf_counter() - start, cpu, used.ru_maxrss * 1024


def _plot(rows: list[dict]) -> str:
    """Two plots over the size, logarithmic: each step's seconds of CPU, and its memory."""
    colours = ("#1f6f8b", "#c8551b", "#5b6f2f", "#8a5a9e", "#8d6e1f")
    sizes = [row["megabytes"] for row in rows]
    names = list(rows[0]["steps"])
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 890 320" '
        'font-family="sans-serif" font-size="13" fill="#777">'
    ]
    memory = [[r["steps"][s]["peak_bytes"] / 1e6 for r in rows] for s in names]
    seconds = [[r["steps"][s]["cpu_seconds"] for r in rows] for s in names]
    panels = (
        (60, "seconds of CPU", seconds, 1.0, 10 ** math.ceil(math.log10(max(map(max, seconds))))),
        (490, "peak memory, MB", memory, 10.0, 10 ** math.ceil(math.log10(max(map(max, memory))))),
    )
    for left, title, lines, low, high in panels:

        def x(size: float, left: int = left) -> float:
            share = math.log(size / sizes[0]) / math.log(max(sizes[-1] / sizes[0], 10))
            return left + 350 * share

        def y(value: float, low: float = low, high: float = high) -> float:
            return 260 - 220 * math.log(max(value, low) / low) / math.log(high / low)

        parts.append(f'<text x="{left}" y="20" fill="#444">{title}</text>')
        tick = low
        while tick <= high:
            parts.append(
                f'<line x1="{left}" x2="{left + 350}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
                f'stroke="#ccc"/><text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">'
                f"{tick:,.0f}</text>"
            )
            tick *= 10
        for size in sizes:
            if math.log10(size).is_integer():
                parts.append(
                    f'<text x="{x(size):.1f}" y="280" text-anchor="middle">{size:,} MB</text>'
                )
        for colour, line in zip(colours, lines, strict=False):
            points = [(x(size), y(value)) for size, value in zip(sizes, line, strict=True)]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in points
            ]
    for k, (colour, name) in enumerate(zip(colours, names, strict=False)):
        parts.append(f'<text x="{60 + 110 * k}" y="310" fill="{colour}">● {name}</text>')
    return "".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    app()
