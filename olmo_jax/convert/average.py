"""A soup: the uniform mean of several models' weights, one weight at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from olmo_jax.convert.source import Source, open_source
from olmo_jax.convert.table import weight_shapes
from olmo_jax.errors import UserError
from olmo_jax.model.config import ModelConfig

# What no weight's shape shows, and the weights were trained with. (Not the scaling of RoPE and the
# context, which a later stage of training changes on purpose.)
_MUST_AGREE = (
    "norm",
    "norm_eps",
    "norm_place",
    "clip_qkv",
    "parallel_residual",
    "mlp",
    "position",
    "rope_theta",
    "rope_fraction",
    "window_pattern",
    "experts_per_token",
    "normalize_expert_weights",
)


class MeanSource:
    """A `Source` whose weights are the mean, in float32, of those of others; the rest is the
    first's. UserError when they are not of one architecture."""

    def __init__(self, sources: Sequence[Source], paths: Sequence[str | Path]):
        self._sources, self.names = sources, [Path(path).name for path in paths]
        first = sources[0]
        self.config, self.eos_token_id, self.files = first.config, first.eos_token_id, first.files
        for source, path in zip(sources, paths, strict=True):
            refuse_other_model(source.config, self.config, path)

    def dtype(self, path: str) -> str:
        return "float32"

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        total = np.array(self._sources[0].read(path, layer, expert), np.float32, order="K")
        for source in self._sources[1:]:
            total += source.read(path, layer, expert)
        return np.divide(total, np.float32(len(self._sources)), out=total)

    def run_facts(self) -> None:
        """No single run trained it."""


@contextmanager
def open_mean(
    paths: str | Path | Sequence[str | Path], step: int | None = None, revision: str | None = None
) -> Iterator[Source]:
    """Opens a checkpoint (see `open_source`), or several as their mean."""
    several = [paths] if isinstance(paths, str | Path) else paths
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(path, step, revision)) for path in several]
        yield sources[0] if len(sources) == 1 else MeanSource(sources, several)


def refuse_other_model(config: ModelConfig, wanted: ModelConfig, path: str | Path) -> None:
    """Raises UserError when a model's weights mean something else in the architecture `wanted`."""
    differs = [
        f"{field} = {getattr(config, field)!r} (wanted {getattr(wanted, field)!r})"
        for field in _MUST_AGREE
        if getattr(config, field) != getattr(wanted, field)
    ]
    here, there = weight_shapes(config), weight_shapes(wanted)
    differs += [
        f"{name} has shape {here.get(name)}, wanted {there.get(name)}"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if differs:
        raise UserError(f"{path}: is another model: {', '.join(differs[:3])}")
