"""Training and generation on one GPU beside transformers on the same card, in one run.

python -m benchmarks.gpu [--shape=olmo2_1b] [--rows=2] [--length=4096] [--only=train|generate]
                         [--out=benchmarks/results/gpu.json]

Each contender is a process of its own: weights and optimizer in float32, products in bfloat16,
AdamW, clipped to norm 1; transformers with torch's fused AdamW and scaled-dot-product attention.
What could not be run (out of memory, say) is told and left out.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import SHAPES, transformers_config

STEPS, PROMPT, NEW_TOKENS = 12, 32, 128


def train_olmo_jax(shape: str, rows: int, length: int, remat: str, documents: int) -> dict:
    import jax

    from olmo_jax.data.batch import Batch
    from olmo_jax.model.transformer import Transformer, abstract_model, kernels_for, parameters
    from olmo_jax.parallel.mesh import MeshConfig, build_mesh
    from olmo_jax.parallel.xla_flags import set_flags
    from olmo_jax.train.flops import flops_per_token, peak_flops
    from olmo_jax.train.optimizer import OptimizerConfig
    from olmo_jax.train.step import Trainer

    for note in set_flags(()):
        print(note, file=sys.stderr)
    config = replace(SHAPES[shape], compute_dtype="bfloat16", remat=remat)
    device = jax.devices()[0]
    kernels = kernels_for(config, device)
    model = abstract_model(config, kernels)
    trainer = Trainer(model, OptimizerConfig(), build_mesh(MeshConfig(), [device]))
    state = trainer.init_state(lambda: parameters(Transformer(config, 0, kernels)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (rows, length + 1), np.int32)
    ids = positions = None
    if documents:
        ids = np.sort(rng.integers(1, documents + 1, (rows, length)), axis=1).astype(np.int32)
        index = np.arange(length, dtype=np.int32)
        first = np.diff(ids, axis=1, prepend=0) != 0
        positions = index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
    mask = np.ones((rows, length), np.bool_)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ids, positions, mask, None)
    scalars = np.float32(3e-4), np.float32(1.0)
    start = time.perf_counter()
    compiled = trainer.step.lower(state, batch, *scalars).compile()
    compile_seconds = time.perf_counter() - start
    stats, seconds, losses = compiled.memory_analysis(), [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, *scalars)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    memory = device.memory_stats() or {}
    median = statistics.median(seconds[2:])
    rate = rows * length / median
    return {
        "device": device.device_kind,
        "attention": kernels.attention,
        "seconds": median,
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token(config, length) / (peak_flops(device.device_kind) or np.inf),
        "compile_seconds": compile_seconds,
        "temporaries_gb": stats.temp_size_in_bytes / 1e9,
        "peak_memory_gb": memory.get("peak_bytes_in_use", 0) / 1e9,
        "losses": losses[:4],
    }


def train_transformers(shape: str, rows: int, length: int, compiled: bool) -> dict:
    import torch
    from transformers import Olmo2ForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Olmo2ForCausalLM(transformers_config(shape)).train()
    step_model = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, SHAPES[shape].vocab_size, (rows, length), device=device)
    seconds, losses = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = step_model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "seconds": median,
        "tokens_per_second": rows * length / median,
        "compile_seconds": seconds[0],
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0,
        "losses": losses[:4],
    }


def generate_olmo_jax(shape: str, batch: int) -> dict:
    import olmo_jax
    from olmo_jax.generate import Request, generate_batch
    from olmo_jax.parallel.xla_flags import set_flags

    set_flags(())
    config = replace(SHAPES[shape], compute_dtype="bfloat16")
    model = olmo_jax.init(config)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, config.vocab_size, (batch, PROMPT)).tolist()
    requests = [Request(tuple(prompt), NEW_TOKENS) for prompt in prompts]
    return _timed(lambda: generate_batch(model, requests), batch)


def generate_transformers(shape: str, batch: int) -> dict:
    import torch
    from transformers import Olmo2ForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Olmo2ForCausalLM(transformers_config(shape)).to(torch.bfloat16).eval()
    tokens = torch.randint(1, SHAPES[shape].vocab_size, (batch, PROMPT), device=device)

    def run():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        return out.cpu()

    return _timed(run, batch)


def _timed(run, batch: int) -> dict:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {
        "tokens_per_second": batch * NEW_TOKENS / min(seconds[1:]),
        "first_seconds": seconds[0],
    }


def contenders(rows: int, only: str) -> dict[str, list]:
    """{name: function and arguments after the shape (and, of training, its rows and length)}."""
    train: dict[str, list] = {
        "train: olmo_jax": ["train_olmo_jax", rows, "none", 0],
        "train: transformers, torch.compile": ["train_transformers", rows, True],
        "train: transformers, eager": ["train_transformers", rows, False],
        "train: olmo_jax, rows of 8 documents": ["train_olmo_jax", rows, "none", 8],
        "train: olmo_jax, 4 times the rows, projections kept": [
            "train_olmo_jax",
            4 * rows,
            "projections",
            0,
        ],
    }
    generate: dict[str, list] = {
        f"generate: {program}, batch {batch}": [f"generate_{program}", batch]
        for batch in (1, 16)
        for program in ("olmo_jax", "transformers")
    }
    return {name: call for name, call in (train | generate).items() if name.startswith(only)}


def measured(shape: str, length: int, call: list, timeout: float) -> dict:
    """A contender's figures, from a process of its own."""
    name, *rest = call
    arguments = [shape, rest[0], length, *rest[1:]] if name.startswith("train") else [shape, *rest]
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", json.dumps([name, *arguments])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {timeout:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr.strip()[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="olmo2_1b", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", default="", choices=("", "train", "generate"))
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each contender")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *arguments = json.loads(options.worker)
        print(json.dumps(globals()[name](*arguments)))
        return
    result: dict = {"shape": options.shape, "rows": options.rows, "length": options.length}
    result |= {"date": datetime.date.today().isoformat(), "figures": {}}
    for library in ("jax", "torch", "transformers"):
        result[library] = importlib.metadata.version(library)
    table = Table("", "tokens/s", "s a step", "MFU", "peak GB", "compiling, s")
    for name, call in contenders(options.rows, options.only).items():
        figures = measured(options.shape, options.length, call, options.timeout)
        result["figures"][name] = figures
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(figures), flush=True)
        columns = [
            format(figures[key], form) if key in figures else ""
            for key, form in (
                ("tokens_per_second", ",.0f"),
                ("seconds", ".4f"),
                ("mfu", ".1%"),
                ("peak_memory_gb", ".1f"),
                ("compile_seconds", ".0f"),
            )
        ]
        table.add_row(name, *columns)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
