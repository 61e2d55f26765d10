"""Which tensor of another program holds which of our weights, and how: one table, read both ways.

A format is a tuple of `Row`s. Everything here works on NumPy arrays of one layer (and one expert);
where they lie, in which files, is `source.py`'s and the formats' business.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import abstract_model, parameter_axes, parameters

Layout = Literal["same", "transposed", "rows", "heads", "merged", "merged_transposed", "flat"]


@dataclass(frozen=True)
class Row:
    """One tensor of theirs, and the weights of ours that it holds.

    theirs has {layer} where ours has a leading layer axis, and {expert} where ours has an expert
    axis after it. Ours are (in, out); PyTorch's Linear is (out, in).

    layout: "same" and "transposed" hold one of ours; "rows" several, one below the other, each
    (out, in); "heads" several, interleaved: for each head one's rows, then the next one's (needs
    as many key heads as query heads). In these two a bias is laid out like its matrix's rows.
    "merged" and "merged_transposed" hold all experts, one below the other, each as ours or as
    (out, in); "flat" a transposed matrix as one axis.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = "transposed"

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor for each layer."""
        return "{layer}" in self.theirs

    @property
    def by_expert(self) -> bool:
        """Whether there is one tensor for each expert."""
        return "{expert}" in self.theirs

    def places(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's name, and what to index our weights with to get its part:
        (), (layer,) or (layer, expert)."""
        for layer in range(config.n_layers) if self.stacked else [None]:
            for expert in range(config.n_experts) if self.by_expert else [None]:
                at = tuple(i for i in (layer, expert) if i is not None)
                yield self.theirs.format(layer=layer, expert=expert), at

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of theirs."""
        parts = [self._part_shape(config, path) for path in self.ours]
        if self.layout == "same":
            return parts[0]
        if self.layout == "flat":
            return (math.prod(parts[0]),)
        if self.layout.startswith("merged"):
            experts, first, last = self._by_expert(parts[0])
            return (experts * first, last)
        return (sum(part[-1] for part in parts), *parts[0][:-1])

    def assemble(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        """Theirs from ours: one array for each of `ours`, of one layer and expert. A view where it
        can be one."""
        if self.layout == "same":
            return parts[0]
        if self.layout.startswith("merged"):
            return self._swapped(parts[0]).reshape(-1, self._by_expert(parts[0].shape)[-1])
        parts = [part.T for part in parts]
        if self.layout == "flat":
            return parts[0].reshape(-1)
        if self.layout == "heads":
            heads = [p.reshape(config.n_heads, 1, -1, *p.shape[1:]) for p in parts]
            joined = np.concatenate(heads, axis=1)
            return joined.reshape(-1, *parts[0].shape[1:])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def extract(self, tensor: np.ndarray, ours: str, config: ModelConfig) -> np.ndarray:
        """One of ours, of one layer and expert, from the whole of theirs. A view where it can be
        one."""
        shape = self._part_shape(config, ours)
        if self.layout == "flat":
            return tensor.reshape(shape[::-1]).T
        if self.layout.startswith("merged"):
            return self._swapped(tensor.reshape(self._by_expert(shape)))
        if self.layout == "heads":
            by_head = tensor.reshape(config.n_heads, len(self.ours), -1, *tensor.shape[1:])
            tensor = by_head[:, self.ours.index(ours)].reshape(-1, *tensor.shape[1:])
        else:
            tensor = tensor[self.span(ours, config)]
        return tensor if self.layout == "same" else tensor.T

    def span(self, ours: str, config: ModelConfig, expert: int | None = None) -> slice:
        """The rows (axis 0) of theirs among which one of ours lies (of experts that are one
        tensor, a single expert's, if given): all that has to be read. `extract_span` takes just
        them."""
        if self.layout.startswith("merged") and expert is not None:
            size = self._by_expert(self._part_shape(config, ours))[1]
            return slice(expert * size, (expert + 1) * size)
        if self.layout != "rows":
            return slice(0, self.shape(config)[0])
        widths = [self._part_shape(config, path)[-1] for path in self.ours]
        start = sum(widths[: self.ours.index(ours)])
        return slice(start, start + widths[self.ours.index(ours)])

    def extract_span(
        self, rows: np.ndarray, ours: str, config: ModelConfig, expert: int | None = None
    ) -> np.ndarray:
        """`extract`, from only the rows that `span` names."""
        if self.layout.startswith("merged") and expert is not None:
            return rows if self.layout == "merged" else rows.T
        return rows.T if self.layout == "rows" else self.extract(rows, ours, config)

    def _by_expert(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(experts, rows, columns) of theirs, of ours with this shape."""
        return shape if self.layout == "merged" else (shape[0], shape[2], shape[1])

    def _swapped(self, experts: np.ndarray) -> np.ndarray:
        return experts if self.layout == "merged" else experts.swapaxes(1, 2)

    def _part_shape(self, config: ModelConfig, path: str) -> tuple[int, ...]:
        return weight_shapes(config)[path][self.stacked + self.by_expert :]


@lru_cache(maxsize=64)
def weight_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Our dotted paths of all weights of a model, with their shapes; nothing is allocated."""
    return {path: node.shape for path, node in _by_path(parameters(abstract_model(config)))}


@lru_cache(maxsize=64)
def weight_axes(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Our dotted paths of all weights of a model, with the names of their logical axes."""
    return dict(_by_path(parameter_axes(abstract_model(config))))


def leading_axes(axes: Sequence[str]) -> int:
    """How many axes a weight is stacked along. A router has a column for each expert, and is
    stacked along layers alone: only what comes first counts."""
    return len(list(itertools.takewhile(("layer", "expert").__contains__, axes)))


def slices(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight's path with each index of its leading axes: (), (layer,) or (layer, expert)."""
    shapes, axes = weight_shapes(config), weight_axes(config)
    for path, shape in shapes.items():
        for at in itertools.product(*map(range, shape[: leading_axes(axes[path])])):
            yield path, at


def _by_path(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield path, node
        return
    for key, child in node.items():
        yield from _by_path(child, f"{path}.{key}" if path else key)


def rows_for(config: ModelConfig, rows: Sequence[Row]) -> list[Row]:
    """The rows of a format that this model has: no head where it is tied, biases and norms only
    where there are any."""
    weights = weight_shapes(config)
    used = [row for row in rows if all(path in weights for path in row.ours)]
    covered = [path for row in used for path in row.ours]
    assert sorted(covered) == sorted(weights), set(covered) ^ set(weights)
    return used
