"""Checkpoints of a run (save, restore, retention, checksums) and the run folder.

Knows arrays and files; not what a model or an optimizer is.
"""

from olmo_jax.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from olmo_jax.checkpoint.reader import CheckpointReader, find_checkpoint
from olmo_jax.checkpoint.run_folder import RunFolder

__all__ = ["CheckpointConfig", "CheckpointReader", "Checkpointer", "RunFolder", "find_checkpoint"]
