"""Every layout against its definition, there and back."""

import dataclasses

import numpy as np
import pytest
from hf_models import OLMO2

from olmo_jax.convert.table import Row, rows_for, weight_shapes

GQA = dataclasses.replace(OLMO2, n_kv_heads=2, tie_embeddings=True)
QKV = tuple(f"layers.attention.{name}.weight" for name in "qkv")


def parts_of(row, config):
    """One layer's weights, every element of all of them another number."""
    shapes = [weight_shapes(config)[path][row.stacked :] for path in row.ours]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    return [
        np.arange(end - np.prod(shape), end).reshape(shape)
        for shape, end in zip(shapes, ends, strict=True)
    ]


@pytest.mark.parametrize(
    "row, config",
    [
        (Row("a", ("embed.weight",), "same"), OLMO2),
        (Row("a.{layer}", ("layers.attention.k.weight",)), GQA),
        (Row("a.{layer}", QKV, "rows"), GQA),
        (Row("a.{layer}", ("layers.mlp.up.weight", "layers.mlp.gate.weight"), "rows"), OLMO2),
        (Row("a.{layer}", QKV, "heads"), OLMO2),
        (Row("a.{layer}", ("layers.attention_norm.weight",), "same"), OLMO2),
    ],
    ids=["same", "transposed", "rows gqa", "rows mlp", "heads", "norm"],
)
def test_what_is_assembled_is_taken_apart_again(row, config):
    parts = parts_of(row, config)
    theirs = row.assemble(parts, config)
    assert theirs.shape == row.shape(config)
    for path, part in zip(row.ours, parts, strict=True):
        np.testing.assert_array_equal(row.extract(theirs, path, config), part)
        rows = theirs[row.span(path, config)]
        np.testing.assert_array_equal(row.extract_span(rows, path, config), part)


def test_fused_rows_lie_one_below_the_other():
    row = Row("a.{layer}", QKV, "rows")
    q, k, v = parts_of(row, GQA)
    np.testing.assert_array_equal(row.assemble([q, k, v], GQA), np.concatenate([q.T, k.T, v.T]))


def test_fused_heads_alternate():
    row = Row("a.{layer}", QKV, "heads")
    q, k, v = parts_of(row, OLMO2)
    theirs, C = row.assemble([q, k, v], OLMO2), OLMO2.head_width
    for head in range(OLMO2.n_heads):
        for i, part in enumerate((q, k, v)):
            start = (3 * head + i) * C
            ours = part[:, head * C : (head + 1) * C]
            np.testing.assert_array_equal(theirs[start : start + C], ours.T)


def test_each_layer_has_its_name():
    names = [name for name, _ in Row("a.{layer}.b", QKV, "rows").places(OLMO2)]
    assert names == ["a.0.b", "a.1.b", "a.2.b"]


def test_rows_of_weights_that_a_model_lacks_are_left_out():
    rows = [Row(path, (path,)) for path in weight_shapes(OLMO2)]
    left_out = {row.theirs for row in rows} - {row.theirs for row in rows_for(GQA, rows)}
    assert left_out == {"lm_head.weight"}
