"""Paired differences and curves over steps, from the files that the evaluations write."""

import json
import re

import numpy as np
import pytest
from rich.console import Console

from olmo_jax import cli
from olmo_jax.errors import UserError
from olmo_jax.eval.compare import differences, plots, read_folder, read_result
from olmo_jax.eval.domains import Document, summarize
from olmo_jax.eval.domains import table as domain_table
from olmo_jax.eval.page import terminal_table
from olmo_jax.eval.run import Results


def task_file(path, model, right, metric="acc", name="quiz"):
    """Results as `run.evaluate` writes them; `right`: whether each question is."""
    items = [
        {
            "label": 1,
            "choice": int(r),
            "logprobs": [-1.0 - r, -3.0 + r],
            "greedy": [False, False],
            "tokens": [2, 2],
            "bytes": [4, 8],
        }
        for r in right
    ]
    task = {"metric": metric, "metrics": {metric: 0.0}, "stderr": None, "items": items}
    path.write_text(json.dumps({"model": model, "tasks": {name: task}, "suites": {}}))
    return path


def domain_file(path, model, nats):
    documents = [["web" if i % 2 else "books", f"a:{i}", n, 10, 20] for i, n in enumerate(nats)]
    path.write_text(json.dumps({"model": model, "documents": documents}))
    return path


def test_paired_intervals_are_narrower_than_unpaired_ones(tmp_path):
    """B is right wherever A is and on a few more: paired, that is clear; apart it would not be."""
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.5
    b = a | (rng.random(400) < 0.06)
    files = task_file(tmp_path / "a.json", "a", a), task_file(tmp_path / "b.json", "b", b)
    first, other = map(read_result, files)
    (row,) = differences(first, other)
    assert (row.first, row.other, row.items) == (a.mean(), b.mean(), 400)
    assert row.low > 0 and row.better is True
    # A difference of 0/1 pairs is a mean: 1.96 of its standard errors each way.
    error = (b * 1.0 - a).std() / 20
    assert (row.high - row.low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    assert row.high - row.low < 2 * np.sqrt(a.var() + b.var()) / 20
    (back,) = differences(other, first)
    assert back.better is False
    (same,) = differences(first, first)
    assert same.low == same.high == 0 and same.better is None


def test_a_loss_is_better_when_it_is_lower(tmp_path):
    right = np.arange(60) % 2 == 0
    a = read_result(task_file(tmp_path / "a.json", "a", ~right & right, "bpb"))
    b = read_result(task_file(tmp_path / "b.json", "b", right | ~right, "bpb"))
    (row,) = differences(a, b)
    assert row.first == pytest.approx(3 / np.log(2) / 8) and row.other < row.first
    assert row.better is True


def test_domains_are_weighted_by_their_bytes(tmp_path):
    nats = np.random.default_rng(0).uniform(20, 40, 60)
    a = read_result(domain_file(tmp_path / "a.json", "a", nats))
    b = read_result(domain_file(tmp_path / "b.json", "b", nats + 1))
    rows = {row.task: row for row in differences(a, b)}
    assert set(rows) == {"web", "books", "all documents"}
    whole = rows["all documents"]
    assert whole.first == pytest.approx(nats.sum() / np.log(2) / 1200)
    # The same difference in each document: no spread at all.
    assert whole.low == pytest.approx(whole.high) == pytest.approx(1 / np.log(2) / 20)
    assert whole.better is False


@pytest.mark.parametrize("metric", ["bits_per_byte", "word_perplexity", "perplexity", "acc"])
def test_lm_evals_items_are_read(metric, tmp_path):
    """A rolling metric's values are pairs of a log-likelihood and a size, those of perplexity are
    log-likelihoods; a lower one is better."""
    files = []
    for name, nats in (("a", -30.0), ("b", -20.0)):
        value = {"acc": float(name == "a"), "perplexity": nats / 10}.get(metric, [nats, 10])
        values = [value] * 9
        items = [{"doc": n, "values": {metric: v}, "answers": []} for n, v in enumerate(values)]
        task = {"metric": metric, "metrics": {metric: 0.0}, "stderr": None, "items": items}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"model": name, "tasks": {"t": task}, "suites": {}}))
        files.append(path)
    (row,) = differences(*map(read_result, files))
    first = 1.0 if metric == "acc" else 3 / np.log(2)
    assert row.first == pytest.approx(first) and row.better is (metric != "acc")


def test_a_folder_becomes_a_plot_for_each_task(tmp_path, capsys):
    runs = tmp_path / "results"
    runs.mkdir()
    for step in (1000, 200, 30):
        right = np.arange(100) < step / 20
        task_file(runs / f"{step}.json", f"runs/demo at step {step}", right)
    found = read_folder(runs)
    assert [r.step for r in found] == [30, 200, 1000] and found[0].model == "runs/demo"
    (plot,) = plots({"demo": found})
    assert plot.hover["curves"][0]["steps"] == [30, 200, 1000]
    assert plot.hover["curves"][0]["text"] == ["0.0200", "0.1000", "0.5000"]
    out = tmp_path / "x.html"
    assert cli.run(["eval", "--compare", str(runs), f"--out={out}"]) == 0
    assert "0.5000" in capsys.readouterr().out
    page = out.read_text()
    assert "<svg" in page and "quiz: acc" in page
    assert "http:" not in page and "https:" not in page


@pytest.mark.parametrize(
    ("model", "name", "step"),
    [
        ("runs/two-step2 at step 500", "runs/two-step2", 500),
        ("runs/two-step2/checkpoints/step_500", "runs/two-step2/checkpoints", 500),
        ("runs/onestep2", "runs/onestep2", 7),
        ("allenai/OLMo", "allenai/OLMo", 7),
    ],
)
def test_the_step_is_the_models_else_its_files(model, name, step, tmp_path):
    found = read_result(task_file(tmp_path / "step7.json", model, [True]))
    assert (found.model, found.step) == (name, step)


def test_the_command_prints_and_writes_what_differs(tmp_path, capsys):
    right = np.arange(100) < 30
    a = task_file(tmp_path / "a.json", "a", right)
    b = task_file(tmp_path / "b.json", "b", ~right)
    out = tmp_path / "x.html"
    assert cli.run(["eval", "--compare", str(a), str(b), f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "+0.4000" in shown and "better" in shown
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", out.read_text())
    assert cells[:6] == ["quiz", "acc", "100", "0.3000", "0.7000", "+0.4000"]


def test_names_are_shown_as_they_are(tmp_path, capsys):
    """Brackets are rich's markup."""
    folder = tmp_path / "[b]x[/wiki]"
    folder.mkdir(parents=True)
    right = np.arange(100) < 30
    a, b = (folder / f"step{n}.json" for n in (1, 2))
    task_file(a, "a", right, name="[/wiki] [deleted]")
    task_file(b, "b", ~right, name="[/wiki] [deleted]")
    for words in ([str(a), str(b)], [str(folder)]):
        out = folder / "[i].html"
        assert cli.run(["eval", "--compare", *words, f"--out={out}"]) == 0
        shown = capsys.readouterr().out
        assert "[/wiki] [deleted]" in shown and f"written: {out}" in shown
        assert words[0] in "".join(shown.partition("task")[0].split())
    results = Results(json.loads(a.read_bytes()) | {"suites": {"[x]": 0.5}})
    results.content["tasks"]["[/wiki] [deleted]"]["metrics"] = {"acc": 0.5}
    domains = summarize([Document("[deleted]", "1", 90.0, 40, 50)])
    Console(width=200).print(terminal_table(results), domain_table(domains))
    shown = capsys.readouterr().out
    assert "[/wiki] [deleted]" in shown and "[x]" in shown and shown.count("[deleted]") == 2


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    right = np.arange(10) < 3
    a = read_result(task_file(tmp_path / "a.json", "a", right))
    short = read_result(task_file(tmp_path / "short.json", "b", right[:5]))
    with pytest.raises(UserError, match="not the same"):
        differences(a, short)
    other = read_result(domain_file(tmp_path / "d.json", "d", [1.0, 2.0]))
    with pytest.raises(UserError, match="no task in common"):
        differences(a, other)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="not a result"):
        read_result(tmp_path / "bad.json")
    with pytest.raises(UserError, match="has no step"):
        (tmp_path / "f").mkdir()
        task_file(tmp_path / "f" / "a.json", "a", right)
        read_folder(tmp_path / "f")
    for words in (["--compare"], ["--compare", str(tmp_path), str(tmp_path / "a.json")], []):
        assert cli.run(["eval", *words]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
