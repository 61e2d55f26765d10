"""A matrix product over the last axis, in the form that the platform runs fastest."""

import jax
import jax.numpy as jnp


def linear(x: jax.Array, w: jax.Array, *, flat: bool) -> jax.Array:
    """x (..., in) times w (in, out), in x's type.

    flat folds the leading axes into one: XLA:CPU takes 46 ms for the backward pass of a 3-D product
    where the same product in 2-D takes 21 ms. Elsewhere the axes stay apart, since folding a
    sharded axis into another would gather it.
    """
    w = w.astype(x.dtype)
    if not flat:
        return jnp.einsum("...i,io->...o", x, w)
    out = jnp.dot(x.reshape(-1, x.shape[-1]), w)
    return out.reshape(*x.shape[:-1], w.shape[-1])
