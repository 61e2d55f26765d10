"""The training loop: plan, restore or initialise, step, log, evaluate, save, stop.

The host's part of training. What a step computes is step.py's; what a checkpoint is, checkpoint/'s.
"""

import errno
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from olmo_jax.checkpoint import Checkpointer, RunFolder
from olmo_jax.data import open_dataset
from olmo_jax.data.batch import Batch
from olmo_jax.data.dataset import DataSet
from olmo_jax.data.loader import load_batches
from olmo_jax.errors import UserError
from olmo_jax.files import is_disk_full, write_error
from olmo_jax.model.transformer import Transformer, abstract_model, bind, kernels_for
from olmo_jax.parallel.mesh import build_mesh
from olmo_jax.parallel.processes import is_first
from olmo_jax.parallel.sharding import local_rows, to_global
from olmo_jax.parallel.watch import Watch, the_watch
from olmo_jax.parallel.xla_flags import set_flags
from olmo_jax.storage import is_remote, location
from olmo_jax.train.config import RunConfig
from olmo_jax.train.evaluate import Evaluator, HeldOut
from olmo_jax.train.fit import refuse_misfit
from olmo_jax.train.metrics import MetricsWriter, NoMetrics
from olmo_jax.train.plan import Plan
from olmo_jax.train.profile import Profile
from olmo_jax.train.progress import Progress
from olmo_jax.train.resume import refuse_changes, refuse_gap
from olmo_jax.train.start import initial_state, open_tokenizer, write_facts
from olmo_jax.train.step import Trainer, TrainState
from olmo_jax.train.step_log import StepLog

STATUS_DONE, STATUS_PREEMPTED = 0, 75

log = logging.getLogger("olmo_jax.train")


def train(
    run: RunConfig,
    gin_text: str,
    evaluators: Sequence[Evaluator] = (),
    at_end: Callable[[], None] = lambda: None,
    profile_steps: tuple[int, int] | None = None,
) -> int:
    """Trains to the plan's end (status 0) or until SIGTERM (saved, status 75).

    Resumes from the run folder's newest complete checkpoint. gin_text is `run` as gin, kept with
    the run. `at_end` is called when the run ends, however it does, unless it was refused at its
    start. The steps from profile_steps[0] to profile_steps[1] (the first is step 1) are profiled
    into the run folder.

    With several processes (`parallel.processes.initialize`) all of them call this; the first alone
    logs, prints and calls `at_end`, and an error in one ends them all. Raises UserError for
    anything that a person can mend, before a device is used where possible.
    """
    with _watched() as watch:
        return _train(run, gin_text, evaluators, at_end, profile_steps, watch)


def _train(run, gin_text, evaluators, at_end, profile_steps, watch: Watch) -> int:
    try:
        return _Loop(run, gin_text, evaluators, profile_steps, watch).run_to_end(at_end)
    except BrokenPipeError:
        raise
    except OSError as error:
        if is_disk_full(error) or error.errno == errno.EROFS:  # between two checkpoints, say
            raise write_error(location(error.filename or run.train.run_dir), error) from error
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def _watched() -> Iterator[Watch]:
    """The watch over this process and the others, who are told of an error here."""
    several = the_watch()
    watch = several or Watch()
    if several is None:
        watch.start()
    try:
        yield watch
    except BaseException as error:
        watch.fail(error)
        raise
    finally:
        watch.finished()
        if several is None:
            watch.close_together(failed=False)


class _Loop:
    def __init__(
        self,
        run: RunConfig,
        gin_text: str,
        evaluators: Sequence[Evaluator],
        profile_steps: tuple[int, int] | None,
        watch: Watch,
    ):
        self.run, self.watch = run, watch
        self.first_process = is_first()
        self.folder = RunFolder(run.train.run_dir)
        self.tokenizer, tokenizer_file = open_tokenizer(run.train.tokenizer)
        self.plan = Plan(run)
        self.dataset: DataSet | None = None  # a plan of no steps (a soup) needs none
        if self.plan.steps:
            self.dataset = open_dataset(run.data, run.model.vocab_size)
        self.fingerprint = self.dataset.fingerprint if self.dataset else ""
        # Read when the first device is touched, by the next line.
        for note in set_flags(run.train.xla_flags, run.train.deterministic):
            log.warning("%s", note)
        self.mesh: Mesh = build_mesh(run.mesh)
        if jax.process_count() > 1 and the_watch() is None:
            raise UserError(
                f"this is one of {jax.process_count()} processes that were not started by "
                "olmo_jax.parallel.processes.initialize(): call that in place of "
                "jax.distributed.initialize()"
            )
        refuse_misfit(
            self.mesh,
            run.model,
            run.data.sequence_length,
            self.plan.batch_sizes,
            run.train.micro_batch_size,
        )
        kernels = kernels_for(
            run.model, self.mesh.devices.flat[0], run.mesh.context_form, self.mesh.size
        )
        self.model: Transformer = abstract_model(run.model, kernels)
        self.trainer = Trainer(
            self.model, run.optimizer, self.mesh, run.train.z_loss, run.train.micro_batch_size
        )
        self.evaluators = [*self._heldout(), *evaluators]
        if self.first_process:
            self.folder.open_for_writing()
        files = {"config.gin": gin_text.encode()} | tokenizer_file
        self.checkpointer = Checkpointer(self.folder.checkpoints, run.checkpoint, files)
        self.files = files
        if profile_steps and is_remote(self.folder.path):
            raise UserError(
                f"--profile_steps: a profile cannot be written to {self.folder.path}; profile "
                "a run whose Train.run_dir is a local folder"
            )
        self.profile = Profile(profile_steps, self.folder.path / "profile", self.first_process)

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

    def _restore(self) -> tuple[TrainState, int]:
        """The state to go on from, and the number of steps it has finished."""
        latest = self.checkpointer.latest()
        if latest is None:
            return initial_state(self.run, self.trainer), 0
        saved = self.checkpointer.metadata(latest)
        refuse_changes(self.run.as_json(), self.fingerprint, saved, self.folder.path)
        refuse_gap(self.run.data, latest + self.run.train.data_from_step, saved)
        return self.checkpointer.restore(latest, self.trainer.abstract_state), latest

    def run_to_end(self, at_end: Callable[[], None]) -> int:
        plan, train = self.plan, self.run.train
        end = min(plan.steps, train.stop_at or plan.steps)
        with ExitStack() as stack:
            stack.callback(self.checkpointer.close)
            state, first = self._restore()
            if self.first_process:
                write_facts(self.run, self.folder, self.files, self.dataset, self.evaluators)
                stack.callback(at_end)
                self.writer = MetricsWriter(self.folder.path, train.tensorboard, train.wandb, first)
                console = None
            else:
                self.writer, console = NoMetrics(), Console(quiet=True)
            stack.enter_context(self.writer)
            stack.enter_context(_on_signals(self.watch.request_stop))
            self.progress = stack.enter_context(Progress(end, first, console))
            stack.enter_context(self.profile)
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
        rows = {size: local_rows(self.mesh, size) for size in self.plan.batch_sizes}
        batches = load_batches(self.dataset, first + ahead, end + ahead, rows)
        if self.checkpointer.should_save(0) and first == 0:
            self._save(0, state)
        log = StepLog(self.run, self.plan, self.mesh, self.writer, self.progress, first)
        self.watch.begin(first, self.run.train.hang_minutes)
        for step in range(first, end):
            waiting = time.perf_counter()
            with self.watch.paused() if step == first else nullcontext():  # an index may be built
                at, batch = next(batches)
            assert at == step + ahead, (at, step)
            waited = time.perf_counter() - waiting
            rate, clip = self.plan.learning_rate(step), self.plan.clip_norm(step)
            self.profile.before(step + 1)
            size = self.dataset.batch_size(at)
            inputs = self._on_devices(batch, size)
            state, metrics = self.trainer.step(state, inputs, rate, clip)
            log.dispatched(step, metrics, batch, rows[size], rate, waited)
            self.profile.after(step + 1, log.fetch, self.progress.message)
            self.checkpointer.check()
            if self._leave_after(step + 1, end, state, log):
                return STATUS_PREEMPTED
        self.watch.finished()
        self.checkpointer.wait()
        return STATUS_DONE

    def _leave_after(self, done: int, end: int, state: TrainState, log: StepLog) -> bool:
        """After `done` steps: evaluates and saves where that is due; whether to leave early."""
        train, last, stopping = self.run.train, done == end, self.watch.step(done)
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
            name = signal.Signals(self.watch.signal or 0).name
            self.progress.message(
                f"{name}: saved step {good}, leaving with status {STATUS_PREEMPTED}; the same "
                "command goes on from there"
            )
            return True
        if save and not log.failing:
            self._save(done, state)
        log.restart_clock()
        return False

    def _on_devices(self, batch: Batch, size: int) -> Batch:
        """The batch on the devices, without what the model does not need to look at."""
        needs_segments = self.run.data.document_masking or self.run.data.instances == "packed"
        if not needs_segments:
            batch = batch._replace(segment_ids_BT=None, positions_BT=None)
        return to_global(self.mesh, batch._replace(instance_ids_B=None), size)

    def _evaluate(self, state: TrainState, step: int) -> None:
        model = bind(self.model, state.params)
        row: dict[str, Any] = {}
        for evaluator in self.evaluators:
            self.watch.beat()
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

    def _save_last_good(self, state: TrainState, log: StepLog) -> int:
        """Saves the state under the last step that was finite, and returns that step; the ones
        after it have changed nothing but the state's count."""
        good = log.last_finite
        step = jax.device_put(np.int32(good), self.trainer.shardings.step)
        self._save(good, state._replace(step=step))
        self.checkpointer.wait()
        return good

    def _stop_nonfinite(self, state: TrainState, log: StepLog) -> None:
        """Saves the last good state under its own step, and raises."""
        good = self._save_last_good(state, log)
        n = self.plan.first_n(good)
        raise UserError(
            f"loss or gradient was not finite in {log.failing} steps in a row, the first is step "
            f"{good + 1} with instances {log.failing_ids}; the state before it is kept as "
            f"step {good}. Look at them with `olmo-jax data inspect {self.folder.path} {n}` "
            "and on, then lower Optimizer.learning_rate or mend the data, and fork"
        )


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
