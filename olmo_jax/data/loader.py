"""Batches in step order through Grain: reading threads, prefetch, and worker processes.

Grain's own iterator state is never kept: a run goes on at any step because a batch is a function
of its step. Grain (and with it jax) is imported only inside `load_batches`.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from olmo_jax.data.batch import Batch
from olmo_jax.data.dataset import DataSet
from olmo_jax.errors import UserError


def load_batches(
    dataset: DataSet,
    first_step: int,
    last_step: int,
    rows: Mapping[int, np.ndarray] | None = None,
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) for first_step <= step < last_step; steps are counted from 0.

    `rows` are the rows that this process reads, for each size of the global batch
    (`parallel.sharding.local_rows`); None: all. Raises UserError, and whatever reading raises.
    """
    if first_step >= last_step:
        return
    import grain

    config = dataset.config
    batches = grain.MapDataset.source(_Batches(dataset, last_step, rows))[first_step:]
    # With workers the prefetch is the workers' own: `prefetch` batches waiting in each.
    threads = min(4, config.prefetch) if config.workers == 0 else 1
    reads = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
    loading = batches.to_iter_dataset(reads)
    if config.workers:
        _parse_absl_flags()
        loading = loading.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.workers, per_worker_buffer_size=config.prefetch
            ),
            worker_init_fn=partial(_end_with_parent, os.getpid()),
        )
    iterator = iter(loading)
    try:
        for step, batch in enumerate(iterator, first_step):
            if isinstance(batch, UserError):
                raise batch
            if config.workers:
                # Out of Grain's shared memory, or each batch that lives on pins a segment of it
                # and prints a traceback when the interpreter ends.
                batch = Batch(*(np.array(array) for array in batch))
            yield step, batch
    finally:
        iterator.close()


class _Batches:
    """A Grain data source whose item `step` is that step's batch.

    Its length is the end of the run: Grain repeats nothing and stops there.
    """

    def __init__(self, dataset: DataSet, last_step: int, rows: Mapping[int, np.ndarray] | None):
        self._dataset, self._last_step, self._rows = dataset, last_step, rows

    def __len__(self) -> int:
        return self._last_step

    def __getitem__(self, step: int) -> Batch | UserError:
        # Grain wraps what a worker raises in its own exceptions: hand the error over as an item.
        try:
            rows = None if self._rows is None else self._rows[self._dataset.batch_size(step)]
            return self._dataset.batch(step, rows)
        except UserError as e:
            return e


def _parse_absl_flags() -> None:
    """Grain's worker processes read absl flags, which fails unless someone parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _end_with_parent(parent: int, worker_index: int, worker_count: int) -> None:
    """Have the kernel kill this worker when its parent dies, SIGKILL included."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
