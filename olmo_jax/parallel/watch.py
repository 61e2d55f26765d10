"""What the processes of a run tell one another: I live, stop after this step, I failed, I hang.

Through the key-value store of jax's coordination service, from a thread of its own, so that a step
costs nothing and a main thread that is stuck in a collective does not matter. A process that runs
alone has a watch too, for hangs. Not for arrays, and not for what a step computes.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from olmo_jax.errors import UserError

STATUS_LOST = 76
"""Exit status: another process died, or a hang was ended; the newest checkpoint is whole."""

DEAD_AFTER = 30.0  # seconds without a sign of life
# Seconds from an error that a death may have caused until it is taken for one of our own. A death
# was known after 30 to 35 s with two busy cores for six processes; within a minute all have ended.
KNOWN_AFTER = DEAD_AFTER + 20.0
_LOOK, _BEAT = 1.0, 3.0  # seconds between looks at the news, and between signs of life
_ROOT = "olmo_jax"
SHOW_CURSOR = b"\x1b[?25h"


class Watch(threading.Thread):
    """A thread that looks about once a second; `client` None: there are no other processes.

    The main thread calls `step` after each step, `beat` on the way through longer work between two
    (evaluating), and does under `paused` what has no limit (building an index of the data).
    """

    def __init__(self, client: Any = None, index: int = 0, count: int = 1, coordinator: str = ""):
        super().__init__(name="watch", daemon=True)
        self.client, self.index, self.count = client, index, count
        self.coordinator = coordinator
        self.signal: int | None = None
        """The signal for which the run stops, here or in another process."""
        self.hang_seconds: float | None = None
        self._host = socket.gethostname()
        self._lock = threading.Lock()  # held while all agree on a step: no step begins then
        self._step = 0
        self._stop_after: int | None = None
        self._agreeing: threading.Thread | None = None
        self._progress: float | None = None  # when the last step ended; None: not counted now
        self._closed = threading.Event()
        self._beats = 0
        self._last_beat = -float("inf")
        self._heard = {i: (time.monotonic(), "", f"process {i}") for i in range(count)}
        self._reached = time.monotonic()

    # --- the main thread's side ---

    def begin(self, step: int, hang_minutes: float | None) -> None:
        """Training begins, with `step` steps finished; from now on a hang is noticed."""
        global _counting
        self._step, self._progress = step, time.monotonic()
        self.hang_seconds = None if hang_minutes is None else hang_minutes * 60
        _counting = self

    def step(self, done: int) -> bool:
        """After `done` steps: whether to stop here, as all processes do. Waits only while a stop is
        being agreed on."""
        if self.client is None:
            self._step, self._progress = done, time.monotonic()
            return self.signal is not None
        with self._lock:
            self._step, self._progress = done, time.monotonic()
            return self._stop_after is not None and done >= self._stop_after

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in this scope may take any time."""
        self._progress = None
        try:
            yield
        finally:
            self._progress = time.monotonic()

    def beat(self) -> None:
        """Work between two steps goes on."""
        if self._progress is not None:
            self._progress = time.monotonic()

    def request_stop(self, number: int) -> None:
        """Asks all processes to save and stop, because of a signal. Takes no lock: it may be called
        from the signal's handler."""
        self.signal = self.signal or number

    def fail(self, error: BaseException) -> None:
        """This process ends with an error, so the others shall too.

        When it is jax's, another process's death may be the cause: waits until that is known.
        """
        self._progress = None
        if self.client is None:
            return
        import jax

        if isinstance(error, jax.errors.JaxRuntimeError):
            self._closed.wait(KNOWN_AFTER)  # `_look` ends the process
        text = " ".join(str(error).split()) or type(error).__name__
        status = 2 if isinstance(error, UserError) else 1
        self._publish({"kind": "failed", "text": text[:2000], "status": status})

    def finished(self) -> None:
        """No more steps follow."""
        self._progress = None

    def close_together(self, failed: bool) -> bool:
        """Ends the thread. True when all leave in good order and may wait for one another."""
        self._closed.set()
        if self.client is None:
            return True
        if failed:
            self._say_goodbye()
        return not failed

    # --- the thread ---

    def run(self) -> None:
        while not self._closed.wait(_LOOK):
            try:
                self._look()
                self._reached = time.monotonic()
            except Exception as error:
                # The coordinator is away; mostly jax aborts before this (processes.py).
                if not self._closed.is_set() and time.monotonic() - self._reached > DEAD_AFTER:
                    self._leave(
                        f"the coordinator {self.coordinator} cannot be reached for "
                        f"{DEAD_AFTER:.0f} s ({' '.join(str(error).split())[:200]})"
                    )

    def _look(self) -> None:
        stuck = self._hangs()
        if self.client is None:
            if stuck:
                self._end_hang({"step": self._step})
            return
        if stuck:
            self._publish({"kind": "hang", "step": self._step, "status": STATUS_LOST})
        news = self._read("news")
        if "end" in news:
            self._end(json.loads(news["end"]))
        if self.signal is not None and "stop" not in news:
            self._set("news/stop", json.dumps({"signal": self.signal}))
        if "stop" in news and self._agreeing is None:
            self.signal = self.signal or json.loads(news["stop"])["signal"]
            self._agreeing = threading.Thread(target=self._agree, daemon=True)
            self._agreeing.start()
        now = time.monotonic()
        if now - self._last_beat >= _BEAT:
            self._last_beat, self._beats = now, self._beats + 1
            self._set(f"beat/{self.index}", f"{self._beats} {self._host}", overwrite=True)
            if self.index == 0:
                self._judge(now)

    def _hangs(self) -> bool:
        since, limit = self._progress, self.hang_seconds
        return since is not None and limit is not None and time.monotonic() - since > limit

    def _agree(self) -> None:
        """All stop after the step that follows the last one that any has passed.

        No process begins a step while it takes part, so the greatest is really the greatest.
        """
        with self._lock, suppress(Exception):  # a dead process ends all anyway
            self._set(f"step/{self.index}", str(self._step))
            milliseconds = round(1000 * (DEAD_AFTER + 60))
            self.client.wait_at_barrier(f"{_ROOT}/stop", milliseconds)
            self._stop_after = max(int(step) for step in self._read("step").values()) + 1

    def _judge(self, now: float) -> None:
        """Process 0 alone: who has not given a sign of life for too long?"""
        for key, beat in self._read("beat").items():
            if self._heard[int(key)][1] != beat:
                self._heard[int(key)] = now, beat, f"process {key} ({beat.partition(' ')[2]})"
        dead = [(i, name) for i, (at, _, name) in self._heard.items() if now - at > DEAD_AFTER]
        if dead:
            names = ", ".join(name for _, name in dead)
            verb = "has" if len(dead) == 1 else "have"
            text = f"{names} {verb} given no sign of life for {DEAD_AFTER:.0f} s"
            dead_ids = [i for i, _ in dead]
            self._publish({"kind": "dead", "text": text, "dead": dead_ids, "status": STATUS_LOST})

    def silent(self) -> str:
        """On process 0: who was not heard of when others still were; "" where that is nobody."""
        newest = max(at for at, _, _ in self._heard.values())
        return ", ".join(name for at, _, name in self._heard.values() if newest - at > 4 * _BEAT)

    # --- the end ---

    def _end(self, verdict: dict[str, Any]) -> None:
        if verdict["kind"] == "hang":
            self._end_hang(verdict)
        elif verdict["kind"] == "dead":
            self._leave(verdict["text"], verdict)
        elif verdict["index"] != self.index:
            name = f"process {verdict['index']} ({verdict['host']})"
            self._leave(f"{name} has failed: {verdict['text']}", verdict)

    def _end_hang(self, verdict: dict[str, Any]) -> NoReturn:
        limit = (self.hang_seconds or 0) / 60
        told = f"no step for {limit:g} minutes after step {verdict['step']} (Train.hang_minutes)"
        if not verdict["step"]:
            told += ", in which the first one's compiling counts too"
        stacks = {self.index: _stacks()}
        if self.client is not None:
            with suppress(Exception):
                self._set(f"stack/{self.index}", stacks[self.index])
            if self.index == 0:  # for a moment: another may be stuck too
                deadline = time.monotonic() + 5 * _LOOK
                while len(stacks) < self.count and time.monotonic() < deadline:
                    time.sleep(0.2)
                    with suppress(Exception):
                        stacks |= {int(i): text for i, text in self._read("stack").items()}
            else:
                stacks, told = {}, f"{told}; process 0 shows where each process was"
        for i, text in sorted(stacks.items()):
            os.write(2, f"--- where process {i} was ---\n{text}\n".encode())
        missing = sorted(set(range(self.count)) - set(stacks)) if self.index == 0 else []
        if missing:
            told += f"; no answer from process {', '.join(map(str, missing))}"
        self._leave(told, verdict)

    def _leave(self, message: str, verdict: dict[str, Any] | None = None) -> NoReturn:
        """Ends this process, whatever its main thread is doing."""
        status = (verdict or {}).get("status", STATUS_LOST)
        again = "; the same command goes on from the newest checkpoint"
        message += again if status == STATUS_LOST else ""
        with suppress(Exception):
            sys.stdout.flush()
        os.write(2, SHOW_CURSOR * os.isatty(2) + f"error: {message}\n".encode())
        if verdict is not None and self.client is not None:
            self._say_goodbye(verdict.get("dead", ()))
        os._exit(status)

    def _say_goodbye(self, dead: Any = ()) -> None:
        """Process 0, the coordinator, leaves last: without it jax aborts the others."""
        with suppress(Exception):
            self._set(f"left/{self.index}", "")
            deadline = time.monotonic() + 20 * _LOOK
            while self.index == 0 and time.monotonic() < deadline:
                if len(set(self._read("left")) | set(map(str, dead))) == self.count:
                    time.sleep(0.3)  # they write, then end
                    break
                time.sleep(0.1)

    # --- the store ---

    def _set(self, key: str, value: str, overwrite: bool = False) -> None:
        try:
            self.client.key_value_set(f"{_ROOT}/{key}", value, allow_overwrite=overwrite)
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def _read(self, folder: str) -> dict[str, str]:
        found = self.client.key_value_dir_get(f"{_ROOT}/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}

    def _publish(self, verdict: dict[str, Any]) -> None:
        """The first verdict stands."""
        with suppress(Exception):
            mine = {"index": self.index, "host": self._host}
            self._set("news/end", json.dumps(mine | verdict))


def _stacks() -> str:
    """Where every Python thread of this process is."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")[-200_000:]


_watch: Watch | None = None
_counting: Watch | None = None


def set_watch(watch: Watch) -> None:
    global _watch
    _watch = watch


def the_watch() -> Watch | None:
    """The watch over several processes, None where there is one."""
    return _watch


def beat() -> None:
    """Long work in the main thread, such as an evaluator's, goes on: no hang so far."""
    if _counting is not None:
        _counting.beat()
