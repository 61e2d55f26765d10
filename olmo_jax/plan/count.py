"""FLOPs of a traced program: products times trip counts, kernels by formula. The one counter.

It walks the jaxpr and not the compiled program. A compiler's own count sees a loop's body once and
a kernel's inside not at all, and its text differs from backend to backend; the jaxpr is the same
program for all of them, has every loop's length and every kernel's shapes in it, and another
program (a peer's) is counted by the same rules. What only the compiled program shows, work done
twice on several devices, `hlo.products` counts beside it.

Counted: a multiply and an add of every matrix product, 2 FLOPs. Not counted: everything else
(norms, softmax, the optimizer), which is a hundredth of it and bound by memory.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np


@dataclass
class Count:
    """What a program does on all devices together."""

    products: float = 0.0
    """FLOPs of matrix products."""
    kernels: float = 0.0
    """FLOPs of attention kernels, over the pairs that their masks let through."""
    calls: dict[str, float] = field(default_factory=dict)
    """How often each kernel runs, by its name; a device each."""
    notes: set[str] = field(default_factory=set)
    """What could not be known, in words."""

    @property
    def flops(self) -> float:
        """All of it."""
        return self.products + self.kernels


def count(jaxpr: Any) -> Count:
    """FLOPs of a ClosedJaxpr, such as `jax.jit(f).trace(…).jaxpr`, on all devices together."""
    total = Count()
    _walk(jaxpr.jaxpr, list(jaxpr.consts), [None] * len(jaxpr.jaxpr.invars), 1.0, total)
    return total


# --- the walk -------------------------------------------------------------------------------------
#
# Values of constants are carried along where they are known, since an attention kernel's mask is
# one: a small array that says which blocks the kernel visits.


def _walk(jaxpr: Any, consts: list, arguments: list, times: float, total: Count) -> list:
    """Adds `times` runs of a jaxpr to the total. Known values of arguments, and of what is
    returned; None for the others."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom):
        return atom.val if hasattr(atom, "val") else known.get(atom)

    for eqn in jaxpr.eqns:
        values = [value(atom) for atom in eqn.invars]
        rule = _RULES.get(eqn.primitive.name)
        if rule:
            rule(eqn, values, times, total)
        elif eqn.primitive.name in _MOVES:
            out = _evaluated(eqn, values)
            if out is not None:
                known[eqn.outvars[0]] = out
        else:
            for inner in _inner_jaxprs(eqn.params):
                out = _enter(inner, values, times, total)
                if eqn.primitive.name in ("jit", "pjit", "closed_call"):
                    known |= dict(zip(eqn.outvars, out, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _enter(inner: Any, values: list, times: float, total: Count) -> list:
    """Walks a jaxpr of a call whose arguments are, where their number says so, the call's own."""
    closed = inner if hasattr(inner, "consts") else None
    body = closed.jaxpr if closed else inner
    consts = list(closed.consts) if closed else [None] * len(body.constvars)
    if len(values) != len(body.invars):
        values = [None] * len(body.invars)
    return _walk(body, consts, values, times, total)


def _inner_jaxprs(params: dict) -> list:
    """The jaxprs among an equation's parameters (a call's body; not functions yet to be traced)."""
    found = []
    for param in params.values():
        for item in param if isinstance(param, (tuple, list)) else (param,):
            if hasattr(item, "eqns"):
                found.append(item)
    return found


# What may stand between a constant and its use.
_MOVES = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "device_put",
    "pvary",
    "reshape",
    "sharding_constraint",
    "squeeze",
}


def _evaluated(eqn: Any, values: list) -> Any:
    if any(v is None for v in values) or eqn.outvars[0].aval.size > 1 << 20:
        return None
    name, value, aval = eqn.primitive.name, np.asarray(values[0]), eqn.outvars[0].aval
    if name == "broadcast_in_dim":
        shape = [1] * len(aval.shape)
        for dimension, size in zip(eqn.params["broadcast_dimensions"], value.shape, strict=True):
            shape[dimension] = size
        return np.broadcast_to(value.reshape(shape), aval.shape)
    return value.reshape(aval.shape).astype(aval.dtype)


# --- loops and branches ---------------------------------------------------------------------------


def _scan(eqn, values, times, total):
    """Operands are constants, carry and slices, in this order; a slice has an axis less inside.
    (The parameter that says how many there are differs between jax's versions.)"""
    inner = eqn.params["jaxpr"]

    def same(outside, inside):
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))

    carry = same(eqn.outvars, inner.jaxpr.outvars)
    n = same(eqn.invars, inner.jaxpr.invars) - carry
    values = values[:n] + [None] * (len(inner.jaxpr.invars) - n)
    _enter(inner, values, times * eqn.params["length"], total)


def _while(eqn, values, times, total):
    before = total.flops
    _enter(eqn.params["body_jaxpr"], [], times, total)
    if total.flops > before:
        total.notes.add("a loop's length is known only when it runs: its body is counted once")


def _cond(eqn, values, times, total):
    """The branch with most in it."""
    branches = []
    for branch in eqn.params["branches"]:
        alone = Count()
        _enter(branch, values[1:], times, alone)
        branches.append(alone)
    largest = max(branches, key=lambda c: c.flops)
    total.products += largest.products
    total.kernels += largest.kernels
    total.notes |= largest.notes
    for name, n in largest.calls.items():
        total.calls[name] = total.calls.get(name, 0) + n


def _shard_map(eqn, values, times, total):
    """The body is one device's; the whole is all of them along the axes it is mapped over."""
    mesh = eqn.params["mesh"]
    axes = eqn.params.get("manual_axes") or mesh.axis_names
    devices = math.prod(mesh.shape[axis] for axis in axes)

    def is_whole(spec):  # a constant that is cut over devices would be another on each
        named = [part if isinstance(part, tuple) else (part,) for part in spec if part is not None]
        return all(mesh.shape[axis] == 1 for part in named for axis in part)

    specs = eqn.params["in_specs"]
    whole = [v if is_whole(spec) else None for v, spec in zip(values, specs, strict=True)]
    _enter(eqn.params["jaxpr"], whole, times * devices, total)


def _custom_derivative(eqn, values, times, total):
    """The function itself: its derivatives are in the jaxpr where they are used."""
    inner = eqn.params.get("call_jaxpr") or eqn.params.get("fun_jaxpr")
    _enter(inner, values, times, total)


# --- products -------------------------------------------------------------------------------------


def _dot_general(eqn, values, times, total):
    (contracting, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    summed = math.prod(left[d] for d in contracting)
    total.products += times * 2 * math.prod(eqn.outvars[0].aval.shape) * summed


def _ragged_dot(eqn, values, times, total):
    """Each row of the left side meets one group's matrix: 2 · rows · in · out, also in the gradient
    of the matrices, where the rows are what is summed over."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = dims.dot_dimension_numbers
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    summed = math.prod(left[d] for d in contracting)
    groups = eqn.invars[2].aval.shape[-1]
    among_groups = set(dims.lhs_ragged_dimensions) & set(contracting)
    total.products += times * 2 * math.prod(out) * summed / (groups if among_groups else 1)


# --- attention kernels ----------------------------------------------------------------------------


def _pallas_call(eqn, values, times, total):
    """A kernel's products, for each pair of a query and a key that its mask lets through.

    The number of products is that of the kernel's own body (2 forward; backward 5 in one kernel, 3
    and 4 in two); each takes 2 · C FLOPs a pair. A splash kernel's mask comes as blocks: 0 is never
    visited, 2 all visible, and of those in between (1), on the diagonal or a window's edge, half
    the pairs are: exact up to the diagonal itself.
    """
    mapping = eqn.params["grid_mapping"]
    name = str(eqn.params.get("name") or eqn.params.get("name_and_src_info")).split(" ")[0]
    products = _products_in(eqn.params["jaxpr"])
    total.calls[name] = total.calls.get(name, 0) + times
    if not products:
        return
    operands = [v.aval for v in eqn.invars[mapping.num_index_operands :]]
    q, k = [a for a in operands if len(a.shape) >= 3 and a.dtype.kind != "i"][:2]
    *batch, T, C = q.shape
    S = k.shape[-2]
    pairs: float = T * S
    arguments = eqn.params["jaxpr"].debug_info.arg_names or ()
    if "block_mask_ref" in arguments[: mapping.num_index_operands]:  # splash
        mask = values[arguments.index("block_mask_ref")]
        if mask is None:
            total.notes.add(f"the mask of {name} is not a constant: counted as if all is seen")
        else:
            shown = np.count_nonzero(mask == 2) + np.count_nonzero(mask == 1) / 2
            pairs = shown / mask.shape[0] * _block_pairs(mapping)
    total.kernels += times * math.prod(batch) * products * 2 * C * pairs


def _block_pairs(mapping: Any) -> int:
    """Queries times keys of one block: the second-to-last sizes of q's and k's blocks."""
    blocks = [b for b in mapping.block_mappings if len(b.array_aval.shape) >= 3]
    q, k = blocks[0], blocks[1]
    return _size(q.block_shape[-2]) * _size(k.block_shape[-2])


def _size(block: Any) -> int:
    return int(getattr(block, "block_size", block))


def _products_in(jaxpr: Any) -> int:
    """Matrix products that a kernel's body has, those in its loops and branches included."""
    n = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            n += 1
        elif eqn.primitive.name == "cond":
            n += max(_products_in(branch) for branch in eqn.params["branches"])
        else:
            n += sum(_products_in(inner) for inner in _inner_jaxprs(eqn.params))
    return n


def _ffi_call(eqn, values, times, total):
    """cuDNN's fused attention: 2 products forward; backward 5, the scores being made again."""
    name = str(eqn.params.get("target_name", ""))
    if not name.startswith("__cudnn$fmha"):
        return
    total.calls[name] = total.calls.get(name, 0) + times
    q, k = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape  # (B, T, H, C), (B, S, K, C)
    config = json.loads(eqn.params["legacy_backend_config"])["cudnn_fmha_backend_config"]
    causal = "CAUSAL" in config["mask_type"]
    pairs = visible_pairs(q[1], k[1], config["sliding_window_length"] if causal else None)
    products = 5 if name.endswith("Backward") else 2
    total.kernels += times * q[0] * q[2] * products * 2 * q[3] * pairs


def visible_pairs(T: int, S: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: all where window is None; under a causal mask each
    query sees itself and what came before, at most `window` keys (0: all)."""
    if window is None:
        return T * S
    widest = min(window or T, T)
    return widest * (widest + 1) // 2 + (T - widest) * widest


_RULES: dict[str, Callable] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "custom_jvp_call": _custom_derivative,
    "custom_vjp_call": _custom_derivative,
    "custom_vjp_call_jaxpr": _custom_derivative,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "pallas_call": _pallas_call,
    "ffi_call": _ffi_call,
}


def kernel_names(jaxpr: Any) -> set[str]:
    """Names of the kernels that a ClosedJaxpr calls."""
    return set(count(jaxpr).calls)


def traced_flops(function: Callable, *arguments: Any) -> float:
    """FLOPs of `function(*arguments)`; the arguments may be shapes (`jax.ShapeDtypeStruct`)."""
    return count(jax.jit(function).trace(*arguments).jaxpr).flops
