"""What the partitioned program sends between devices, read from the compiler's own dump.

XLA:CPU computes bfloat16 in float32 and moves its casts, so what counts is the program just after
partitioning, which is the same for every platform.
"""

import math
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from mesh_worker import MODELS, packed_batch, parse

from olmo_jax.model.transformer import abstract_model
from olmo_jax.parallel.mesh import build_mesh
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.step import Trainer

COLLECTIVE = re.compile(
    r" = (\S*?)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)\("
)


def partitioned(model: str, mesh_text: str) -> str:
    """The text of the step's program after partitioning, computed in bfloat16."""
    config = replace(MODELS[model], compute_dtype="bfloat16", vocab_size=160, embedding_rows=160)
    mesh = build_mesh(parse(mesh_text), jax.devices())
    trainer = Trainer(abstract_model(config), OptimizerConfig(), mesh, 1e-4)
    folder = Path(tempfile.mkdtemp())
    scalar = jax.ShapeDtypeStruct((), np.float32)
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    lowered = trainer.step.lower(trainer.abstract_state, packed_batch(), scalar, scalar)
    lowered.compile(compiler_options=options)
    (file,) = folder.glob("*after_spmd-partitioning*")
    text = file.read_text()
    shutil.rmtree(folder)
    return text


def check(model: str, mesh: str) -> None:
    text = partitioned(model, mesh)
    found = [
        (kind, dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape, kind in COLLECTIVE.findall(text)
    ]
    gathers = [(dtype, shape) for kind, dtype, shape in found if kind == "all-gather"]
    sums = [(d, s) for kind, d, s in found if kind in ("all-reduce", "reduce-scatter")]
    for dtype, shape in gathers:  # float32 are a few statistics and the router's weight
        assert dtype != "f32" or math.prod(shape) <= 256, (mesh, "gathered", dtype, shape)
    assert any(dtype == "bf16" and math.prod(shape) >= 1024 for dtype, shape in gathers), gathers
    # Gradients of weights: what has the MLP's width or the vocabulary's.
    weights = [(d, s) for d, s in sums if 64 in s or 160 in s]
    assert weights
    for dtype, shape in weights:
        assert dtype == "f32", (mesh, "added", dtype, shape)
    # 256 tokens in all; a device makes the logits of its own.
    assert not re.search(r"\[(256|8,32),160\]", text), "whole logits"
    print("checked", model, mesh, len(found))


if __name__ == "__main__":
    for case in sys.argv[1:] or ("olmo2:fsdp=4,tensor=2", "olmoe:fsdp=4,expert=2"):
        check(*case.split(":"))
