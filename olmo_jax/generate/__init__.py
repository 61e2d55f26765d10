"""Text from a model: the key/value cache, sampling, streaming."""

from olmo_jax.generate.decode import generate
from olmo_jax.generate.sampling import Sampling
from olmo_jax.generate.text import generate_text

__all__ = ["Sampling", "generate", "generate_text"]
