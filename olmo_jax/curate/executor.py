"""A list of shards over worker processes, here or on a Ray cluster.

Each shard writes one file, whole or not at all. One whose file is there, and newer than what it is
made of, is done: the same command again does what is left. A shard that fails is tried again, then
named at the end while the others finish.
"""

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

from olmo_jax import storage
from olmo_jax.errors import UserError
from olmo_jax.files import write_bytes

Advance = Callable[[int, int], None]
"""Called with the documents and bytes (of the input as it is stored) done since the last call."""


@dataclass(frozen=True)
class Shard:
    """A piece of work: `call(*arguments, advance)`, which writes the file `out`."""

    name: str
    out: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    size: int = 0
    """Bytes of the input, for the progress bar."""
    sources: tuple[str, ...] = ()
    """Files of this machine that `out` is made of: it is made again when one is newer."""


class Executor(NamedTuple):
    """How shards are run."""

    kind: str = "local"
    """`local` (a pool of processes) or `ray` (tasks on the cluster of RAY_ADDRESS, or here)."""
    workers: int = 1
    retries: int = 1


def run_shards(
    shards: Sequence[Shard], executor: Executor, what: str, quiet: bool = False
) -> dict[str, Any]:
    """Runs the shards whose `out` is not there yet; what each returned, by name (not for those that
    were done before). Raises UserError naming every shard that failed, after all others are done.
    """
    if executor.kind not in ("local", "ray"):
        raise UserError(f"executor {executor.kind!r}: is neither local nor ray")
    if executor.workers < 1:
        raise UserError(f"workers {executor.workers}: must be at least 1")
    outs = [shard.out for shard in shards]
    there = storage.map_files(storage.exists, outs, outs)
    left = [s for s, is_there in zip(shards, there, strict=True) if not (is_there and _is_new(s))]
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with _bar(what, left, quiet) as (advance, message):
        tries = dict.fromkeys((shard.name for shard in left), 0)
        while left:
            again: list[Shard] = []
            run = _run_local if executor.workers > 1 and len(left) > 1 else _run_here
            run = _run_ray if executor.kind == "ray" else run
            for shard, result in run(left, executor.workers, advance):
                if not isinstance(result, BaseException):
                    results[shard.name] = result
                    continue
                tries[shard.name] += 1
                if tries[shard.name] <= executor.retries:
                    again.append(shard)
                else:
                    failed[shard.name] = _in_words(shard, result)
                    message(failed[shard.name])
            left = again
    if failed:
        done = f"{len(shards) - len(failed)} of {len(shards)} shards are done"
        lines = "; ".join(failed[s.name] for s in shards if s.name in failed)
        raise UserError(
            f"{what}: {done}, {len(failed)} failed {executor.retries + 1} times: {lines}; "
            "mend them and give the same command again"
        )
    return results


def job_runner(
    executor: Executor, what: str, quiet: bool = False
) -> Callable[[Sequence[tuple[Any, ...]]], object]:
    """A function that runs `data.tokenize`'s jobs, which have a shard's fields."""
    return lambda jobs: run_shards(
        [Shard(name, out, call, arguments, size) for name, out, call, arguments, size in jobs],
        executor,
        what,
        quiet,
    )


def claim(folder: str, name: str, settings: dict[str, Any]) -> None:
    """Marks a folder of outputs with the settings that they are made with. Raises UserError when it
    has been made with others, so that no run mixes its files with another's."""
    path = storage.location(folder) / f".{name}.settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    try:
        if not storage.exists(path):
            if not storage.is_remote(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, text.encode())
            return
        before = json.loads(storage.read(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read or written: {e}") from None
    settings = json.loads(text)
    differing = [k for k in settings | before if settings.get(k) != before.get(k)]
    if differing:
        k = differing[0]
        raise UserError(
            f"{folder}: {name} was made with another {', '.join(differing)} ({k} = "
            f"{_short(before.get(k))}, now {_short(settings.get(k))}); give a new folder, or "
            "remove this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}…"


def _is_new(shard: Shard) -> bool:
    if storage.is_remote(shard.out):
        return True
    written = os.path.getmtime(shard.out)
    local = (path for path in shard.sources if not storage.has_protocol(path))
    return all(not os.path.exists(path) or os.path.getmtime(path) <= written for path in local)


def _in_words(shard: Shard, error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenProcessPool):
        return f"{shard.name}: its process died (out of memory, or killed)"
    return f"{shard.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


# What a worker imports takes a second; the fork server does it once. (Tokenizing needs none of it,
# nor the extra `curate`.)
_PRELOADED = [f"olmo_jax.curate.{name}" for name in ("mix", "dedupe", "stat", "taggers")]
if find_spec("msgspec") is None:
    _PRELOADED = []
_Done = Iterator[tuple[Shard, Any]]


def _run_here(shards: Sequence[Shard], workers: int, advance: Advance) -> _Done:
    for shard in shards:
        try:
            yield shard, shard.call(*shard.arguments, advance)
        except Exception as error:
            yield shard, error


def _run_local(shards: Sequence[Shard], workers: int, advance: Advance) -> _Done:
    # Not fork: the parent may have threads (the bar, the tokenizer's), which a fork leaves behind.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    counts = (context.Value("q", 0), context.Value("q", 0))
    seen = [0, 0]
    # A shard waits here, not in the pool: when a process dies only those that ran are concerned.
    waiting, running = list(reversed(shards)), dict[Future, Shard]()
    suspects: list[Shard] = []
    pool = ProcessPoolExecutor(
        min(workers, len(shards)), context, initializer=_start_worker, initargs=counts
    )
    with pool:
        while running or (waiting and not suspects):
            while waiting and len(running) < workers and not suspects:
                running[pool.submit(_call, waiting[-1])] = waiting[-1]
                waiting.pop()
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            now = [count.value for count in counts]
            advance(now[0] - seen[0], now[1] - seen[1])
            seen = now
            for future in done:
                shard, error = running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    suspects.append(shard)
                else:
                    yield shard, future.result() if error is None else error
    if len(suspects) == 1:
        yield suspects[0], BrokenProcessPool()
    else:  # nobody can say whose process died: each is run again, alone
        for shard in suspects:
            yield from _run_local([shard], 1, advance)
    if waiting:
        yield from _run_local(list(reversed(waiting)), workers, advance)


def _run_ray(shards: Sequence[Shard], workers: int, advance: Advance) -> _Done:
    try:
        import ray
    except ImportError:
        raise UserError("--executor=ray: install olmo-jax[ray]") from None
    if not ray.is_initialized():
        ray.init(num_cpus=None, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(max_retries=0)(_call_counted)
    waiting, running = list(reversed(shards)), dict[Any, Shard]()
    while waiting or running:
        while waiting and len(running) < workers:
            running[task.remote(waiting[-1])] = waiting[-1]
            waiting.pop()
        [done], _ = ray.wait(list(running), num_returns=1)
        shard = running.pop(done)
        try:
            result, documents, n_bytes = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            yield shard, error.cause
        except ray.exceptions.RayError as error:
            yield shard, error
        else:
            advance(documents, n_bytes)
            yield shard, result


_worker_counts: tuple[Any, Any]


def _start_worker(documents: Any, n_bytes: Any) -> None:
    global _worker_counts
    _worker_counts = (documents, n_bytes)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """When the run is killed; a pool's workers would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(shard: Shard) -> Any:
    return shard.call(*shard.arguments, _count)


def _count(documents: int, n_bytes: int) -> None:
    for value, more in zip(_worker_counts, (documents, n_bytes), strict=True):
        with value.get_lock():
            value.value += more


def _call_counted(shard: Shard) -> tuple[Any, int, int]:
    counts = [0, 0]

    def count(documents: int, n_bytes: int) -> None:
        counts[0] += documents
        counts[1] += n_bytes

    return shard.call(*shard.arguments, count), *counts


@contextmanager
def _bar(what: str, shards: Sequence[Shard], quiet: bool) -> Iterator[tuple[Advance, Any]]:
    """A bar of bytes with the documents so far; on a terminal only."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TextColumn("{task.fields[documents]:,} documents"),
        progress.TimeRemainingColumn(),
    )
    hidden = quiet or not console.is_terminal
    with progress.Progress(*columns, console=console, disable=hidden) as bar:
        task = bar.add_task(what, total=sum(shard.size for shard in shards) or None, documents=0)
        total = 0

        def advance(documents: int, n_bytes: int) -> None:
            nonlocal total
            total += documents
            bar.update(task, advance=n_bytes, documents=total)

        yield advance, partial(console.print, soft_wrap=True, markup=False, highlight=False)
