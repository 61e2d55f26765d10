"""Text from a model: the key/value cache, sampling, streaming."""

from olmo_jax.generate.engine import Engine, Request, generate, generate_batch
from olmo_jax.generate.sampling import Sampling
from olmo_jax.generate.text import generate_text

__all__ = ["Engine", "Request", "Sampling", "generate", "generate_batch", "generate_text"]
