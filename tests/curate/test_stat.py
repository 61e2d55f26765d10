"""What `data stat` says is what is there, within the error it tells, for any number of workers."""

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo_jax import cli
from olmo_jax.curate import findings, frequent, histogram, repeats
from olmo_jax.curate.executor import Executor
from olmo_jax.curate.frequent import Frequent, ngram_counts
from olmo_jax.curate.histogram import Histogram
from olmo_jax.curate.stat import Settings, stat
from olmo_jax.curate.stat_page import page
from olmo_jax.curate.tag import tag
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.errors import UserError

TEXTS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=30), min_size=1, max_size=8)


@pytest.fixture
def small(monkeypatch):
    """Everything that is bounded, bounded tightly."""
    monkeypatch.setattr(frequent, "CAPACITY", 5)
    monkeypatch.setattr(histogram, "EXACT", 10)
    monkeypatch.setattr(repeats, "RUN", 50)
    monkeypatch.setattr(repeats, "PART", 64)
    monkeypatch.setattr(findings, "_CHUNK_WORDS", 300)


@given(TEXTS, TEXTS, st.integers(1, 3))
def test_a_count_is_off_by_no_more_than_it_says(first, second, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frequent, "CAPACITY", 5)
        true, merged = Counter(), Frequent()
        for texts in (first, second):
            part = Frequent()
            for half in (texts[::2], texts[1::2]):
                words = [word for text in half for word in text]
                document_W = np.repeat(np.arange(len(half)), list(map(len, half)))
                part.add(*ngram_counts(words, document_W, [n])[n])
            merged.merge(json.loads(json.dumps(part.content())))
            for text in texts:
                true.update(" ".join(text[k : k + n]) for k in range(len(text) - n + 1))
    assert merged.total == true.total() and len(merged.entries) <= 5
    for gram, count in true.items():
        low, missed = merged.entries.get(gram, (0, merged.bound))
        assert low <= count <= low + missed
    assert merged.entries.keys() <= true.keys()
    if len(true) <= 5:
        assert {gram: count for gram, (count, _) in merged.entries.items()} == true


def test_a_histogram_knows_its_quantiles():
    values = np.random.default_rng(0).lognormal(3, 2, 20_000)
    parts = [Histogram() for _ in range(3)]
    for part, some in zip(parts, np.array_split(values, [100, 9000]), strict=True):
        part.add(some.tolist())
    parts[0].merge(parts[1].content())
    parts[0].merge(json.loads(json.dumps(parts[2].content())))
    found = parts[0].summary()
    assert (found["count"], found["min"], found["max"]) == (20_000, values.min(), values.max())
    assert found["mean"] == pytest.approx(values.mean()) and not found["is_exact"]
    for q, value in found["quantiles"].items():
        assert value == pytest.approx(np.quantile(values, float(q)), rel=0.01)
    expected, _ = np.histogram(values, found["edges"])
    assert np.abs(np.subtract(found["counts"], expected)).max() < 100
    assert sum(found["counts"]) == 20_000 and len(found["counts"]) < 60


@pytest.fixture
def big(corpus, write_documents):
    """The corpus with addresses, a second source and copies."""
    random.seed(1)
    first = (corpus / "documents/part-0.jsonl").read_text().splitlines()
    again = [json.loads(line)["text"] for line in first[:7]]
    write_documents("web.jsonl", [*again, ""], metadata={"url": "https://www.a.example/x"})
    write_documents("more.jsonl", ["one two\none two\n  one two "], url="http://b.example:80/")
    return corpus


def test_what_it_says_is_there(big):
    found = stat([f"{big}/documents/*"], None, Settings(), Executor(), quiet=True)
    rows = [json.loads(x) for p in (big / "documents").iterdir() for x in p.open()]
    texts = [row["text"] for row in rows]
    made = found["sources"]["made"]
    assert (made["documents"], found["sources"]["(none)"]["empty"]) == (120, 1)
    assert found["total"]["bytes"] == sum(len(text.encode()) for text in texts)
    lines = Counter(s for text in texts for x in text.split("\n") if (s := x.strip()))
    copies = found["duplicates"]["paragraphs"]
    assert (copies["different"], copies["repeats"]) == (len(lines), lines.total() - len(lines))
    assert copies["times"]["max"] == max(lines.values())
    assert [i["count"] for i in copies["most_repeated"]["items"][:3]] == sorted(lines.values())[
        : -3 - 1 : -1
    ]
    copies = found["duplicates"]["documents"]
    assert copies["repeats"] == 7  # in another file
    twice = [text for text, n in Counter(texts).items() if n == 2]
    told = {item["item"]: item["count"] for item in copies["most_repeated"]["items"]}
    assert told == {" ".join(text[:160].split()): 2 for text in twice} and len(told) == 7
    grams = Counter()
    for words in map(str.split, texts):
        grams.update(" ".join(words[k : k + 3]) for k in range(len(words) - 2))
    told = {item["item"]: item["count"] for item in found["ngrams"]["3"]["items"]}
    assert len(told) == 100 and all(grams[gram] == count for gram, count in told.items())
    assert min(told.values()) >= sorted(grams.values())[-100]
    domains = {item["item"]: item["count"] for item in found["domains"]["items"]}
    assert domains == {"a.example": 8, "b.example": 1}


def test_any_number_of_workers_says_the_same(big, write_documents):
    write_documents("long.jsonl", [" ".join(str(k * k % 9973) for k in range(20_000))])
    documents = [f"{big}/documents/*"]
    found = [stat(documents, None, Settings(), Executor(workers=n), quiet=True) for n in (1, 3)]
    assert found[0] == found[1]
    assert found[0]["ngrams"]["10"]["others_at_most"] > 0  # the memory was not enough for all


def test_interruptions_change_nothing(big, tmp_path, small):
    documents = [f"{big}/documents/*"]
    tag(documents, ["gopher_v1", "cld2_en_doc_v2"], "rules", Executor(), quiet=True)
    settings = Settings(("rules",))
    one = stat(documents, tmp_path / "one.json", settings, Executor(), quiet=True)
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads(json.dumps(one))
    assert one["ngrams"]["3"]["others_at_most"] > 0  # the bounds were met
    parts = sorted((tmp_path / "one.parts").glob("*.paragraphs.*-*.json"))
    assert len(parts) > 4
    scores = one["attributes"]["rules__gopher_v1__word_count"]["score"]
    assert (scores["count"], scores["sum"]) == (129, one["total"]["words"])
    labels = one["languages"]["rules__cld2_en_doc_v2"]
    assert sum(documents for documents, _ in labels.values()) == 129

    broken = big / "documents/part-1.jsonl"
    content = broken.read_text()
    broken.write_text("{oops")
    with pytest.raises(UserError, match=r"part-1.jsonl: line 1 is no document"):
        stat(documents, tmp_path / "two.json", settings, Executor(retries=0), quiet=True)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "two.parts").glob("*.zst")}
    broken.write_text(content)
    tag(documents, ["gopher_v1", "cld2_en_doc_v2"], "rules", Executor(), quiet=True)
    assert stat(documents, tmp_path / "two.json", settings, Executor(), quiet=True) == one
    kept = [path for path, written in before.items() if path.stat().st_mtime_ns == written]
    assert len(before) == 5 and len(kept) == 5  # what was done is not done again
    with pytest.raises(UserError, match="was made with another attributes"):
        stat(documents, tmp_path / "two.json", Settings(), Executor())


def test_tokens_are_those_of_the_tokenizer_as_it_is_now(write_documents, tmp_path):
    path = str(write_documents("a.jsonl", ["one two three " * 20]))
    counts = []
    for size in (258, 300):
        train_tokenizer([path], tmp_path / "tokenizer.json", size)
        settings = Settings(tokenizer=str(tmp_path))
        found = stat([path], tmp_path / "x.json", settings, Executor(), quiet=True)
        counts.append(found["total"]["tokens"])
    assert counts[0] == len("one two three " * 20) > counts[1]


def test_the_page_escapes_and_shows_everything(write_documents):
    path = write_documents("a.jsonl", ["<script>alert(1)</script> word"] * 2 + ["other " * 300])
    found = stat([str(path)], None, Settings(), Executor(), quiet=True)
    html = page(found, "a & b")
    empty = write_documents("empty.jsonl", [])
    found = stat([str(empty)], None, Settings(), Executor(), quiet=True)
    assert found["total"]["documents"] == 0 and "Sources" in page(found, "nothing")
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &amp; b" in html
    assert html.count("<rect") >= 2 and "Repeated documents" in html


def test_the_terminal_shows_brackets_as_they_are(write_documents, capsys):
    path = write_documents("a.jsonl", ["[/quote] [red] :smile:"] * 2, source="[b]")
    assert cli.run(["data", "stat", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "[/quote] [red] :smile:" in shown and "[b]" in shown


def test_a_page_that_cannot_be_written_is_one_line(write_documents, tmp_path):
    path = write_documents("a.jsonl", ["word"])
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*x.json"):
        stat([str(path)], tmp_path / "x.json", Settings(), Executor(), quiet=True)


def test_no_accelerator_library_is_loaded():
    program = "import sys, olmo_jax.curate.stat_page, olmo_jax.curate.stat;"
    program += "sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
