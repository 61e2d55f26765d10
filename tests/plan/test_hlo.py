"""What is read out of a compiled program, against counts made by hand. Compiled for CPU."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from olmo_jax.plan.count import traced_flops
from olmo_jax.plan.hlo import parse, products, read_traffic, replica_group

GROUPS = {
    "replica_groups={{0,2},{1,3}}, x": (0, 2),
    "replica_groups=[2,4]<=[8], x": (0, 1, 2, 3),
    "replica_groups=[4,2]<=[2,4]T(1,0), x": (0, 4),
    "replica_groups=mesh['a'=2,'b'=4] {'b'}, x": (0, 1, 2, 3),
    "replica_groups=mesh['a'=2,'b'=4] {'a'}, x": (0, 4),
    "replica_groups=mesh['a'=8] {'a':(2)2}, x": (0, 2),
    "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, x": (0, 1, 2, 3),
    "replica_groups=mesh['a'=4,'b'=2], device_ids=(7,6,5,4,3,2,1,0) {'b'}, x": (7, 6),
    "replica_groups={}, x": (0, 1, 2, 3, 4, 5, 6, 7),
    "source_target_pairs={{0,4},{4,0}}, x": (0, 4),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_in_each_of_xlas_notations(text):
    assert replica_group(text, 8) == GROUPS[text]


def test_a_batched_product_that_a_tpu_writes_as_a_convolution():
    """16 batches of (128 x 64) by (64 x 32): gaps of 16 leave each batch with itself alone."""
    line = (
        "  %c = f32[16,128,32]{2,1,0} convolution(%l, %r), "
        "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf"
    )
    text = (
        "ENTRY %main (l: f32[16,128,64]) -> f32[16,128,32] {\n"
        "  %l = f32[16,128,64]{2,1,0} parameter(0)\n"
        "  %r = f32[16,64,32]{2,1,0} parameter(1)\n" + line + "\n}\n"
    )
    computations, entry = parse(text)
    body = computations[entry]
    assert products(body["c"], body) == 2 * 16 * 128 * 64 * 32


def test_a_ragged_exchange_sends_no_more_rows_than_there_are_or_fit():
    """Of what a device has, its own part stays."""
    text = (
        "ENTRY %main (x: bf16[64,8], y: bf16[32,8], n: s32[4]) -> bf16[32,8] {\n"
        "  %x = bf16[64,8]{1,0} parameter(0)\n"
        "  %y = bf16[32,8]{1,0} parameter(1)\n"
        "  %n = s32[4]{0} parameter(2)\n"
        "  %r = bf16[32,8]{1,0} ragged-all-to-all(%x, %y, %n, %n, %n, /*index=5*/%n), "
        "channel_id=1, replica_groups={{0,1,2,3}}, metadata={}\n}\n"
    )
    traffic = read_traffic(text, {"fsdp": 1, "expert": 4})
    assert traffic.by_axis() == {"expert": 32 * 8 * 2 * 3 / 4}


def test_parts_of_a_tuple_by_number():
    """Newer texts have %pair#1 where older ones have a get-tuple-element; a kernel's attributes may
    have line ends in them."""
    text = (
        "ENTRY %main (pair: (f32[4,8], bf16[8,2])) -> f32[4,2] {\n"
        "  %pair = (f32[4,8]{1,0}, bf16[8,2]{1,0}) parameter(0)\n"
        "  %d = f32[4,2]{1,0} dot(%pair#0, %pair#1), lhs_contracting_dims={1}, "
        'rhs_contracting_dims={0}, kernel_metadata={\n"a":"%x = b"\n}}, metadata={}\n'
        "  %e = f32[4,2] dot(%pair#0, %pair#1), lhs_contracting_dims={1}\n}\n"
    )
    traffic = read_traffic(text, {"fsdp": 1})
    assert traffic.products == 2 * (2 * 4 * 8 * 2)
    assert traffic.memory == 2 * (4 * (4 * 8 + 4 * 2) + 2 * 8 * 2)


def test_a_gpus_asynchronous_fusion_writes_only_its_part_of_a_stack():
    text = """
%update (s: f32[16,4,8], u: f32[4,8], n: s32[]) -> f32[16,4,8] {
  %s = f32[16,4,8]{2,1,0} parameter(0)
  %u = f32[4,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %z = s32[] constant(0)
  %b = f32[1,4,8]{2,1,0} bitcast(%u)
  ROOT %d = f32[16,4,8]{2,1,0} dynamic-update-slice(%s, %b, %n, %z, %z)
}

ENTRY %main (s: f32[16,4,8], u: f32[4,8], n: s32[]) -> f32[16,4,8] {
  %s = f32[16,4,8]{2,1,0} parameter(0)
  %u = f32[4,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %f = ((f32[16,4,8]{2,1,0}, f32[4,8]{1,0}, s32[]), f32[16,4,8]{2,1,0}, u32[]) fusion-start(%s, %u, %n), kind=kLoop, calls=%update
  ROOT %o = f32[16,4,8]{2,1,0} fusion-done(%f)
}
"""  # noqa: E501
    part, index = 4 * 4 * 8, 4
    assert read_traffic(text, {"fsdp": 1}).memory == part + part + index  # read, written


def test_a_loop_of_two_rounds_in_one_runs_half_as_often():
    """Its counter goes from 1 to 9 by 2: four times, as libtpu writes it (no count is noted)."""
    text = """
%body (s: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %s = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,4] get-tuple-element(%s), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %d = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]) tuple(%next, %d)
}
%condition (s: (s32[], f32[4,4])) -> pred[] {
  %s = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %nine = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %nine), direction=LT
}
ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4] parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], f32[4,4]) tuple(%one, %x)
  %loop = (s32[], f32[4,4]) while(%start), condition=%condition, body=%body
  ROOT %y = f32[4,4] get-tuple-element(%loop), index=1
}
"""
    assert read_traffic(text, {"fsdp": 1}).products == 4 * 2 * 4**3


def test_products_of_a_compiled_loop_are_those_of_the_traced_one():
    def f(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    args = jax.ShapeDtypeStruct((8, 32), "float32"), jax.ShapeDtypeStruct((5, 32, 32), "float32")
    text = jax.jit(f).lower(*args).compile().as_text()
    traffic = read_traffic(text, {"fsdp": 1})
    assert traffic.products == traced_flops(f, *args)
    weights, activations = 5 * 32 * 32 * 4, 8 * 32 * 4
    # Each weight is read at least once (and at most thrice: sliced, copied, multiplied).
    assert weights + activations < traffic.memory < 3 * weights + 60 * activations


def test_collectives_by_axis_and_trip_count():
    """Weights of 5 layers, cut over fsdp, gathered in a loop; a gradient summed over both axes."""
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from olmo_jax.plan.hlo import read_traffic

        mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w), None

        def f(x, w):
            return jnp.mean(jax.lax.scan(body, x, w)[0])

        def shape(sizes, *spec):
            return jax.ShapeDtypeStruct(sizes, "float32", sharding=NamedSharding(mesh, P(*spec)))

        args = shape((64, 128), ("data", "fsdp")), shape((5, 128, 128), None, "fsdp")
        text = jax.jit(f).lower(*args).compile().as_text()
        traffic = read_traffic(text, dict(mesh.shape))
        gathered = [c for c in traffic.collectives if c.kind == "all-gather"]
        assert sum(c.bytes for c in gathered) == 5 * 128 * 128 * 4 * 3 / 4, gathered
        assert {c.axes for c in gathered} == {("fsdp",)}
        summed = [c for c in traffic.collectives if c.kind == "all-reduce"]
        assert [(c.axes, c.bytes) for c in summed] == [(("data", "fsdp"), 2 * 4 * 7 / 8)], summed
        """
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_libtpu_hands_to_other_slices():
    text = (
        "ENTRY %main (g: f32[64,128]) -> token[] {\n"
        "  %g = f32[64,128]{1,0} parameter(0)\n"
        "  %t = token[] after-all()\n"
        "  %s = (f32[64,128]{1,0}, u32[], token[]) send(%g, %t), channel_id=2, "
        "is_host_transfer=true, frontend_attributes={"
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  ROOT %d = token[] send-done(%s), channel_id=2\n}\n"
    )
    (sent,) = read_traffic(text, {"slice": 2, "fsdp": 4}).collectives
    assert (sent.kind, sent.axes, sent.devices) == ("all-reduce", ("slice",), (0, 4))
    assert sent.bytes == 2 * (2 - 1) / 2 * 64 * 128 * 4
