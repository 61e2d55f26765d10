"""The page is made from whatever a run folder holds, shows it as text, and needs no network."""

import html.parser
import json
import math
import random
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from olmo_jax.errors import UserError
from olmo_jax.numerals import count_text, size_text
from olmo_jax.parallel.environment import environment
from olmo_jax.report.plots import Curve, make_plot, tick_text, ticks
from olmo_jax.report.report import time_text, write_report

HOSTILE = "</pre></script><script>alert('x')</script><img src=http://evil.example/x onerror=\"y\">"


def train_row(step: int, **changes) -> dict:
    row = {"step": step, "tokens": 2048 * step, "time": 1e9 + step, "loss": 2 + 5 / step}
    row |= {"z_loss": 0.1, "perplexity": 7.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    row |= {"skipped": 0, "tokens_per_second": 1e4, "step_seconds": 0.2, "data_wait_share": 0.0}
    return row | changes


def heldout_row(step: int, bits: float) -> dict:
    return {
        "step": step,
        "tokens": 2048 * step,
        "time": 1e9 + step,
        "heldout/loss": 1.6 * bits,
        "heldout/perplexity": math.exp(1.6 * bits),
        "heldout/bits_per_byte": bits,
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    rows = [train_row(step) for step in range(1, 3001)]
    rows += [heldout_row(step, 2 + 100 / step) for step in range(100, 3001, 100)]
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(
        folder / "samples.jsonl",
        [{"step": step, "prompt": "MACBETH.", "text": f" at {step}"} for step in (100, 3000)],
    )
    sources = [{"source": "plays", "files": 36, "bytes": 4912440, "documents": None}]
    data = {"sources": sources, "heldout": [{"name": "Macbeth", "bytes": 212045}]}
    data["baselines"] = {"xz -9 given the training text": 2.342}
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "config.gin").write_text("Train.steps = 3000\n")
    (folder / "config.json").write_text('{"Train": {"steps": 3000}}')
    (folder / "environment.json").write_text('{"cpu": "AMD EPYC", "memory_bytes": 8000000000}')
    for step, complete in ((1000, True), (3000, True), (2000, False)):
        checkpoint = folder / "checkpoints" / f"step{step}"
        checkpoint.mkdir(parents=True)
        arrays = {"params/embed/weight": {"shape": [2048, 128]}, "opt_state/mu": {"shape": [999]}}
        (checkpoint / "metadata.json").write_text(json.dumps({"permanent": True, "arrays": arrays}))
        if complete:
            (checkpoint / "manifest.json").write_text("{}")
    return folder


class Page(html.parser.HTMLParser):
    """Parses a page, and fails on a tag that is closed out of turn or never."""

    VOID = frozenset({"meta", "rect", "line", "circle", "path"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(folder) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_shows_what_the_folder_holds(run_dir):
    text, page = report(run_dir)
    for words in (
        *("my-run", "3,000 steps, finished", "2.033 bits per byte", "this model", "2.342"),
        *("xz -9 given the training text 2.34", "262k 262,144", "Tokens seen 6.14M", "MACBETH."),
        *("After step 3,000", "After step 100", "4.91 MB", "not known", "8.00 GB", "AMD EPYC"),
        *("half-written", "for good", "Train.steps = 3000", "Learning rate", "Gradient norm"),
        *("Wall time 49m 59s", "10m 00s of it in training steps"),
    ):
        assert words in page.text, words
    assert [tag for tag, _ in page.tags].count("svg") == 6
    assert len(page.ids) == len(set(page.ids))
    assert len(text) < 500_000
    assert not list(run_dir.glob(".*"))


def test_the_page_asks_the_network_for_nothing(run_dir):
    text, page = report(run_dir)
    for tag, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "action"} & set(attributes), tag
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text.replace("// ", ""))


def test_hostile_text_is_shown_and_never_run(run_dir):
    _, clean = report(run_dir)
    write_rows(run_dir / "samples.jsonl", [{"step": 3000, "prompt": HOSTILE, "text": HOSTILE}])
    (run_dir / "config.gin").write_text(HOSTILE)
    (run_dir / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    table = {"sources": [{HOSTILE: HOSTILE}], "heldout": [], "baselines": {HOSTILE: 2.5}}
    (run_dir / "data.json").write_text(json.dumps(table))
    hostile_dir = run_dir.with_name(HOSTILE.replace("/", ""))
    shutil.move(run_dir, hostile_dir)
    text, page = report(hostile_dir)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [a for _, a in page.tags if "onerror" in a]
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert page.text.count(HOSTILE) >= 6
    assert "script-src 'sha256-" in text


METRICS = {
    "no file": None,
    "empty": "",
    "one row": json.dumps(train_row(1)) + "\n",
    "one evaluation": json.dumps(heldout_row(0, 8.0)) + "\n",
    "a half-written row": json.dumps(train_row(1)) + '\n{"step": 2, "lo',
    "all null": json.dumps({name: None for name in train_row(1)} | {"step": 1}) + "\n",
    "NaN and infinity": '{"step": 1, "loss": NaN, "step_seconds": Infinity, "tokens": -Infinity}\n',
    "words for numbers": '{"step": 1, "loss": "high", "mfu": [], "tokens": true}\n',
    "not rows": '7\nnull\n[1]\n{"loss": 1}\n{"step": "x"}\n\0\n',
    "all the same": "".join(json.dumps(train_row(5, loss=0.0)) + "\n" for _ in range(50)),
    "huge": json.dumps(train_row(10**12, loss=1e308, step_seconds=1e-12)) + "\n",
}


@pytest.mark.parametrize("metrics", METRICS)
def test_any_metrics_give_a_page(tmp_path, metrics):
    (tmp_path / "config.gin").write_text("")
    if METRICS[metrics] is not None:
        (tmp_path / "metrics.jsonl").write_text(METRICS[metrics])
    for name in ("data.json", "environment.json", "config.json"):
        (tmp_path / name).write_text('{"sources": 7, "baselines": [], "Train": "')
    text, _ = report(tmp_path)
    assert "Configuration" not in text
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)


def test_a_report_needs_neither_jax_nor_a_plotting_library(run_dir):
    program = (
        "import sys; from olmo_jax.report.report import write_report; write_report(sys.argv[1]); "
        "assert not {'jax', 'orbax', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(run_dir)], check=True)


def test_a_long_noisy_curve_keeps_its_spikes_and_its_gaps():
    noise = random.Random(0)
    values = np.array([noise.gauss(3, 0.1) for _ in range(100_000)])
    values[70_001] = 3.9
    values[40_000:50_000] = np.nan
    curve = Curve("loss", "train", np.arange(1, 100_001), values, smoothed=True)
    plot = make_plot("Loss", [curve], lambda v: f"{v:.2f}")
    assert plot is not None
    assert "3.90" in plot.hover["curves"][0]["text"]
    assert plot.curves[0]["faint"].count("M") == plot.curves[0]["path"].count("M") == 2
    assert len(plot.curves[0]["faint"]) < 10_000


def test_one_compilation_does_not_flatten_the_step_times():
    seconds = np.full(200, 0.2)
    seconds[0] = 60.0
    plot = make_plot("Step time", [Curve("s", "speed", np.arange(200), seconds)], str, None, True)
    assert plot is not None
    assert [text for _, text in plot.y_ticks] == ["0", "0.1", "0.2", "0.3"]


def test_ticks_are_few_round_and_inside():
    draw = random.Random(1)
    for _ in range(500):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-6, 9)
        high = low + draw.uniform(0.01, 1) * 10 ** draw.randint(-6, 9)
        found = ticks(low, high, 5)
        assert 2 <= len(found) <= 7
        slack = 1e-6 * (high - low)
        assert low - slack <= found[0] and found[-1] <= high + slack
    assert [tick_text(v) for v in (0, 0.0025, 2e-5, 800, 12500, 2e6)] == [
        *("0", "0.0025", "2e-5", "800", "12.5k", "2M")
    ]


def test_numbers_are_written_for_people():
    assert [count_text(v) for v in (7, 24135, 85.1e6)] == ["7", "24.1k", "85.1M"]
    assert [size_text(v) for v in (7, 212045, 1.38e9)] == ["7 bytes", "212 kB", "1.38 GB"]
    assert [time_text(v) for v in (8.3, 271, 7500, 270000)] == ["8.3s", "4m 31s", "2h 05m", "3d 3h"]


def test_the_environment_is_json_and_names_no_host():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert {"python", "jax", "cpu", "cores", "devices", "os"} <= set(facts)
    assert socket.gethostname() not in json.dumps(facts).split('"')
