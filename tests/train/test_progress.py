"""What a person sees: a bar on a terminal, plain lines elsewhere, a whole terminal afterwards."""

import io
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from olmo_jax.numerals import count_text
from olmo_jax.train.progress import Progress, format_seconds

ROW = {
    "loss": 3.25,
    "learning_rate": 3e-3,
    "tokens_per_second": 24135.0,
    "mfu": 0.412,
    "data_wait_share": 0.02,
}
SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"


def test_without_a_terminal_the_first_and_the_last_line_are_printed():
    out = io.StringIO()
    with Progress(5000, 0, Console(file=out, width=80)) as progress:
        for step in range(1, 5001):
            progress.update(step, {**ROW, "loss": 1 / step})
        progress.update(5000, {"heldout/bits_per_byte": 1.987})
        progress.message("saved [bold]/runs/1[/bold]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # one line about every ten seconds, and no escape codes
    assert lines[0].startswith("step 1/5000 · loss 1.000 · learning rate 3.00e-03 · 24.1k tokens/s")
    assert lines[1] == "saved [bold]/runs/1[/bold]"
    assert lines[2].startswith("step 5000/5000 · loss 0.000 · held-out 1.987 bits per byte")
    assert "\x1b" not in out.getvalue()


def test_a_resumed_run_that_has_nothing_to_do_prints_nothing():
    out = io.StringIO()
    with Progress(10, 10, Console(file=out)):
        pass
    assert out.getvalue() == ""


def test_a_row_with_a_nan_or_a_missing_number_is_shown():
    out = io.StringIO()
    with Progress(2, 0, Console(file=out)) as progress:
        progress.update(1, {"loss": float("nan"), "mfu": None})
    assert "step 1/2 · loss nan · " in out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_on_a_terminal_the_bar_holds_every_number(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=width)
    with Progress(100, 50, console) as progress:
        progress.update(51, {**ROW, "heldout/bits_per_byte": 2.0})
        progress.update(52, ROW)
    shown = re.sub(r"\x1b\[[^m]*[A-Za-z]", "", out.getvalue()).replace("\N{NO-BREAK SPACE}", " ")
    for part in ("step 52/100", "loss 3.250", "held-out 2.000 bits per byte", "24.1k tokens/s"):
        assert part in shown
    for part in ("MFU 41.2%", "waiting for data 2%", "learning rate 3.00e-03", "left"):
        assert part in shown


ENDINGS = {
    "finished": ("pass", 0),
    "exception": ("raise RuntimeError('boom')", 1),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_cursor_comes_back_however_the_program_ends(ending):
    code, status = ENDINGS[ending]
    program = f"""
import os, signal, time
from olmo_jax.train.progress import Progress
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts with &
with Progress(10, 0) as progress:
    progress.update(1, {ROW!r})
    time.sleep(0.3)
    {code}
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == status
    assert HIDE_CURSOR in shown
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)


def test_the_programs_own_signal_handlers_are_left_alone():
    def handler(number, frame):
        pass

    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    old = signal.signal(signal.SIGTERM, handler)
    try:
        with Progress(10, 0, console):
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with Progress(10, 0, console):
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, old)


def test_numbers_and_times_are_written_for_people():
    assert [count_text(n) for n in (7, 999.6, 24135, 1e6, 3.217e9)] == [
        *("7", "1.00k", "24.1k", "1.00M", "3.22B")
    ]
    assert [format_seconds(s) for s in (0.4, 65, 3599.6, 90061)] == [
        *("0:00", "1:05", "1:00:00", "25:01:01")
    ]
