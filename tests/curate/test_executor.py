"""The same bytes for any number of workers and after a kill; failures named while others finish."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmo_jax.curate import duplicates
from olmo_jax.curate.config import parse_config
from olmo_jax.curate.decontaminate import DecontaminateConfig, write_index
from olmo_jax.curate.dedupe import dedupe
from olmo_jax.curate.dedupe_config import DeduperConfig
from olmo_jax.curate.documents import writing
from olmo_jax.curate.executor import Executor, Shard, run_shards
from olmo_jax.curate.mix import MixConfig, mix
from olmo_jax.curate.tag import tag
from olmo_jax.errors import UserError


def outputs(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "documents" not in path.parts and "settings" not in path.name
    }


def run_all(root, executor):
    """Tags, de-duplicates and mixes the corpus in `root`; the bytes of every output."""
    documents = [f"{root}/documents/*.jsonl"]
    tag(documents, ["gopher_v1", "random_number_v1"], "rules", executor)
    paragraphs = {"name": "seen", "paragraphs": {"attribute_name": "seen"}}
    dedupe(
        parse_config({"documents": documents, "dedupe": paragraphs}, DeduperConfig, ""), executor
    )
    stream = {
        "name": "mixed",
        "documents": documents,
        "attributes": ["rules", "seen"],
        "filter": {"include": ["$.attributes[?(@.rules__gopher_v1__word_count[0][2] > 20)]"]},
        "span_replacement": [{"span": "$.attributes.seen", "min_score": 0.5}],
        "weight": 1.5,
        "output": {"path": f"{root}/mixed", "max_size_in_bytes": 20_000},
    }
    mix(parse_config({"streams": [stream]}, MixConfig, ""), executor)
    return outputs(root)


@pytest.fixture
def copies(corpus, tmp_path_factory):
    """Makes another folder with the corpus' documents."""

    def copy():
        root = tmp_path_factory.mktemp("copy")
        (root / "documents").mkdir()
        for path in (corpus / "documents").iterdir():
            (root / "documents" / path.name).write_bytes(path.read_bytes())
        return root

    return copy


def test_any_number_of_workers_writes_the_same_bytes(copies):
    one, *others = (run_all(copies(), Executor(workers=n)) for n in (1, 2, 4))
    assert others == [one, one]
    assert len(one) > 15 and "mixed/mixed-0001.jsonl.gz" in one


@pytest.mark.slow  # starting a cluster takes ten seconds
def test_ray_writes_the_same_bytes(copies):
    pytest.importorskip("ray")
    assert run_all(copies(), Executor("ray", 2)) == run_all(copies(), Executor())


def test_a_killed_run_goes_on(copies):
    whole, root = run_all(copies(), Executor()), copies()
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from test_executor import run_all, Executor;"
        "run_all(Path(sys.argv[1]), Executor(workers=2))"
    )
    command = [sys.executable, "-c", program, str(root), os.path.dirname(__file__)]
    process = subprocess.Popen(command, start_new_session=True)
    while not (root / "attributes/rules/part-1.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while running := in_session(process.pid):  # its workers leave, too
        assert time.monotonic() < deadline, running
        time.sleep(0.1)
    before = outputs(root)
    finished = root / "attributes/rules/part-1.jsonl"
    written = finished.stat().st_mtime_ns
    assert len(before) < len(whole)
    after = run_all(root, Executor())
    assert {name: after[name] for name in whole} == whole
    assert finished.stat().st_mtime_ns == written  # not done again


def in_session(session):
    """The processes of a session that still run."""
    listed = subprocess.run(["ps", "-eo", "sid=,stat=,pid="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [pid for sid, state, pid in rows if int(sid) == session and state[0] != "Z"]


def work(out, behaviour, advance):
    if behaviour == "fails":
        raise UserError("x.jsonl: line 3 is not JSON")
    if behaviour == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    tries = out.with_suffix(".tries")
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if behaviour == "fails once" and len(tries.read_text()) == 1:
        raise OSError("a passing fault")
    advance(1, 10)
    out.write_text("done")
    return behaviour


@pytest.mark.parametrize("workers", [1, 3])
def test_failures_are_named_and_the_others_finish(tmp_path, workers):
    kinds = ["fine", "fails", "fails once", "fine too"] + ["dies"] * (workers > 1)
    shards = [
        Shard(kind, str(tmp_path / kind), work, (tmp_path / kind, kind), 10) for kind in kinds
    ]
    with pytest.raises(UserError) as error:
        run_shards(shards, Executor(workers=workers, retries=2), "working")
    assert "failed 3 times: x.jsonl: line 3 is not JSON" in str(error.value)
    assert str(error.value).count("its process died") == (workers > 1)
    finished = {path.name for path in tmp_path.iterdir() if path.suffix != ".tries"}
    assert finished == {"fine", "fails once", "fine too"}


def test_other_settings_are_refused(corpus):
    documents = [f"{corpus}/documents/*.jsonl"]
    tag(documents, ["gopher_v1"], "a", Executor())
    with pytest.raises(UserError, match="was made with another taggers"):
        tag(documents, ["c4_v1"], "a", Executor())


def test_what_has_changed_is_made_again(corpus):
    documents = [f"{corpus}/documents/*.jsonl"]
    (corpus / "documents/part-2.jsonl").write_text("{oops")
    with pytest.raises(UserError, match=r"3 of 4 shards are done.*part-2.jsonl: line 1"):
        tag(documents, ["gopher_v1"], "a", Executor())
    (corpus / "documents/part-2.jsonl").write_text(json.dumps({"id": "x", "text": "mended"}))
    assert tag(documents, ["gopher_v1"], "a", Executor()) == 1
    assert tag(documents, ["gopher_v1"], "a", Executor()) == 0
    before = outputs(corpus)
    with (corpus / "documents/part-0.jsonl").open("a") as file:
        file.write(json.dumps({"id": "more", "text": "x"}) + "\n")
    assert tag(documents, ["gopher_v1"], "a", Executor()) == 31
    after = outputs(corpus)
    assert [name for name in after if after[name] != before[name]] == ["attributes/a/part-0.jsonl"]


def test_a_bloom_filter_survives_a_kill_while_it_is_written(corpus, monkeypatch):
    bloom = {"file": f"{corpus}/bloom.bin", "estimated_doc_count": 1000}
    fields = {"name": "seen", "paragraphs": {"attribute_name": "seen"}}
    content = {"documents": [f"{corpus}/documents/*"], "dedupe": fields, "bloom_filter": bloom}
    config = parse_config(content, DeduperConfig, "")

    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            duplicates, "writing", lambda p: stop(p) if p.endswith(".bin") else writing(p)
        )
        dedupe(config, Executor())
    counts = dedupe(config, Executor())
    assert 0 < counts["duplicates"] < counts["units"]
    assert dedupe(config, Executor()) == counts
    alone = {**content, "dedupe": fields | {"name": "alone"}, "bloom_filter": {}}
    assert dedupe(parse_config(alone, DeduperConfig, ""), Executor()) == counts


def test_a_rerun_does_not_take_its_own_bloom_filter_for_what_was_seen_before(copies):
    """With a document more the marks and the filter are those of a fresh run, what came before and
    after included."""

    def run(root, name, documents):
        fields = {"name": name, "documents": {"attribute_name": "seen", "key": "$.text"}}
        bloom = {"file": f"{root}/bloom.bin", "estimated_doc_count": 1000}
        content = {"documents": documents, "dedupe": fields, "bloom_filter": bloom}
        counts = dedupe(parse_config(content, DeduperConfig, ""), Executor())
        return counts, [
            (root / f"attributes/{name}" / Path(d).name).read_bytes() for d in documents
        ]

    def grow(root):
        path = root / "documents/part-2.jsonl"
        first = (root / "documents/part-0.jsonl").read_text().splitlines()[0]
        new = json.dumps({"id": "more", "text": "new"})
        path.write_text(f"{first}\n{new}\n" + path.read_text())

    again, fresh = copies(), copies()
    grow(fresh)
    found = []
    for root in (again, fresh):
        first, *ours, last = (f"{root}/documents/part-{i}.jsonl" for i in range(4))
        run(root, "first", [first])
        made = run(root, "ours", ours)
        run(root, "last", [last])
        if root == again:
            grow(root)
            made = run(root, "ours", ours)
        found.append((made, (root / "bloom.bin").read_bytes()))
    assert found[0] == found[1]
    (counts, _), _ = found[0]
    assert counts == {"units": 62, "duplicates": 1}


def test_another_index_of_the_same_name_is_looked_up_again(corpus):
    documents = [f"{corpus}/documents/*.jsonl"]
    index, counts = f"{corpus}/index.npz", []
    with (corpus / "documents/part-0.jsonl").open() as lines:
        text = json.loads(next(lines))["text"]
    none = "nothing that is there at all or was there"
    for questions in ([[none]], [[none]], [[text]]):
        config = parse_config({"tasks": ["made up"]}, DecontaminateConfig, "")
        write_index(config, index, lambda names, questions=questions: questions)
        counts.append(tag(documents, [f"ngram_overlap:{index}"], "c", Executor()))
    assert counts == [120, 0, 120]
    assert "contaminated" in (corpus / "attributes/c/part-0.jsonl").read_text()
    with pytest.raises(UserError, match=r"is a folder; name a file"):
        write_index(config, str(corpus), lambda names: questions)
