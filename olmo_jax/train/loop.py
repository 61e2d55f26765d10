"""The training loop: plan, restore or initialise, step, log, evaluate, save, stop.

The host's part of training. What a step computes is step.py's; what a checkpoint is, checkpoint/'s.
"""

import errno
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from olmo_jax.checkpoint import Checkpointer, RunFolder, find_checkpoint
from olmo_jax.convert.average import refuse_other_model
from olmo_jax.convert.load import load_sharded
from olmo_jax.convert.source import saved_model
from olmo_jax.data import open_dataset
from olmo_jax.data.dataset import DataSet
from olmo_jax.data.loader import load_batches
from olmo_jax.data.tokenizer import load_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.files import is_disk_full, write_error
from olmo_jax.model.transformer import (
    Transformer,
    abstract_model,
    bind,
    kernels_for,
    parameters,
)
from olmo_jax.parallel.environment import environment
from olmo_jax.parallel.mesh import build_mesh
from olmo_jax.parallel.sharding import to_global
from olmo_jax.train.config import RunConfig
from olmo_jax.train.evaluate import Evaluator, HeldOut
from olmo_jax.train.fit import refuse_misfit
from olmo_jax.train.flops import flops_per_token, mfu
from olmo_jax.train.metrics import MetricsWriter
from olmo_jax.train.plan import Plan
from olmo_jax.train.progress import Progress
from olmo_jax.train.resume import refuse_changes, refuse_gap
from olmo_jax.train.step import Trainer, TrainState

STATUS_DONE, STATUS_PREEMPTED = 0, 75

log = logging.getLogger("olmo_jax.train")


def train(
    run: RunConfig,
    gin_text: str,
    evaluators: Sequence[Evaluator] = (),
    at_end: Callable[[], None] = lambda: None,
) -> int:
    """Trains to the plan's end (status 0) or until SIGTERM (saved, status 75).

    Resumes from the run folder's newest complete checkpoint. gin_text is `run` as gin, kept with
    the run. `at_end` is called when the run ends, however it does, unless it was refused at its
    start. Raises UserError for anything that a person can mend, before a device is used where
    possible.
    """
    try:
        return _Loop(run, gin_text, evaluators).run_to_end(at_end)
    except BrokenPipeError:
        raise
    except OSError as error:
        if is_disk_full(error) or error.errno == errno.EROFS:  # between two checkpoints, say
            raise write_error(Path(error.filename or run.train.run_dir), error) from error
        raise UserError(" ".join(str(error).split())) from error


class _Loop:
    def __init__(self, run: RunConfig, gin_text: str, evaluators: Sequence[Evaluator]):
        self.run = run
        self.folder = RunFolder(run.train.run_dir)
        self.tokenizer, tokenizer_file = _read_tokenizer(run.train.tokenizer)
        self.plan = Plan(run)
        self.dataset: DataSet | None = None  # a plan of no steps (a soup) needs none
        if self.plan.steps:
            self.dataset = open_dataset(run.data, run.model.vocab_size)
        self.fingerprint = self.dataset.fingerprint if self.dataset else ""
        if run.train.deterministic:  # read when the first device is touched, by the next line
            os.environ["XLA_FLAGS"] = (
                os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
            )
        self.mesh: Mesh = build_mesh(run.mesh)
        if jax.process_count() > 1:
            raise UserError(
                f"this is one of {jax.process_count()} processes, and this version trains with "
                "one, on all devices of its host: start one"
            )
        refuse_misfit(
            self.mesh,
            run.model,
            run.data.sequence_length,
            self.plan.batch_sizes,
            run.train.micro_batch_size,
        )
        kernels = kernels_for(run.model, self.mesh.devices.flat[0])
        kernels = replace(kernels, context=run.mesh.context_form)
        self.model: Transformer = abstract_model(run.model, kernels)
        self.trainer = Trainer(
            self.model, run.optimizer, self.mesh, run.train.z_loss, run.train.micro_batch_size
        )
        self.evaluators = [*self._heldout(), *evaluators]
        self.folder.open_for_writing()
        files = {"config.gin": gin_text.encode()} | tokenizer_file
        self.checkpointer = Checkpointer(self.folder.checkpoints, run.checkpoint, files)
        self.files = files
        self.stop_signal: int | None = None

    def _heldout(self) -> list[Evaluator]:
        run = self.run
        if not run.train.heldout:
            return []
        return [
            HeldOut(
                run.train.heldout,
                sequence_length=run.data.sequence_length,
                batch_size=run.train.micro_batch_size or min(self.plan.batch_sizes),
                vocab_size=run.model.vocab_size,
                eos_token_id=run.data.eos_token_id,
                document_masking=run.data.document_masking,
                tokenizer=self.tokenizer,
                mesh=self.mesh,
                dtype=run.data.dtype,
            )
        ]

    def _write_facts(self) -> None:
        """The files that explain the run to a reader; whole, and again at every start (once it is
        sure that the run may go on)."""
        for name, kept_file in self.files.items():
            self.folder.write_bytes(self.folder.path / name, kept_file)
        sources = self.dataset.table() if self.dataset else []
        data: dict[str, Any] = {"sources": sources, "fingerprint": self.fingerprint}
        try:
            # What `olmo-jax report` puts there stays.
            data["baselines"] = json.loads(self.folder.data_json.read_text())["baselines"]
        except (FileNotFoundError, KeyError):
            pass
        except (ValueError, TypeError):
            log.warning("%s was damaged and is written anew", self.folder.data_json)
        heldout = [h.table() for h in self.evaluators if isinstance(h, HeldOut)]
        data |= {"heldout": heldout[0] if heldout else []}
        for path, content in (
            (self.folder.config_json, self.run.as_json()),
            (self.folder.environment_json, environment()),
            (self.folder.data_json, data),
        ):
            self.folder.write_text(path, json.dumps(content, indent=2) + "\n")

    def _restore(self) -> tuple[TrainState, int]:
        """The state to go on from, and the number of steps it has finished."""
        latest = self.checkpointer.latest()
        if latest is None:
            return self._initial_state(), 0
        saved = self.checkpointer.metadata(latest)
        refuse_changes(self.run.as_json(), self.fingerprint, saved, self.folder.path)
        refuse_gap(self.run.data, latest + self.run.train.data_from_step, saved)
        return self.checkpointer.restore(latest, self.trainer.abstract_state), latest

    def _initial_state(self) -> TrainState:
        run = self.run
        if not run.train.init_from:
            kernels = self.model.kernels
            return self.trainer.init_state(
                lambda: parameters(Transformer(run.model, run.train.seed, kernels))
            )
        sources = run.train.init_from
        found = find_checkpoint(sources[0]) if len(sources) == 1 else None
        if found and found[0].has_train_state(found[1]):  # it comes along
            reader, step = found
            saved = saved_model(reader.metadata(step), reader.path(step))
            refuse_other_model(saved, run.model, reader.path(step))
            state = reader.restore(step, self.trainer.abstract_state)
            zero = jax.device_put(np.int32(0), self.trainer.shardings.step)
            return state._replace(step=zero, skip=self.trainer.empty_skip_state())
        params = load_sharded(sources, run.model, self.trainer.shardings.params)
        return self.trainer.init_state(params)

    def run_to_end(self, at_end: Callable[[], None]) -> int:
        plan, train = self.plan, self.run.train
        end = min(plan.steps, train.stop_at or plan.steps)
        with ExitStack() as stack:
            stack.callback(self.checkpointer.close)
            state, first = self._restore()
            self._write_facts()
            stack.callback(at_end)
            self.writer = stack.enter_context(
                MetricsWriter(self.folder.path, train.tensorboard, train.wandb, first)
            )
            stack.enter_context(_on_signals(self._request_stop))
            self.progress = stack.enter_context(Progress(end, first))
            message = self.progress.message
            if first:
                message(f"resuming {self.folder.path} from step {first}")
            if self.dataset is None and self.checkpointer.latest() is None:
                self._evaluate(state, 0)
                self._save(0, state)
                self.checkpointer.wait()
                message(f"saved the initial weights in {self.folder.path}")
            elif first >= end:
                message(f"nothing to do: step {first} is finished, the end is step {end}")
            else:
                return self._steps(state, first, end)
            return STATUS_DONE

    def _steps(self, state: TrainState, first: int, end: int) -> int:
        """Dispatches each step before it fetches the metrics of the one before."""
        assert self.dataset is not None
        ahead = self.run.train.data_from_step
        batches = load_batches(self.dataset, first + ahead, end + ahead)
        if self.checkpointer.should_save(0) and first == 0:
            self._save(0, state)
        log = _StepLog(self, first)
        for step in range(first, end):
            waiting = time.perf_counter()
            at, batch = next(batches)
            assert at == step + ahead, (at, step)
            waited = time.perf_counter() - waiting
            rate, clip = self.plan.learning_rate(step), self.plan.clip_norm(step)
            state, metrics = self.trainer.step(state, self._device_batch(batch), rate, clip)
            log.dispatched(step, metrics, batch, rate, waited)
            self.checkpointer.check()
            if self._leave_after(step + 1, end, state, log):
                return STATUS_PREEMPTED
        self.checkpointer.wait()
        return STATUS_DONE

    def _leave_after(self, done: int, end: int, state: TrainState, log: "_StepLog") -> bool:
        """After `done` steps: evaluates and saves where that is due; whether to leave early."""
        train, last, stopping = self.run.train, done == end, self.stop_signal is not None
        evaluate = last or done % (train.heldout_every or end) == 0
        save = last or self.checkpointer.should_save(done)
        if not (evaluate or save or stopping or log.failing):
            return False
        log.fetch()
        if log.failing and (last or log.failing >= train.nonfinite_steps):
            self._stop_nonfinite(state, log)
        if evaluate:
            try:
                self._evaluate(state, done)
            except Exception:  # the next start is not to repeat the steps up to here
                self._save_last_good(state, log)
                raise
        if stopping and not last:
            good = self._save_last_good(state, log)
            name = signal.Signals(self.stop_signal or 0).name
            self.progress.message(
                f"{name}: saved step {good}, leaving with status {STATUS_PREEMPTED}; the same "
                "command goes on from there"
            )
            return True
        if save and not log.failing:
            self._save(done, state)
        log.restart_clock()
        return False

    def _device_batch(self, batch):
        """The batch on the devices, without what the model does not need to look at."""
        needs_segments = self.run.data.document_masking or self.run.data.instances == "packed"
        if not needs_segments:
            batch = batch._replace(segment_ids_BT=None, positions_BT=None)
        return to_global(self.mesh, batch._replace(instance_ids_B=None))

    def _evaluate(self, state: TrainState, step: int) -> None:
        model = bind(self.model, state.params)
        row: dict[str, Any] = {}
        for evaluator in self.evaluators:
            found = evaluator(model, step)
            row |= found.metrics
            for prompt, text in found.samples:
                self.writer.write_sample(step, prompt, text)
        if row:
            row = {"step": step, "tokens": self.plan.tokens_after(step), "time": time.time()} | row
            self.writer.write(row)
            self.progress.update(step, row)

    def _save(self, step: int, state: TrainState) -> None:
        self.writer.flush()  # the rows up to here are on disk before the checkpoint counts
        metadata = {
            "n": self.plan.first_n(step),
            "tokens": self.plan.tokens_after(step),
            "fingerprint": self.fingerprint,
            "config": self.run.as_json(),
        }
        end = step == self.plan.steps or step == self.run.train.stop_at
        self.checkpointer.save(step, state, metadata, permanent=end or None)

    def _save_last_good(self, state: TrainState, log: "_StepLog") -> int:
        """Saves the state under the last step that was finite, and returns that step; the ones
        after it have changed nothing but the state's count."""
        good = log.last_finite
        step = jax.device_put(np.int32(good), self.trainer.shardings.step)
        self._save(good, state._replace(step=step))
        self.checkpointer.wait()
        return good

    def _stop_nonfinite(self, state: TrainState, log: "_StepLog") -> None:
        """Saves the last good state under its own step, and raises."""
        good = self._save_last_good(state, log)
        n = self.plan.first_n(good)
        raise UserError(
            f"loss or gradient was not finite in {log.failing} steps in a row, the first is step "
            f"{good + 1} with instances {log.failing_ids}; the state before it is kept as "
            f"step {good}. Look at them with `olmo-jax data inspect {self.folder.path} {n}` "
            "and on, then lower Optimizer.learning_rate or mend the data, and fork"
        )

    def _request_stop(self, number: int) -> None:
        self.stop_signal = number


class _StepLog:
    """Fetches each step's metrics one step late, and turns them into rows.

    On CPU at once: there a dispatch returns when the step is done (parallel/runtime.py).
    """

    def __init__(self, loop: _Loop, first: int):
        self.plan, self.writer, self.progress = loop.plan, loop.writer, loop.progress
        T = loop.run.data.sequence_length
        self.flops = flops_per_token(loop.run.model, T)
        self.devices = loop.mesh.devices
        self.pending: tuple | None = None
        self.failing = 0
        self.failing_ids: list[int] = []
        self.last_finite = first
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what came before now."""
        self.before = time.perf_counter()

    def dispatched(self, step: int, metrics, batch, rate: float, waited: float) -> None:
        self.fetch()
        self.pending = (step, metrics, batch.instance_ids_B, rate, waited)
        if self.devices.flat[0].platform == "cpu":
            self.fetch()

    def fetch(self) -> None:
        if self.pending is None:
            return
        (step, device_metrics, ids, rate, waited), self.pending = self.pending, None
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
        self.writer.write_instances(done, ids)
        self.progress.update(done, row)
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.failing, self.failing_ids, self.last_finite = 0, [], done
        else:
            self.failing += 1
            self.failing_ids += [int(i) for i in ids if len(self.failing_ids) < 8]


def _read_tokenizer(path: str | None) -> tuple[Tokenizer | None, dict[str, bytes]]:
    """The run's tokenizer, and its file to be kept with each checkpoint."""
    if path is None:
        return None, {}
    tokenizer = load_tokenizer(path)
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    return tokenizer, {"tokenizer.json": file.read_bytes()}


@contextmanager
def _on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Calls `handle` on SIGTERM and on the first Ctrl-C; a second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        handle(number)

    old = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
