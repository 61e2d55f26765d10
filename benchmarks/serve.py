"""Tokens a second that `olmo-jax serve` gives to one client and to sixteen, streamed over HTTP."""

import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models

from benchmarks.shapes import SHAPES

CLIENTS = (1, 16)
REQUESTS = 2  # of each client, one after the other


def write_tokenizer(vocab_size: int, path: Path) -> None:
    """One that has a word for each id, so that there is text to send."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i} ": i for i in range(vocab_size)}, "w0 "))
    tokenizer.decoder = decoders.Fuse()
    path.write_text(tokenizer.to_str())


def ask(port: int, model: str, prompt: list[int], tokens: int) -> int:
    """One request, greedy; the tokens that came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse().read().decode()
    *_, last, done = answer.strip().split("\n\n")
    if done != "data: [DONE]":
        raise SystemExit(f"the server did not finish: {done}")
    return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]


def measure(port: int, model: str, clients: int, n: int, tokens: int) -> float:
    """Tokens a second of all clients together; prompts of n tokens, answers of `tokens`."""

    def client(i: int) -> int:
        prompts = [[(7 * i + 31 * r + k) % 97 + 1 for k in range(n)] for r in range(REQUESTS)]
        return sum(ask(port, model, prompt, tokens) for prompt in prompts)

    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        made = sum(pool.map(client, range(clients)))
        return made / (time.perf_counter() - start)


def serve(shape: str, rounds: int) -> dict:
    """One server, with its default of sixteen slots; one client and sixteen in turn."""
    from benchmarks.__main__ import worker

    figures: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    n = min(64, SHAPES[shape].context_length // 4)
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        worker("make", "olmo_jax", shape, model)
        write_tokenizer(SHAPES[shape].vocab_size, Path(model, "tokenizer.json"))
        command = [sys.executable, "-m", "olmo_jax.cli", "serve", model, "--port=0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(command)} failed")
            port = int(line.partition("127.0.0.1:")[2].partition(" ")[0])
            try:
                for clients in CLIENTS:  # compiles
                    measure(port, model, clients, n, 8)
                for _ in range(rounds):
                    for clients in CLIENTS:
                        figures[clients].append(measure(port, model, clients, n, n))
            finally:
                server.send_signal(signal.SIGTERM)
    result = {clients: statistics.median(rows) for clients, rows in figures.items()}
    table = Table("clients", "tokens/s", "times one's", title=f"serve {shape}, float32, greedy")
    for clients, speed in result.items():
        table.add_row(str(clients), f"{speed:,.0f}", f"{speed / result[1]:.2f}")
    Console().print(table)
    return {
        "shape": shape,
        "rounds": rounds,
        "prompt_tokens": n,
        "answer_tokens": n,
        "tokens_per_second": {str(clients): speed for clients, speed in result.items()},
        "ratio": result[16] / result[1],
    }
