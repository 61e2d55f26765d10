"""A finished run traced back: its batches, token for token, and from its documents to its steps."""

import json
import re
import shlex
import struct
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

import olmo_jax.cli as cli
from olmo_jax.checkpoint.fork import fork
from olmo_jax.config import to_gin
from olmo_jax.data import Document, write_token_file
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.data.traced_run import TracedRun
from olmo_jax.train.config import RunConfig
from olmo_jax.train.loop import train
from olmo_jax.train.step import Trainer

ROOT = Path(__file__).parents[2]
TEXT = "to-morrow and creeps in this petty pace from day to the last syllable"
WORDS = TEXT.split(" ")
MODEL = {"vocab_size": 320, "d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_width": 32}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 40 steps of 8 instances, three epochs; and what the training step was given."""
    folder = tmp_path_factory.mktemp("traced")
    rng = np.random.default_rng(0)
    names = ["hamlet", *[f"d{i}" for i in range(1, 30)]]
    texts = [" ".join(rng.choice(WORDS, 40)) for _ in range(30)]
    (folder / "a.jsonl").write_text(
        "".join(
            json.dumps({"id": name, "text": text}) + "\n"
            for name, text in zip(names, texts, strict=True)
        )
    )
    path = str(folder / "tokenizer.json")
    tokenizer = train_tokenizer([str(folder / "a.jsonl")], path, vocab_size=300)
    documents, tokens = [], []
    for i, text in enumerate(texts):
        start, ids = len(tokens), [*tokenizer.encode(text).ids, 0]
        tokens += ids
        documents.append(Document(start, len(tokens), names[i], "a.jsonl", i + 1))
    write_token_file(folder / "part.npy", np.array(tokens), documents, "uint16")
    config = RunConfig.from_json(
        {
            "Model": MODEL,
            "Schedule": {"kind": "constant"},
            "Data": {
                "paths": (str(folder / "part.npy"),),
                "sequence_length": 16,
                "batch_size": 8,
                "eos_token_id": 0,
            },
            "Train": {
                "run_dir": str(folder / "run"),
                "steps": 40,
                "tensorboard": False,
                "tokenizer": path,
            },
            "Checkpoint": {"every": 20},
        }
    )
    given = []

    class Recording(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            step = self.step

            def record(state, batch, *rest):
                given.append(np.asarray(batch.tokens_BT))
                return step(state, batch, *rest)

            self.step = record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("olmo_jax.train.loop.Trainer", Recording)
        assert train(config, to_gin(config)) == 0
    return folder / "run", given


def trace(run, *arguments: str) -> str:
    with redirect_stdout(StringIO()) as out:
        assert cli.run(["data", "trace", f"--run={run}", *arguments]) == 0
    return out.getvalue()


def refused(capsys, run, *arguments: str) -> str:
    assert cli.run(["data", "trace", f"--run={run}", *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_traced_documents_are_what_training_was_given(finished):
    run, given = finished
    rng = np.random.default_rng(1)
    steps = {}
    for pair in rng.choice(40 * 8, 200, replace=False).tolist():
        step, row = pair // 8 + 1, pair % 8
        if step not in steps:
            steps[step] = json.loads(trace(run, f"--step={step}", "--json"))
            assert steps[step]["as_recorded"] is True
        traced = steps[step]["rows"][row]
        tokens = []
        for part in traced["parts"]:
            stored = np.fromfile(part["path"], np.uint16)
            assert part["document"]["start"] <= part["start"] < part["end"]
            assert part["end"] <= part["document"]["end"]
            tokens += stored[part["start"] : part["end"]].tolist()
        assert tokens == given[step - 1][row].tolist()
    assert max(row["epoch"] for row in steps[max(steps)]["rows"]) > 1


def test_a_document_gives_the_steps_that_read_it(finished):
    run, _ = finished
    read: dict[str, set] = {}
    rows = [row for step in range(1, 41) for row in TracedRun(run).trace.rows(step)]
    for row in rows:
        [place] = row.places
        for d in place.documents:
            start, end = max(d.start, place.start), min(d.end, place.end)
            seen = (row.step, row.row, start, end, start - place.start)
            read.setdefault(d.id, set()).add(seen)
    for name in ("hamlet", "d7", "d29"):
        [found] = json.loads(trace(run, f"--document={name}", "--json"))["found"]
        keys = ("step", "row", "start", "end", "at")
        assert {tuple(s[k] for k in keys) for s in found["sightings"]} == read[name]
        [found] = json.loads(trace(run, f"--document={name}", "--json", "--before_checkpoint=20"))[
            "found"
        ]
        assert set(found["steps"]) == {s for s, *_ in read[name] if s <= 20}


def test_a_text_gives_the_steps_that_read_it(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run, given = finished
    tokenizer = TracedRun(run).tokenizer()
    texts = [[tokenizer.decode(row.tolist()) for row in batch] for batch in given]
    word = "petty pace"
    having = {s for s, rows in enumerate(texts, 1) if any(word in row for row in rows)}
    content = json.loads(trace(run, f"--text={word}", "--json"))
    found = content["found"]
    assert content["complete"]
    whole = {
        sighting["step"]
        for one in found
        for sighting in one["sightings"]
        if sighting["end"] - sighting["start"] == one["end"] - one["start"]
    }
    assert whole == having and having
    listing = trace(run, f"--text={word}", "--limit=1").splitlines()[1:]
    [place] = [line for line in listing if line.startswith("… ") and line.endswith(" …")]
    assert word in place
    assert sum(line.startswith("read in step") for line in listing) == 1
    assert listing[-1] == f"… and {len(found) - 1:,} more places (--limit)"
    monkeypatch.setattr("olmo_jax.cli_trace._MOST_PLACES", len(found))
    assert json.loads(trace(run, f"--text={word}", "--json")) == content
    monkeypatch.setattr("olmo_jax.cli_trace._MOST_PLACES", len(found) - 1)
    cut = json.loads(trace(run, f"--text={word}", "--json"))
    assert not cut["complete"] and len(cut["found"]) == len(found) - 1
    heading = trace(run, f"--text={word}").splitlines()[0]
    assert "at least, and the steps are of these places alone;" in heading


def test_what_a_checkpoint_had_seen_and_the_page(finished, tmp_path):
    run, _ = finished
    [seen] = json.loads(trace(run, "--before_checkpoint=20", "--json"))["sources"]
    assert (seen["instances"], seen["tokens"]) == (160, 160 * 16)
    assert 0 < seen["documents"] <= seen["documents_in_all"] == 30
    assert "160" in trace(run, "--before_checkpoint=20")
    [found] = json.loads(trace(run, "--document=d7", "--json"))["found"]
    listing = trace(run, "--document=d7").splitlines()[2:]
    length = found["end"] - found["start"]
    assert listing[0] == f"d7 · {length} tokens · a.jsonl:8"
    rows = [line.split()[:2] for line in listing if re.match(r" *\d+ ", line)]
    assert rows == [[str(s["step"]), str(s["row"])] for s in found["sightings"]][:20]
    assert "row 0 · instance" in trace(run, "--step=3", "--row=0")
    page = tmp_path / "page.html"
    trace(run, "--step=3", f"--out={page}")
    assert "those that the run recorded" in page.read_text()
    assert cli.run(["report", str(run)]) == 0
    batches = (run / "batches.html").read_text()
    assert batches.count("<article") == 16 * 8 and "Step 40" in batches
    assert 'href="batches.html"' in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_fork_names_the_run_before_it(finished, tmp_path, capsys):
    run, _ = finished
    fork(run, tmp_path / "new", 20)
    config = json.loads((run / "config.json").read_text())
    config["Train"] |= {"run_dir": str(tmp_path / "new"), "steps": 22}
    new = RunConfig.from_json(config)
    assert train(new, to_gin(new)) == 0
    capsys.readouterr()
    error = refused(capsys, tmp_path / "new", "--step=20")
    assert f"begins at step 21; the ones before it are of {run}" in error
    assert '"as_recorded": true' in trace(tmp_path / "new", "--step=21", "--json")


def test_a_step_that_is_not_as_recorded_is_refused(finished, tmp_path, capsys):
    run, _ = finished
    for name in ("config.json", "data.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    lines = (run / "instances.jsonl").read_text().splitlines(keepends=True)
    third = json.loads(lines[2])
    other_tokens = third | {"tokens_xxh3": "0" * 16}
    other_ids = third | {"instance_ids": third["instance_ids"][::-1]}
    for changed in (other_tokens, other_ids):
        new = [*lines[:2], json.dumps(changed) + "\n", *lines[3:]]
        (tmp_path / "instances.jsonl").write_text("".join(new))
        assert TracedRun(tmp_path).agrees([2, 3, 4]) == {2: True, 3: False, 4: True}
        assert "not those that the run recorded" in refused(capsys, tmp_path, "--step=3")
    (tmp_path / "instances.jsonl").write_text("".join(lines[:2] + lines[3:]))
    assert '"as_recorded": null' in trace(tmp_path, "--step=3", "--json")
    assert "recorded" not in trace(tmp_path, "--step=3")
    assert "that the run recorded" in trace(tmp_path, "--step=4")


def test_data_that_moved_or_changed_is_named(finished, tmp_path, capsys):
    run, _ = finished
    tokens = Path(json.loads((run / "config.json").read_text())["Data"]["paths"][0])
    moved = tmp_path / "part.npy"
    tokens.rename(moved)
    documents = tokens.with_suffix(".csv.gz")
    documents.rename(moved.with_suffix(".csv.gz"))
    try:
        assert "no such token file; if they have moved" in refused(capsys, run, "--step=1")
        there = f'--gin.Data.paths=("{moved}",)'
        assert '"as_recorded": true' in trace(run, "--step=1", "--json", there)
        content = moved.read_bytes()
        moved.write_bytes(content[:-2] + b"\1\0")
        assert "the data is not what" in refused(capsys, run, "--step=1", there)
        moved.write_bytes(content)
    finally:
        moved.rename(tokens)
        moved.with_suffix(".csv.gz").rename(documents)


def test_mistakes_are_one_line(finished, capsys):
    run, _ = finished
    for arguments, message in {
        ("--step=41",): "has finished steps 1 to 40",
        ("--step=30", "--before_checkpoint=20"): "20 before the checkpoint",
        ("--step=3", "--row=8"): "row 8: step 3 has rows 0 to 7",
        ("--before_checkpoint=7",): "has checkpoints of steps 20, 40",
        ("--document=d77",): "no document of 1 token files has this id; similar are",
        ("--text=Zebra",): "'Zebra': is nowhere in the 1 token files",
        ("--step=1", "--text=a"): "give one of --step",
        ("--step=3", "--limit=0"): "--limit=0: it must be at least 1",
        ("--stp=1",): "did you mean --step?",
        ("--step=1", "--out=a.txt"): "ends in .html",
    }.items():
        assert message in refused(capsys, run, *arguments)
    assert "is not there" in refused(capsys, run / "no", "--step=1")


def test_the_commands_of_the_page_run(finished, tmp_path, monkeypatch):
    """With token files of the sizes that the recipes of released runs need for one step."""
    run, _ = finished
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("runs", "olmo", "pythia"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    for k in range(2):
        rng.integers(0, 50_000, 1024 * 2048 + 99, np.uint16).tofile(tmp_path / f"olmo/part-{k}.npy")
    rng.permutation(2048).astype(np.uint32).tofile(tmp_path / "olmo/global_indices.npy")
    pile = rng.integers(0, 50_000, (1024, 2049), np.uint16)
    pile.tofile(tmp_path / "pythia/document.bin")
    lengths, starts = np.full(1024, 2049, "<i4"), np.arange(1024, dtype="<i8") * 4098
    (tmp_path / "pythia/document.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 1024, 1025)
        + lengths.tobytes()
        + starts.tobytes()
        + np.arange(1025, dtype="<i8").tobytes()
    )
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "trace.md").read_text()
    commands = [
        line.replace("_checkpoint=500", "_checkpoint=20")
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == 12
    for command in commands:
        with redirect_stdout(StringIO()) as out:
            assert cli.run(shlex.split(command)[1:]) == 0, command
    # The last is Pythia's: the last row of its first iteration.
    with redirect_stdout(StringIO()) as out:
        assert cli.run([*shlex.split(commands[-1])[1:], "--json"]) == 0
    [row] = json.loads(out.getvalue())["rows"]
    assert (row["instance_id"], row["parts"][0]["document"]["id"]) == (1023, "1023")
    [python] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    values: dict = {}
    exec(python, values)
    assert values["tokens_BT"].shape == (8, 16)
