"""Reads a compiled program (HLO text): collective bytes by mesh axis, memory traffic, products.

Loops count as often as they run. What one device does; kernels are opaque here, `count` knows them.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


_BETWEEN_SLICES = r'_xla_megascale_transfer_type="(\w+)"'


@dataclass(frozen=True)
class Shape:
    """One array: element type, sizes, and whether it lies outside the device's main memory."""

    dtype: str
    sizes: tuple[int, ...]
    elsewhere: bool
    """In vector memory or the like: S(1) and up in the layout."""

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        item = _BYTES.get(self.dtype, max(1, int(bits[0]) // 8) if bits else 0)
        return item * math.prod(self.sizes)


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    shapes: tuple[Shape, ...]
    """The result's; of a tuple, each array's."""
    operands: tuple[str, ...]
    rest: str
    """What follows the operands: attributes."""
    is_root: bool
    inside: str
    """What stands between the brackets, such as a constant's value."""


@dataclass(frozen=True)
class Collective:
    """One collective, all its runs in one step."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes that it goes along."""
    devices: tuple[int, ...]
    """One of its groups: indices into the mesh's devices, flat."""
    payload: int
    """Bytes of the whole array: what an all-gather gives, what a reduction takes; of a ragged
    exchange the most that there can be."""
    times: float

    @property
    def bytes(self) -> float:
        """Bytes that one device sends, in all its runs, by the best algorithm on a ring: an
        all-reduce is a reduce-scatter and an all-gather."""
        n = len(self.devices)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.payload * share.get(self.kind, (n - 1) / n) * self.times


@dataclass
class Traffic:
    """What one device does in one step."""

    collectives: list[Collective] = field(default_factory=list)
    memory: float = 0.0
    """Bytes read from and written to its memory: operands and results of every instruction that
    runs; of what is sliced or updated in place, only the part."""
    products: float = 0.0
    """FLOPs of matrix products outside kernels."""

    def by_axis(self) -> dict[str, float]:
        """Bytes sent, by mesh axis ("data+fsdp" where a collective goes along both)."""
        totals: dict[str, float] = {}
        for c in self.collectives:
            name = "+".join(c.axes) or "none"
            totals[name] = totals.get(name, 0.0) + c.bytes
        return totals


def read_traffic(text: str, mesh_shape: dict[str, int]) -> Traffic:
    """The traffic of a compiled program; mesh_shape is {axis: size} in the mesh's order."""
    computations, entry = parse(text)
    traffic = Traffic()
    _Reader(computations, mesh_shape, traffic).run(entry, 1.0)
    return traffic


# --- text to instructions -------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {name: Instruction}} and the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and "->" in line:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif line.startswith("  "):  # others go on with a kernel's attributes, which have line ends
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape_text, right = right[:end], right[end:].lstrip()
    op, _, _ = right.partition("(")
    close = _closing(right, len(op))
    inside = right[len(op) + 1 : close]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        op=op,
        shapes=tuple(_shapes(shape_text)),
        operands=tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", inside)),
        rest=right[close + 1 :],
        is_root=left.startswith("ROOT "),
        inside=inside,
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at or after `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text) - 1


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, layout in _SHAPE.findall(text):
        numbers = tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n)
        elsewhere = re.search(r"S\([1-9]", layout) is not None
        yield Shape(dtype, numbers, elsewhere)


def _attribute(rest: str, name: str) -> str | None:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", rest)
    return found[1] if found else None


def _numbers(rest: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", rest)
    return [int(n) for n in found[1].split(",") if n] if found else []


# --- the walk -------------------------------------------------------------------------------------

_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}


class _Reader:
    def __init__(self, computations, mesh_shape: dict[str, int], traffic: Traffic):
        self.computations, self.mesh_shape, self.traffic = computations, mesh_shape, traffic

    def run(self, computation: str, times: float, fused: bool = False) -> None:
        body = self.computations[computation]
        for i in body.values():
            kind = i.op.removesuffix("-start")
            if kind in _COLLECTIVES:
                if kind == "all-reduce" and "reduce-scatter" in computation:
                    kind = "reduce-scatter"  # as libtpu writes it: all-reduce and slice, one fusion
                self.traffic.collectives.append(self._collective(kind, i, body, times))
            elif i.op == "send" and (between := re.search(_BETWEEN_SLICES, i.rest)):
                kind = between[1].lower().replace("_", "-")
                self.traffic.collectives.append(self._between_slices(kind, i, body, times))
            elif i.op in ("dot", "convolution", "custom-call"):
                self.traffic.products += times * products(i, body)
            if not fused:
                self.traffic.memory += times * self._memory(i, body)
            self._enter(i, body, times, fused)

    def _enter(self, i: Instruction, body, times: float, fused: bool) -> None:
        if i.op == "while":
            inner = _attribute(i.rest, "body") or ""
            self.run(inner, times * self._trips(i, body), fused)
        elif i.op in ("fusion", "fusion-start", "async-start", "call"):
            called = _attribute(i.rest, "calls") or _attribute(i.rest, "to_apply") or ""
            if called in self.computations:
                self.run(called, times, fused or i.op != "call")
        elif i.op == "conditional":
            for name in re.findall(r"%([\w.\-]+)", i.rest.partition("metadata")[0]):
                if name in self.computations:
                    self.run(name, times, fused)

    def _trips(self, loop: Instruction, body) -> int:
        """How often a loop runs: what the compiler noted, or the bound that its counter is compared
        with, less its first value, over its step (libtpu takes two rounds in one where it can)."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if noted:
            return int(noted[1])
        condition = self.computations[_attribute(loop.rest, "condition") or ""]
        inner = self.computations[_attribute(loop.rest, "body") or ""]
        bound = max((n for n in map(_constant, condition.values()) if n is not None), default=1)
        first = step = None
        start = body.get(loop.operands[0])
        root = next(i for i in inner.values() if i.is_root)
        if start is not None and start.op == "tuple" and root.op == "tuple":
            k = _counter(condition)
            first = _constant(body.get(start.operands[k]))
            step = self._increment(inner.get(root.operands[k]), inner)
        return max(1, -(-(bound - (first or 0)) // (step or 1)))

    def _increment(self, i: Instruction | None, inner) -> int | None:
        """What an addition adds, alone or in a fusion."""
        if i is None:
            return None
        if i.op == "fusion":
            inner = self.computations[_attribute(i.rest, "calls") or ""]
            i = next(r for r in inner.values() if r.is_root)
        values = [_constant(inner.get(name)) for name in i.operands]
        return max((v for v in values if v), default=None)

    def _collective(self, kind: str, i: Instruction, body, times: float) -> Collective:
        given = sum(s.bytes for name in i.operands for s in _result(body, name))
        result = sum(s.bytes for s in i.shapes)
        if i.op.endswith("-start") and kind in ("all-gather", "collective-permute"):
            result -= given  # its tuple holds the operands too
        payload = result if kind == "all-gather" else given
        if kind == "ragged-all-to-all":  # rows, and the room for them: on average the smaller one
            payload = min(sum(s.bytes for s in _result(body, name)) for name in i.operands[:2])
        group = replica_group(i.rest, math.prod(self.mesh_shape.values()))
        return Collective(kind, self._axes(group), group, payload, times)

    def _between_slices(self, kind: str, i: Instruction, body, times: float) -> Collective:
        """What libtpu hands to the host, which exchanges it with the other slices' hosts. (Of a
        program for several slices, the collectives' own groups are those within one.)"""
        n = self.mesh_shape["slice"]
        payload = sum(s.bytes for s in _result(body, i.operands[0]))
        if kind == "all-gather":
            payload *= n
        stride = math.prod(self.mesh_shape.values()) // n
        group = tuple(range(0, n * stride, stride))
        return Collective(kind, ("slice",), group, payload, times)

    def _axes(self, group: Sequence[int]) -> tuple[str, ...]:
        coordinates = np.unravel_index(np.array(group), tuple(self.mesh_shape.values()))
        return tuple(
            name
            for name, along in zip(self.mesh_shape, coordinates, strict=True)
            if len(set(along.tolist())) > 1
        )

    # --- memory ---

    def _memory(self, i: Instruction, body) -> float:
        if i.op in _FREE or i.op.endswith(("-done", "-update")) or i.op == "async-start":
            return 0
        if i.op == "dynamic-slice":
            return 2 * _here(i.shapes)
        if i.op == "dynamic-update-slice":
            return 2 * _here(_result(body, i.operands[1]))
        if i.op == "copy-start":
            return _here(i.shapes[:1]) + _here(_result(body, i.operands[0]))
        operands = [_result(body, name) for name in i.operands]
        if i.op == "fusion":
            return self._fusion(i, i.shapes, operands)
        if i.op == "fusion-start":  # XLA:GPU's; its tuple holds the operands, and a context
            return self._fusion(i, i.shapes[sum(map(len, operands)) : -1], operands)
        if i.op.removesuffix("-start") in _COLLECTIVES:
            return 2 * sum(_here(shapes) for shapes in operands)
        return _here(i.shapes) + sum(_here(shapes) for shapes in operands)

    def _fusion(
        self, i: Instruction, results: tuple[Shape, ...], operands: list[tuple[Shape, ...]]
    ) -> float:
        inner = self.computations.get(_attribute(i.rest, "calls") or "")
        if inner is None:
            return _here(results) + sum(_here(shapes) for shapes in operands)
        users: dict[str, list[Instruction]] = {}
        for user in inner.values():
            for name in {operand.partition("#")[0] for operand in user.operands}:
                users.setdefault(name, []).append(user)
        total = 0.0
        for parameter in (p for p in inner.values() if p.op == "parameter"):
            shapes = operands[int(parameter.inside)]
            total += min(_here(shapes), self._read(parameter, users, inner))
        root = next(r for r in inner.values() if r.is_root)
        parts = [root]
        if root.op == "tuple":
            parts = [inner[name.partition("#")[0]] for name in root.operands]
        for part, shape in zip(parts, results, strict=False):
            while part.op == "bitcast" and part.operands[0] in inner:
                part = inner[part.operands[0]]
            written = (
                _result(inner, part.operands[1]) if part.op == "dynamic-update-slice" else (shape,)
            )
            total += 0 if shape.elsewhere else sum(s.bytes for s in written)
        return total

    def _read(self, value: Instruction, users, inner) -> float:
        """Bytes of a fusion's argument that it reads: slices only where it is sliced."""
        total = 0.0
        for user in users.get(value.name, []):
            if user.op == "bitcast":
                total += self._read(user, users, inner)
            elif user.op in ("dynamic-slice", "slice", "gather"):
                total += sum(s.bytes for s in user.shapes)
            elif user.op == "dynamic-update-slice" and user.operands[0] == value.name:
                total += 0
            else:
                return math.inf
        return total


def _constant(i: Instruction | None) -> int | None:
    """The value of a whole number."""
    if i is None or i.op != "constant" or i.shapes[0].sizes != ():
        return None
    return int(i.inside) if re.fullmatch(r"\d+", i.inside) else None


def _counter(condition: dict[str, Instruction]) -> int:
    """Which part of a loop's state its condition looks at."""
    for i in condition.values():
        part = re.search(r"index=(\d+)", i.rest) if i.op == "get-tuple-element" else None
        if part:
            return int(part[1])
        for name in i.operands:
            if "#" in name:
                return int(name.partition("#")[2])
    return 0


def _result(body: dict[str, Instruction], name: str) -> tuple[Shape, ...]:
    """The shapes of an operand; "name#1" is the second part of a tuple, as newer texts have it."""
    whole, _, part = name.partition("#")
    shapes = body[whole].shapes if whole in body else ()
    return shapes[int(part) : int(part) + 1] if part else shapes


def _here(shapes: Sequence[Shape]) -> int:
    return sum(s.bytes for s in shapes if not s.elsewhere)


def replica_group(rest: str, devices: int) -> tuple[int, ...]:
    """The first of a collective's groups, in any of XLA's three notations; all devices where none
    is given. Of a permutation, its first pair."""
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pair:
        return int(pair[1]), int(pair[2])
    plain = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if plain:
        return tuple(int(n) for n in plain[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        groups, sizes, order = ([int(n) for n in (t or "").split(",") if n] for t in iota.groups())
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose(order) if order else ids
        return tuple(ids.reshape(groups)[0].tolist())
    named = re.search(
        r"mesh\w*\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest.partition("replica_groups=")[2]
    )
    if named:
        return _named_group(*named.groups())
    return tuple(range(devices))


def _named_group(mesh: str, order: str, axes: str) -> tuple[int, ...]:
    """A group of mesh['a'=4,'b'=2] {'a'}; an axis may be a part of one, 'a':(2)2: from the second
    factor on, two. device_ids=([2,4]T(1,0)), or a plain list, is the order of the devices."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    listed = re.search(r"device_ids=\(([\d,]+)\)", order)
    if iota:
        ids = ids.reshape([int(n) for n in iota[1].split(",")])
        ids = ids.transpose([int(n) for n in iota[2].split(",")]) if iota[2] else ids
    elif listed:
        ids = np.array([int(n) for n in listed[1].split(",")])
    ids = ids.reshape(tuple(sizes.values()))
    chosen = {name: (before, size) for name, before, size in _axis_parts(axes)}
    index: list[Any] = []
    for name, n in sizes.items():
        before, size = chosen.get(name, (1, 1))
        size = size or n  # the whole axis
        index.append(np.arange(size) * (n // (before * size)))
    return tuple(ids[np.ix_(*index)].reshape(-1).tolist())


def _axis_parts(axes: str) -> Iterator[tuple[str, int, int]]:
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        yield name, int(before or 1), int(size or 0)


# --- products -------------------------------------------------------------------------------------


def products(i: Instruction, body: dict[str, Instruction]) -> float:
    """FLOPs of one dot, convolution or cuBLAS call: 2 for each multiply and add."""
    if i.op == "custom-call":
        return _cublas(i, body)
    out = math.prod(i.shapes[0].sizes)
    left, right = (_result(body, name)[0].sizes for name in i.operands[:2])
    if i.op == "dot":
        return 2 * out * math.prod(left[d] for d in _numbers(i.rest, "lhs_contracting_dims"))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels, i.rest
    spatial = [c for c in labels[3] if c.isdigit()]
    pairs = 1
    for k, dimension in enumerate(spatial):
        pairs *= _window_pairs(
            _window(i.rest, k, len(spatial)),
            left[labels[1].index(dimension)],
            i.shapes[0].sizes[labels[3].index(dimension)],
        )
    features = right[labels[2].index("i")]
    rest = out // math.prod(i.shapes[0].sizes[labels[3].index(d)] for d in spatial)
    return 2 * rest * features * pairs


def _window(rest: str, k: int, n: int) -> dict[str, int]:
    """Size, stride, low padding and dilations along the k-th of n spatial axes."""
    text = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(item.split("=") for item in text[1].split()) if text else {}
    low, _ = fields.get("pad", "x".join(["0_0"] * n)).split("x")[k].split("_")
    names = {"size": 1, "stride": 1, "lhs_dilate": 1, "rhs_dilate": 1}
    parts = {
        name: int(fields[name].split("x")[k]) if name in fields else other
        for name, other in names.items()
    }
    return parts | {"low": int(low)}


def _window_pairs(window: dict[str, int], size: int, out: int) -> int:
    """Pairs of an output and a kernel position that meet an element, not padding or a gap: a TPU
    writes a batch as a convolution whose gaps leave one batch with itself."""
    at = np.arange(out)[:, None] * window["stride"] - window["low"]
    at = at + np.arange(window["size"])[None, :] * window["rhs_dilate"]
    dilate = window["lhs_dilate"]
    return int(np.count_nonzero((at >= 0) & (at % dilate == 0) & (at // dilate < size)))


def _cublas(i: Instruction, body: dict[str, Instruction]) -> float:
    if not re.search(r'custom_call_target="__cublas', i.rest):
        return 0
    config = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', i.rest)
    left = _result(body, i.operands[0])[0].sizes
    summed = [int(d) for d in json.loads(config[1])] if config else []
    return 2 * math.prod(i.shapes[0].sizes) * math.prod(left[d] for d in summed)
