"""Runs every comparison, contenders in turn, each in a fresh process; prints tables, keeps JSON.

python -m benchmarks [--rounds=3] [--only=train|experts|generate|serve|score|convert|start_up]
                     [--shape=85M]
"""

import argparse
import datetime
import filecmp
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.serve import serve
from benchmarks.shapes import BATCH, LENGTH, SHAPES, step_flops
from olmo_jax.parallel.environment import environment

RESULTS = Path(__file__).parent / "results"
PARTS = ("train", "experts", "generate", "serve", "score", "convert", "start_up")
EQUAL = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def worker(*arguments: str, **variables: str) -> dict:
    """The figures of one contender, run as a user starts it, `variables` in its environment."""
    command = [sys.executable, "-m", "benchmarks.worker", *arguments]
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    # OpenBLAS settings of the machine are no part of how a user starts a program.
    kept = {k: v for k, v in kept.items() if not k.startswith(("OPENBLAS_", "MALLOC_"))}
    done = subprocess.run(
        command, env=kept | variables, capture_output=True, text=True, timeout=1200
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(rounds: list[dict]) -> dict:
    """Each figure's median over the rounds."""
    return {
        name: statistics.median(figures[name] for figures in rounds)
        for name, value in rounds[0].items()
        if isinstance(value, int | float)
    }


def train(shape: str, rounds: int, steps: int = 5) -> dict:
    """Training throughput, as started and with equal allocator settings, and the sgemm share."""
    names = ("olmo_jax", "eager", "compile")
    out: dict = {"shape": shape, "batch": BATCH, "length": LENGTH, "rounds": rounds}
    out["flops"] = "6 x weights without the embedding table, and attention's causal half"
    out["torch_optimizer"] = "torch.optim.AdamW as it comes (not fused)"
    for setting, variables in (("as_started", {}), ("equal_allocators", EQUAL)):
        figures: dict[str, list[dict]] = {name: [] for name in names}
        rates = []
        for _ in range(rounds):
            for name in names:
                figures[name].append(worker("train", name, shape, str(steps), **variables))
            rates += [worker("sgemm", p)["gflops"] for p in ("torch", "jax", "numpy")]
        result = {name: medians(figures[name]) for name in names}
        ours = result["olmo_jax"]["tokens_per_second"]
        length = min(LENGTH, SHAPES[shape].context_length)
        rate = step_flops(shape, BATCH, length) / result["olmo_jax"]["seconds"] / 1e9
        result["ratios"] = {n: ours / result[n]["tokens_per_second"] for n in names[1:]}
        result["sgemm_gflops"] = max(rates)
        result["share_of_sgemm"] = rate / max(rates)
        out[setting] = result
        table = Table("", "tokens/s", "peak MB", "ours / this", title=f"train {shape}, {setting}")
        for name in names:
            row = result[name]
            ratio = f"{ours / row['tokens_per_second']:.2f}"
            speed, memory = row["tokens_per_second"], row["peak_memory_mb"]
            table.add_row(name, f"{speed:,.0f}", f"{memory:,.0f}", ratio)
        Console().print(table)
        print(
            f"share of the machine's own sgemm rate ({max(rates):.0f} GFLOP/s): "
            f"{rate / max(rates):.0%}"
        )
    return out


def experts(rounds: int, steps: int = 8) -> dict:
    """A training step of a model with experts against the dense one's, per FLOP of what is active:
    4 experts, 2 a token, and 64, 8 a token, each at two widths."""
    out: dict = {"rounds": rounds, "batch": BATCH, "length": LENGTH}
    table = Table("", "s a step", "per active FLOP, dense = 1", title="experts")
    for width in (128, 256):
        shapes = [f"{name} {width}" for name in ("dense", "4 experts", "64 experts")]
        figures: dict[str, list[dict]] = {shape: [] for shape in shapes}
        for _ in range(rounds):
            for shape in shapes:
                figures[shape].append(worker("train", "olmo_jax", shape, str(steps)))
        flops = {shape: step_flops(shape, BATCH, LENGTH) for shape in shapes}
        result = {shape: medians(rows) for shape, rows in figures.items()}
        dense = result[shapes[0]]["seconds"] / flops[shapes[0]]
        for shape in shapes:
            ratio = result[shape]["seconds"] / flops[shape] / dense
            out[shape] = result[shape] | {"ratio": ratio}
            table.add_row(shape, f"{result[shape]['seconds']:.3f}", f"{ratio:.2f}")
    Console().print(table)
    return out


def generate(rounds: int, shapes: tuple[str, ...]) -> dict:
    """Greedy decoding at batch 1 and 16, float32, the same exported model."""
    import torch
    from transformers import Olmo2ForCausalLM

    from benchmarks.shapes import transformers_config

    out: dict = {"rounds": rounds}
    for shape in shapes:
        out[shape] = {}
        table = Table("", "tokens/s", "ours / this", title=f"generate {shape}, greedy")
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            Olmo2ForCausalLM(transformers_config(shape)).save_pretrained(folder)
            for batch in (1, 16):
                figures: dict[str, list[dict]] = {"olmo_jax": [], "eager": []}
                for _ in range(rounds):
                    for name in figures:
                        figures[name].append(worker("generate", name, shape, f"{folder}:{batch}"))
                first = figures["eager"][0]["ids"]
                same = all(a["ids"] == first for rows in figures.values() for a in rows)
                result: dict = {name: medians(rows) for name, rows in figures.items()}
                ours, theirs = (result[n]["tokens_per_second"] for n in ("olmo_jax", "eager"))
                result |= {"ratio": ours / theirs, "same_tokens": same}
                out[shape][f"batch_{batch}"] = result
                table.add_row(f"olmo_jax, batch {batch}", f"{ours:,.0f}", "1.00")
                table.add_row(
                    f"transformers, batch {batch}", f"{theirs:,.0f}", f"{ours / theirs:.2f}"
                )
                print(f"batch {batch}:", "the same tokens" if same else "the tokens differ")
        Console().print(table)
    return out


def score(shape: str, rounds: int, questions: int = 50) -> dict:
    """Answers of ARC-Easy scored through lm-eval, by our model there and by its own hf, float32,
    the same random weights; hf in the batch size of its that is the fastest."""
    import torch
    from transformers import Olmo2ForCausalLM

    from benchmarks.shapes import transformers_config
    from benchmarks.worker import arc_easy
    from olmo_jax.data.tokenizer import EOS, train_tokenizer

    out: dict = {"shape": shape, "rounds": rounds, "questions": questions}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        Olmo2ForCausalLM(transformers_config(shape)).save_pretrained(folder)
        rows = [{"id": str(n), "text": "".join(t)} for n, t in enumerate(arc_easy(10_000))]
        (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        vocabulary = min(8192, SHAPES[shape].vocab_size)
        train_tokenizer([str(folder / "text.jsonl")], folder / "tokenizer.json", vocabulary)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for file in ("config.json", "generation_config.json"):
            content = json.loads((folder / file).read_text()) | {"eos_token_id": 0}
            (folder / file).write_text(json.dumps(content))
        figures: dict[str, list[dict]] = {n: [] for n in ("olmo_jax", "hf:1", "hf:16")}
        for _ in range(rounds):
            for name in figures:
                figures[name].append(worker("score", name, str(questions), str(folder)))
    ours, theirs = (figures[name][0]["logprobs"] for name in ("olmo_jax", "hf:1"))
    out["requests"] = len(ours)
    out["largest_difference"] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    result: dict = {name: medians(rows) for name, rows in figures.items()}
    speed = {name: row["requests_per_second"] for name, row in result.items()}
    out["ratio"] = speed["olmo_jax"] / max(v for n, v in speed.items() if n != "olmo_jax")
    table = Table("", "requests/s", "first pass", "ours / this", title=f"score {shape}")
    for name, row in result.items():
        cold = f"{row['first_pass_requests_per_second']:,.1f}"
        table.add_row(name, f"{speed[name]:,.1f}", cold, f"{speed['olmo_jax'] / speed[name]:.2f}")
    Console().print(table)
    print(f"largest difference of a log-likelihood: {out['largest_difference']:.1e}")
    return out | result


def convert(shape: str, rounds: int) -> dict:
    """hf to orbax and back, against transformers loading and saving the same bfloat16 folder."""
    out: dict = {"shape": shape, "rounds": rounds, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        worker("make", "olmo_jax", shape, f"{folder}/hf")
        names = ("transformers", "to_orbax", "to_hf")
        figures: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                figures[name].append(worker("convert", name, shape, folder))
                # What one has left to write must not slow the next.
                os.sync()
        size = sum(f.stat().st_size for f in Path(folder, "hf").iterdir())
        pairs = [(Path(folder, name, "model.safetensors")) for name in ("hf", "to_hf")]
        out |= {"bytes": size, "same_bytes": filecmp.cmp(*pairs, shallow=False)}
    result: dict = {name: medians(rows) for name, rows in figures.items()}
    theirs = result["transformers"]["seconds"]
    table = Table("", "s", "peak anonymous MB", "theirs / this", title=f"convert {shape}")
    for name, row in result.items():
        row["ratio"] = theirs / row["seconds"]
        memory = f"{row['peak_anonymous_mb']:,.0f}"
        table.add_row(name, f"{row['seconds']:.1f}", memory, f"{row['ratio']:.2f}")
    Console().print(table)
    print("the same bytes" if out["same_bytes"] else "the bytes differ")
    # Not by its own name, which is that of its version among the facts.
    result["load_and_save"] = result.pop("transformers")
    return out | result


def start_up() -> dict:
    """Seconds from the command's start to its end after one step, cold and with a warm cache."""
    import numpy as np

    out = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 2048, 100_000).astype(np.uint16)
        tokens.tofile(f"{folder}/tokens.npy")
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "olmo_jax.cli", "train"]
            command += ["--gin_file=configs/demo.gin", f"--gin.Train.run_dir={folder}/{name}"]
            command += ["--gin.Train.stop_at=1", "--gin.Train.heldout=()"]
            command += [f'--gin.Data.paths=("{folder}/tokens.npy",)', "--gin.Train.tokenizer=None"]
            command += ["--gin.Train.sample_prompts=()"]
            variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
            start = time.time()
            subprocess.run(command, env=variables, check=True, capture_output=True)
            row = json.loads(Path(folder, name, "metrics.jsonl").read_text().splitlines()[0])
            out[name] = row["time"] - start
            print(f"from the command's start to the first finished step, {name}: {out[name]:.1f} s")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--shape", choices=tuple(SHAPES), help="only this one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON files")
    options = parser.parse_args()
    shapes = (options.shape,) if options.shape else ("demo", "85M")
    parts = {
        "train": lambda: train(options.shape or "85M", options.rounds),
        "experts": lambda: experts(options.rounds),
        "generate": lambda: generate(options.rounds, shapes),
        "serve": lambda: serve(options.shape or "85M", options.rounds),
        "score": lambda: score(options.shape or "85M", options.rounds),
        "convert": lambda: convert(options.shape or "olmo2_1b", options.rounds),
        "start_up": start_up,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, run in parts.items():
        if options.only in (None, name):
            facts = {"date": datetime.date.today().isoformat(), "environment": environment()}
            facts["torch"] = importlib.metadata.version("torch")
            facts["transformers"] = importlib.metadata.version("transformers")
            facts["command"] = f"python -m benchmarks --rounds={options.rounds} --only={name}"
            content = json.dumps(run() | facts, indent=2)
            (options.out / f"{name}.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
