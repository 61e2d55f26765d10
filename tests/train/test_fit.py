"""Models and batches that do not fit a mesh."""

from dataclasses import replace

import pytest
from jax.sharding import AbstractMesh

from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig
from olmo_jax.parallel.mesh import AXES
from olmo_jax.train.fit import refuse_misfit

DENSE = ModelConfig(vocab_size=96, d_model=48, n_layers=1, n_heads=12, n_kv_heads=3, mlp_width=64)
EXPERTS = replace(DENSE, n_experts=6, experts_per_token=2)


def fit(axes, model=DENSE, T=32, batch_sizes=(8,), micro=None):
    mesh = AbstractMesh(tuple(axes.get(axis, 1) for axis in AXES), AXES)
    refuse_misfit(mesh, model, T, batch_sizes, micro)


@pytest.mark.parametrize(
    "case, message",
    [
        (dict(axes=dict(tensor=8)), "tensor = 8 does not divide the model's 12 heads: give one of"),
        (dict(axes=dict(tensor=4)), "neither divides the model's 3 key/value heads nor"),
        (dict(axes=dict(tensor=3)), "does not divide the model's 64 MLP width"),
        (dict(axes=dict(expert=2)), "Mesh.expert = 2: the model has no experts; give 1"),
        (dict(axes=dict(expert=4), model=EXPERTS), "has 6 experts; give one of 1, 2, 3, 6"),
        (dict(axes=dict(context=4), T=36), "= 36 does not divide by that: give a multiple of 8"),
        (
            dict(axes=dict(fsdp=4, expert=2), model=EXPERTS, batch_sizes=(8, 12)),
            "Data.batch_size = 12 does not divide over the mesh's 8 batch parts",
        ),
        (dict(axes=dict(fsdp=8), batch_sizes=(16,), micro=4), "micro_batch_size = 4 must divide"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(case, message):
    with pytest.raises(UserError, match=message) as error:
        fit(**case)
    assert "\n" not in str(error.value)


def test_what_divides_is_let_through():
    fit(dict(tensor=2, context=2, fsdp=2), replace(DENSE, n_kv_heads=2), micro=4)
    fit(dict(tensor=4), replace(DENSE, n_kv_heads=2))  # fewer key heads than devices
    fit(dict(expert=2, fsdp=4), EXPERTS)
