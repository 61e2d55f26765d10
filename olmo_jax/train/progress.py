"""What a person sees while a model trains: a progress bar, or plain lines without a terminal.

Not for keeping the numbers (metrics.py does).
"""

import os
import signal
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from olmo_jax.numerals import count_text

SECONDS_BETWEEN_LINES = 10.0
SHOW_CURSOR = b"\x1b[?25h\n"


class Progress:
    """A context manager. `total_steps` is where the run ends, `first_step` the steps already done.

    On a terminal: a bar and the newest numbers, redrawn in place by a thread of its own. Anywhere
    else (a file, a pipe, TERM=dumb): the first step, one line about every ten seconds, the last.
    The terminal is put right again on an exception, and on SIGTERM and SIGHUP where the program
    has no handler of its own. Writes to stderr when no console is given.
    """

    def __init__(self, total_steps: int, first_step: int, console: Console | None = None):
        self.total_steps = total_steps
        self._step = first_step
        self._row: dict[str, Any] = {}
        self._console = console or Console(stderr=True)
        self._start = time.monotonic()
        # (time, step) of the last updates: time left follows the present speed, and leaves the
        # first step out, which compiles.
        self._recent: deque[tuple[float, int]] = deque(maxlen=200)
        self._last_line_time = -float("inf")
        self._has_news = False  # since the last plain line
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._live: Live | None = None
        if self._console.is_interactive:
            # Four frames a second: drawing takes its time from the training on a small machine.
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4
            )

    def __enter__(self) -> "Progress":
        self._start = time.monotonic()
        if self._live is not None:
            self._catch_signals()
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            for number, handler in self._old_handlers.items():
                if signal.getsignal(number) == self._on_signal:
                    signal.signal(number, handler)
        elif self._has_news:
            self._print_line()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """`step` steps are finished; `row` is a train or an evaluation row of metrics.jsonl."""
        now = time.monotonic()
        self._row = {**self._row, **row}
        self._step = step
        self._has_news = True
        self._recent.append((now, step))
        if self._live is None and now - self._last_line_time >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def message(self, text: str) -> None:
        """Prints `text` above the bar, as it is."""
        self._console.print(Text(text), soft_wrap=True)

    def _print_line(self) -> None:
        self._last_line_time, self._has_news = time.monotonic(), False
        parts = [f"step {self._step}/{self.total_steps}", *self._numbers(), self._times()]
        # soft_wrap: a log file has no width to wrap at.
        self._console.print(Text(" · ".join(parts)), soft_wrap=True)

    def _numbers(self) -> Iterator[str]:
        """The newest row in words, a part for each number that it has."""
        formats = (
            ("loss", lambda loss: f"loss {loss:.3f}"),
            ("heldout/bits_per_byte", lambda bits: f"held-out {bits:.3f} bits per byte"),
            ("expert_load_max", lambda load: f"fullest expert {load:.2f} x the mean"),
            ("learning_rate", lambda rate: f"learning rate {rate:.2e}"),
            ("tokens_per_second", lambda speed: f"{count_text(speed)} tokens/s"),
            ("mfu", lambda mfu: f"MFU {mfu:.1%}"),
            ("data_wait_share", lambda share: f"waiting for data {share:.0%}"),
        )
        for name, write in formats:
            if self._row.get(name) is not None:
                yield write(float(self._row[name]))

    def _times(self) -> str:
        elapsed = format_seconds(time.monotonic() - self._start)
        if self._step >= self.total_steps:
            return f"{elapsed} elapsed"
        left = self._seconds_left()
        return f"{elapsed} elapsed, {'?' if left is None else format_seconds(left)} left"

    def _seconds_left(self) -> float | None:
        if len(self._recent) < 2 or self._recent[-1][1] == self._recent[0][1]:
            return None
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        seconds = (end - start) / (last - first) * (self.total_steps - last)
        return max(0.0, seconds - (time.monotonic() - end))

    def _render(self) -> RenderableType:
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True, style="dim")
        bar.add_row(
            ProgressBar(total=self.total_steps, completed=self._step),
            Text(f"step {self._step}/{self.total_steps}", style="bold"),
            self._times(),
        )
        # A narrow window wraps between the parts, not inside one: textwrap, unlike rich, takes a
        # no-break space for a letter.
        parts = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in self._numbers()]
        lines = textwrap.fill(" · ".join(parts), self._console.width, break_on_hyphens=False)
        return Group(bar, Text(lines or "compiling the training step …", style="cyan"))

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                self._old_handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Not Live.stop: it would wait for a lock that the interrupted code may hold.
        os.write(self._console.file.fileno(), SHOW_CURSOR)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def format_seconds(seconds: float) -> str:
    """4000 as "1:06:40", 65 as "1:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
