"""Every row of the kernels' tables compiles for its chip, without flags, and holds no scores."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from programs import array, compiled, kernels_in, mesh_of, square_buffers

from olmo_jax.ops import cudnn
from olmo_jax.ops.attention_form import fused
from olmo_jax.ops.attention_mask import AttentionMask
from olmo_jax.ops.kernels import Kernels, pick_kernels

pytestmark = pytest.mark.aot
T, H, K = 8192, 8, 2


def gradients(mesh, C: int, dtype: str, kernels: Kernels | None = None):
    """The program of full and windowed attention over packed documents, forward and backward."""
    device = mesh.devices.flat[0]
    kernels = kernels or pick_kernels(
        device.platform, device.device_kind, head_width=C, compute_dtype=dtype
    )
    B = mesh.size
    q = array(mesh, (B, T, H, C), dtype, mesh.axis_names)
    k = array(mesh, (B, T, K, C), dtype, mesh.axis_names)
    ids = array(mesh, (B, T), jnp.int32, mesh.axis_names)

    def loss(q, k, v, ids):
        full = fused(q, k, v, AttentionMask(0, ids), kernels)
        return jnp.sum(fused(full, k, v, AttentionMask(1024, ids), kernels).astype(jnp.float32))

    spec = jax.sharding.PartitionSpec(mesh.axis_names)
    f = jax.shard_map(
        jax.grad(loss, (0, 1, 2)),
        mesh=mesh,
        in_specs=(spec,) * 4,
        out_specs=(spec,) * 3,
        check_vma=False,
    )
    return compiled(jax.jit(f), q, k, k, ids)


@pytest.mark.parametrize(
    ("target", "C", "dtype"),
    [
        ("v4-8", 128, "bfloat16"),
        ("v5e-4", 128, "bfloat16"),
        ("v5p-8", 128, "bfloat16"),
        ("v6e-4", 128, "bfloat16"),
        ("tpu7x-8", 128, "bfloat16"),
        ("v5p-8", 256, "bfloat16"),
        ("v5e-4", 80, "bfloat16"),
        ("v5p-8", 128, "float32"),
    ],
)
def test_tpu(target, C, dtype):
    text, temporaries = gradients(mesh_of(target), C, dtype)
    print(f"{target} C {C} {dtype}: {temporaries / 1e6:.1f} MB")
    assert "splash_mha_fwd" in kernels_in(text) and "splash_mha_dkv" in kernels_in(text)
    assert not square_buffers(text, T)
    assert temporaries < 4 * H * T * T // 8  # the blocked form has an eighth of the scores at once


@pytest.mark.parametrize("target", ["h100-8", "h200-8", "b200-8"])
def test_gpu(target):
    text, temporaries = gradients(mesh_of(target), 128, "bfloat16")
    print(f"{target}: {temporaries / 1e6:.1f} MB")
    assert kernels_in(text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert not square_buffers(text, T)


def calls(function, *arguments) -> dict[str, tuple[dict, list[str]]]:
    """Each cuDNN call of a function as it is handed to XLA: its attributes, and its types."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = {}
    for line in text.splitlines():
        if match := re.search(r"custom_call @(__cudnn\$\w+)\(", line):
            config = re.search(r'backend_config = "(.*?)", ', line)[1].replace("\\22", '"')
            layouts = re.search(r"operand_layouts = .*", line)[0].partition("{")[0]
            found[match[1]] = json.loads(config), layouts
    return found


def simple(config):
    """Without empty fields and zeros, which are what a field is when it is not given."""
    if isinstance(config, dict):
        small = {name: simple(value) for name, value in config.items()}
        zeros = [], {}, "0", 0, "PRIMITIVE_TYPE_INVALID"
        return {name: value for name, value in small.items() if value not in zeros}
    return config


@pytest.mark.parametrize("case", ["causal", "window", "documents", "lengths", "all"])
def test_cudnn_is_called_as_jax_calls_it(case, monkeypatch):
    """jax's own lowering is tested on the GPUs; it is private, and asks for one to be here."""
    from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 92801)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(jax_cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    mesh, M = mesh_of("h100-1"), 16
    q, k = (array(mesh, (2, 1024, n, 128), "bfloat16") for n in (H, K))
    shapes = {"documents": ((2, M), (2, M), (2, M + 1), (2, M + 1)), "lengths": ((2,), (2,))}
    ranges = [array(mesh, shape, "int32") for shape in shapes.get(case, ())]
    kind = {
        "documents": "PADDING_CAUSAL",
        "lengths": "PADDING",
        "all": "NO_MASK",
    }.get(case, "CAUSAL")
    window = {"window": 512, "documents": 512}.get(case, 0)

    def ours(q, k, v, *ranges):
        pattern = cudnn.Pattern(kind, window, M if case == "documents" else 1, ranges)
        out, stats = cudnn.softmax_call(q, k, v, pattern)
        return cudnn.gradient_call(q, k, v, stats, out, out, pattern)

    def theirs(q, k, v, *ranges):
        def run(q, k, v):
            names = "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"
            return jax_cudnn.dot_product_attention(
                q,
                k,
                v,
                **dict(zip(names, ranges, strict=False)),
                scale=128**-0.5,
                mask_type=jax_cudnn.MaskType[kind],
                sliding_window_length=window or None,
            )

        out, pull = jax.vjp(run, q, k, v)
        return pull(out)

    got, want = calls(ours, q, k, k, *ranges), calls(theirs, q, k, k, *ranges)
    assert got.keys() == want.keys() == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    for name in want:
        assert simple(got[name][0]) == simple(want[name][0])
        assert got[name][1] == want[name][1]
