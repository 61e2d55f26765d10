"""The log of the training steps: device metrics, fetched one step late, as rows for people.

Writing the rows is metrics.py's, showing them progress.py's.
"""

import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from olmo_jax.data.batch import Batch
from olmo_jax.data.trace import digest
from olmo_jax.train.config import RunConfig
from olmo_jax.train.flops import flops_per_token, mfu
from olmo_jax.train.metrics import MetricsWriter
from olmo_jax.train.plan import Plan
from olmo_jax.train.progress import Progress


class StepLog:
    """Fetches each step's metrics one step late, and turns them into rows.

    On CPU at once: there a dispatch returns when the step is done (parallel/runtime.py).
    """

    def __init__(
        self,
        run: RunConfig,
        plan: Plan,
        mesh: Mesh,
        writer: MetricsWriter,
        progress: Progress,
        first: int,
    ):
        self.plan, self.writer, self.progress = plan, writer, progress
        self.flops = flops_per_token(run.model, run.data.sequence_length)
        self.devices = mesh.devices
        self.pending: tuple | None = None
        self.failing = 0
        self.failing_ids: list[int] = []
        self.last_finite = first
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what came before now."""
        self.before = time.perf_counter()

    def dispatched(
        self,
        step: int,
        metrics: Any,
        batch: Batch,
        rows: np.ndarray,
        rate: float,
        waited: float,
    ) -> None:
        """A step has begun: on the devices its metrics, of which batch (these rows of it), at which
        learning rate, and how long it waited for its data. Fetches the metrics of the step before.
        """
        self.fetch()
        ids_B = batch.instance_ids_B
        assert ids_B is not None
        # 2 to 5 ms for a host's 4 million tokens, while the devices are at work.
        rows = rows if len(rows) < len(ids_B) else rows[:0]
        self.pending = (step, metrics, (ids_B, digest(batch.tokens_BT), rows), rate, waited)
        if self.devices.flat[0].platform == "cpu":
            self.fetch()

    def fetch(self) -> None:
        """Waits for the last step that was dispatched, and writes its row."""
        if self.pending is None:
            return
        (step, device_metrics, read, rate, waited), self.pending = self.pending, None
        metrics = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
        now = time.perf_counter()
        seconds, self.before = now - self.before, now
        done = step + 1
        tokens = self.plan.tokens_after(done) - self.plan.tokens_after(step)
        row = {
            "step": done,
            "tokens": self.plan.tokens_after(done),
            "time": time.time(),
            **metrics,
            "perplexity": math.exp(min(metrics["loss"], 700.0)),
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait_share": min(1.0, waited / seconds),
        }
        share = mfu(
            tokens / seconds, self.flops, self.devices.flat[0].device_kind, self.devices.size
        )
        if share is not None:
            row["mfu"] = share
        self.writer.write(row)
        self.writer.write_instances(done, *read)
        self.progress.update(done, row)
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.failing, self.failing_ids, self.last_finite = 0, [], done
        else:
            self.failing += 1
            self.failing_ids += [int(i) for i in read[0] if len(self.failing_ids) < 8]
