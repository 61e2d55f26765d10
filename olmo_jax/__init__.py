"""olmo_jax: train, study, evaluate and hand on fully open language models in JAX.

Importing this package imports neither jax nor any of its rooms; `load`, `init` and `inspect` do on
first use.

Array names carry their axes as a suffix, everywhere in this package:

    B batch            T query positions   S key positions    D model width
    H query heads      K key/value heads   G query heads per key head
    C head width       F MLP width         V vocabulary       E experts
    L layers           N tokens (B * T)    A experts that a token visits
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmo_jax.convert.load import load
    from olmo_jax.eval.inspection import inspect
    from olmo_jax.model.transformer import init

__all__ = ["init", "inspect", "load"]


def __getattr__(name: str):
    if name == "load":
        from olmo_jax.convert.load import load

        return load
    if name == "init":
        from olmo_jax.model.transformer import init

        return init
    if name == "inspect":
        from olmo_jax.eval.inspection import inspect

        return inspect
    raise AttributeError(f"module 'olmo_jax' has no attribute {name!r}")
