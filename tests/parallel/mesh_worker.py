"""Trains tiny models on meshes of eight virtual devices, each against one device; see test_mesh.py.

Arguments: a number of steps, then MODEL:MESH for each case, such as olmo2:fsdp=4,tensor=2; with
",ring", or ",ragged" for the forms of experts and their exchange that TPUs use.
"""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.data.batch import Batch
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import Transformer, abstract_model, parameters
from olmo_jax.ops.kernels import pick_kernels
from olmo_jax.parallel.mesh import AXES, MeshConfig, build_mesh
from olmo_jax.parallel.sharding import to_global
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.step import Trainer

B, T, V = 8, 32, 96
OLMO2 = ModelConfig(vocab_size=V, embedding_rows=V, d_model=32, n_layers=2, n_heads=8, mlp_width=64)
MODELS = {
    "olmo2": OLMO2,
    # A window within a chunk of the sequence, one beyond it, and none; grouped-query attention.
    "olmo3": replace(OLMO2, n_kv_heads=4, n_layers=3, window_pattern=(3, 9, 0)),
    "olmoe": replace(
        OLMO2,
        norm_place="pre",
        n_experts=8,
        experts_per_token=2,
        load_balancing_loss=0.1,
        router_z_loss=0.01,
    ),
    "olmo2-remat": replace(OLMO2, remat="projections"),
    "pythia": replace(
        OLMO2,
        norm="layer",
        bias=True,
        parallel_residual=True,
        mlp="gelu_tanh",
        rope_fraction=0.5,
    ),
    "mpt": replace(OLMO2, position="alibi", mlp="gelu", tie_embeddings=True),
    "olmo3-long": replace(
        OLMO2,
        window_pattern=(3, 0),
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_context=8,
    ),
}


def packed_batch() -> Batch:
    """Rows of several documents, with padding at the end of one and some tokens masked."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    starts = rng.random((B, T)) < 0.1
    starts[:, 0] = False
    segments = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
    index = np.arange(T, dtype=np.int32)
    positions = index - np.maximum.accumulate(index * starts, axis=1).astype(np.int32)
    mask = rng.random((B, T)) < 0.9
    segments[3, 20:], mask[3, 20:] = 0, False
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, mask, None)


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What the documentation of jax.lax's says, which has no form for CPU; NaN where the sizes that
    are to be received are not those that are sent, or rows lie outside of the arrays."""
    spans = input_offsets, send_sizes, output_offsets
    starts, sizes, theres = (jax.lax.all_to_all(a, axis_name, 0, 0, tiled=True) for a in spans)
    rows = jax.lax.all_gather(operand, axis_name)
    right = jnp.all(sizes == recv_sizes) & jnp.all(input_offsets + send_sizes <= len(operand))
    right &= jnp.all(theres + sizes <= len(output))
    place = jnp.arange(len(operand))
    for source in range(len(starts)):
        at = jnp.where(place < sizes[source], theres[source] + place, len(output))
        came = jnp.take(rows[source], starts[source] + place, axis=0, mode="clip")
        output = output.at[at].set(came, mode="drop")
    wrong = jnp.nan if jnp.issubdtype(output.dtype, jnp.floating) else -(2**20)
    return jnp.where(right, output, jnp.array(wrong, output.dtype))


jax.lax.ragged_all_to_all = ragged_all_to_all


def train(model: str, mesh_config: MeshConfig, steps: int, micro=None, kind="adamw", **forms):
    """Losses and gradient norms of the steps, the first step's gradients, and the last state."""
    config, batch = MODELS[model], packed_batch()
    size = int(np.prod([getattr(mesh_config, axis) for axis in AXES]))
    mesh = build_mesh(mesh_config, jax.devices()[:size])
    abstract = abstract_model(
        config, replace(pick_kernels("cpu"), context=mesh_config.context_form, **forms)
    )
    trainer = Trainer(abstract, OptimizerConfig(kind=kind), mesh, 1e-4, micro)
    state = trainer.init_state(lambda: parameters(Transformer(config, 0, abstract.kernels)))
    out, gradients = [], None
    for _ in range(steps):
        arguments = to_global(mesh, batch), np.float32(1e-3), np.float32(np.inf)
        state, metrics = trainer.step(state, *arguments)
        out.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        if gradients is None and kind == "adamw":  # Adam's first moment is 0.1 of them by now
            gradients = jax.tree.map(
                lambda a: np.asarray(a) / np.float32(0.1), state.opt_state[0].mu
            )
    return np.array(out), gradients, state


def parse(text: str) -> MeshConfig:
    """ "fsdp=2,context=4,ring" and the like; fsdp is 1 where it isn't given."""
    pairs = [part.split("=") for part in text.split(",") if "=" in part]
    form = "ring" if "ring" in text else "gathered"
    return MeshConfig(**{"fsdp": 1} | {k: int(v) for k, v in pairs}, context_form=form)


def check(case: str, steps: int, singles: dict) -> None:
    model, _, mesh = case.partition(":")
    if model not in singles:
        singles[model] = train(model, MeshConfig(fsdp=1), steps)
        assert singles[model][0][-1, 0] < singles[model][0][0, 0]
    want, want_gradients, _ = singles[model]
    forms = dict(experts="ragged", exchange="ragged") if "ragged" in mesh else {}
    found, gradients, _ = train(model, parse(mesh), steps, **forms)
    np.testing.assert_allclose(found[:, 0], want[:, 0], rtol=1e-5, err_msg=case)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True
    ):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 1e-5, (case, jax.tree_util.keystr(path), error)
    print("same", case, flush=True)


if __name__ == "__main__":
    done: dict = {}
    for case in sys.argv[2:]:
        check(case, int(sys.argv[1]), done)
