"""From token files to `Batch`: instances, packing, mixtures, order, loading. Never imports jax.

Worker processes import this package; `curate` uses its token files.
"""

from olmo_jax.data.batch import Batch, Instance
from olmo_jax.data.config import DataConfig
from olmo_jax.data.dataset import DataSet, Location, open_dataset
from olmo_jax.data.loader import load_batches
from olmo_jax.data.token_files import Document, TokenFile, write_token_file

__all__ = [
    "Batch",
    "DataConfig",
    "DataSet",
    "Document",
    "Instance",
    "Location",
    "TokenFile",
    "load_batches",
    "open_dataset",
    "write_token_file",
]
