"""Perplexity by domain equals a few lines of transformers; intervals are what they say."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
import zstandard
from exported import FAMILIES, TEXT, export, model_of, transformers_model

import olmo_jax
from olmo_jax import cli
from olmo_jax.convert.load import load_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.eval.domains import (
    Document,
    bits_per_byte,
    evaluate,
    resampled_sums,
    score_documents,
    summarize,
    windows,
)
from olmo_jax.eval.scoring import Scorer

ROWS = [
    {"text": TEXT * 12, "source": "plays", "id": "1"},  # several windows
    {"text": "né 漢字", "source": "words"},
    {"text": "", "source": "words"},
    {"text": "Tomorrow creeps. " * 5, "source": "plays"},
    {"text": "a", "source": "words"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(model_of(FAMILIES["olmo2"]), tmp_path_factory.mktemp("domains") / "model")


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def scored(folder):
    """The documents' figures, read from a .gz and a .zst file."""
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[:3])))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines(ROWS[3:])))
    paths = [str(folder / name) for name in ("a.jsonl.gz", "b.jsonl.zst")]
    tokenizer, eos = load_tokenizer(folder)
    (block,) = score_documents(Scorer(olmo_jax.load(folder)), tokenizer, eos, paths)
    return block


def reference(theirs, tokenizer, eos, text) -> tuple[float, int]:
    """Nats and tokens of one document, in windows of the model's length without overlap."""
    ids = [eos, *tokenizer.encode(text).ids]
    nats, length = 0.0, theirs.config.max_position_embeddings
    for start in range(0, len(ids) - 1, length):
        piece = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            logits = theirs(piece[:, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
    return nats, len(ids) - 1


def test_documents_and_domains_equal_transformers(folder, scored):
    theirs = transformers_model(folder)
    tokenizer, eos = load_tokenizer(folder)
    kept = [row for row in ROWS if row["text"]]
    assert [d.domain for d in scored] == [row["source"] for row in kept]
    assert [d.where for d in scored] == [
        f"{n}:{i}"
        for n, i in [("a.jsonl.gz", 1), ("a.jsonl.gz", 2), ("b.jsonl.zst", 1), ("b.jsonl.zst", 2)]
    ]
    nats, tokens, sizes = {}, {}, {}
    for row, document in zip(kept, scored, strict=True):
        n, t = reference(theirs, tokenizer, eos, row["text"])
        size = len(row["text"].encode())
        assert document.nats == pytest.approx(n, rel=1e-5)
        assert (document.tokens, document.bytes) == (t, size)
        for sums, value in ((nats, n), (tokens, t), (sizes, size)):
            sums[row["source"]] = sums.get(row["source"], 0) + value
    assert tokens["plays"] > 2 * theirs.config.max_position_embeddings
    found = summarize(scored)
    assert set(found["domains"]) == {"plays", "words"}
    bits = {d: nats[d] / math.log(2) / sizes[d] for d in nats}
    perplexities = {d: math.exp(nats[d] / tokens[d]) for d in nats}
    for domain, row in found["domains"].items():
        assert row["bits_per_byte"] == pytest.approx(bits[domain], rel=1e-5)
        assert row["perplexity"] == pytest.approx(perplexities[domain], rel=1e-4)
        assert row["documents"] == 2
    total = sum(nats.values()) / math.log(2) / sum(sizes.values())
    assert found["micro"]["bits_per_byte"] == pytest.approx(total, rel=1e-5)
    assert found["macro"]["bits_per_byte"] == pytest.approx(np.mean(list(bits.values())), rel=1e-5)
    mean = np.mean(list(perplexities.values()))
    assert found["macro"]["perplexity"] == pytest.approx(mean, rel=1e-4)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("olmo_jax.eval.domains._BLOCK", 2)
    rows = [row | {"text": row["text"] or "x"} for row in ROWS] + ROWS[3:]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    tokenizer, eos = load_tokenizer(folder)
    scorer = Scorer(olmo_jax.load(folder))
    blocks = []

    def run(out, after=None):
        def count(done, total):
            blocks.append(done)
            if len(blocks) == after:
                raise KeyboardInterrupt

        blocks.clear()
        paths, name = [str(tmp_path / "a.jsonl")], "m"
        return evaluate(
            scorer, tokenizer, eos, paths, name=name, out=tmp_path / out, progress=count
        )

    whole = run("whole.json")
    assert len(blocks) == 4
    with pytest.raises(KeyboardInterrupt):
        run("killed.json", after=3)
    with open(tmp_path / "killed.json.part", "ab") as file:
        file.write(b'[["plays", "a')  # a kill in the middle of a line
    assert not (tmp_path / "killed.json").exists()
    run("killed.json")
    assert len(blocks) == 1  # of four, three were there
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "killed.json.part").exists()
    saved = json.loads((tmp_path / "whole.json").read_text())
    assert saved["micro"] == whole["micro"] and len(saved["documents"]) == 7


def test_the_command_prints_each_domain(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    out = tmp_path / "x.json"
    command = ["eval", str(folder), f"--domains={tmp_path / 'a.jsonl'}", f"--out={out}"]
    assert cli.run(command) == 0
    shown = capsys.readouterr().out
    saved = json.loads(out.read_text())
    for row in (*saved["domains"].values(), saved["micro"], saved["macro"]):
        assert f"{row['bits_per_byte']:.4f}" in shown


def test_every_id_but_the_first_is_scored_once():
    ids = list(range(100))
    pairs = list(windows(ids, 32))
    assert [i for pair in pairs for i in pair.continuation] == ids[1:]
    assert all(len(pair.continuation) <= 32 for pair in pairs)


def test_intervals_have_the_bootstraps_mean_and_spread():
    rng = np.random.default_rng(1)
    values = rng.exponential(size=(50, 3))
    drawn = resampled_sums(values, np.random.default_rng(0))
    spread = values.std(axis=0) * math.sqrt(50)
    assert np.allclose(drawn.mean(axis=0), values.sum(axis=0), atol=4 * spread.max() / 1000**0.5)
    assert np.allclose(drawn.std(axis=0), spread, rtol=0.12)  # 5 deviations of 1000 draws' spread

    documents = [Document("d", str(i), 90 + 20 * rng.random(), 40, 50) for i in range(30)]
    found, again = summarize(documents, seed=3), summarize(documents, seed=3)
    assert found == again
    low, high = found["domains"]["d"]["bits_per_byte_interval"]
    assert low < found["domains"]["d"]["bits_per_byte"] < high
    sums = np.array([(d.nats, d.tokens, d.bytes) for d in documents])
    # Equal sizes: the figure is a mean, whose interval is about 1.96 standard errors each way.
    error = sums[:, 0].std() / math.sqrt(30) / math.log(2) / 50
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    assert bits_per_byte(sums.sum(axis=0)) == found["micro"]["bits_per_byte"]


def test_what_cannot_be_scored_is_refused(folder, tmp_path):
    tokenizer, eos = load_tokenizer(folder)
    scorer = Scorer(olmo_jax.load(folder))
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines([{"text": "a"}]))
    with pytest.raises(UserError, match=r"x.jsonl: line 1 has no string 'subdomain'"):
        list(score_documents(scorer, tokenizer, eos, [str(path)], "subdomain"))
    with pytest.raises(UserError, match="no end-of-text token"):
        list(score_documents(scorer, tokenizer, None, [str(path)]))
    with pytest.raises(UserError, match="no documents"):
        summarize([])
