"""What dolma 1.2.1 made of the fixture's documents (tests/oracles/make_dolma.py), made here too."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from olmo_jax.curate.config import parse_config
from olmo_jax.curate.dedupe import dedupe
from olmo_jax.curate.dedupe_config import DeduperConfig
from olmo_jax.curate.executor import Executor
from olmo_jax.curate.mix import MixConfig, mix
from olmo_jax.curate.names import of_taggers
from olmo_jax.curate.stat import Settings, stat
from olmo_jax.curate.tag import tag

FIXTURE = Path(__file__).parent / "fixtures" / "dolma.json.xz"
NOW = Executor()


@pytest.fixture(scope="module")
def dolma():
    return json.loads(lzma.decompress(FIXTURE.read_bytes()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, dolma):
    root = tmp_path_factory.mktemp("corpus")
    (root / "documents").mkdir()
    for name, rows in zip("ab", dolma["files"], strict=True):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (root / "documents" / f"{name}.jsonl").write_text("".join(lines))
    tag([f"{root}/documents/*.jsonl"], dolma["taggers"], "dolma", NOW)
    return root


def attributes(root, experiment):
    files = [root / "attributes" / experiment / f"{name}.jsonl" for name in "ab"]
    return [json.loads(line) for file in files for line in file.open()]


def test_attributes_are_equal(dolma, corpus):
    rows = [row for file in dolma["files"] for row in file]
    ours = attributes(corpus, "dolma")
    assert [(a["id"], a["source"]) for a in ours] == [(r["id"], r["source"]) for r in rows]
    differing = {
        (row["id"], name): (found["attributes"].get(name), expected.get(name))
        for row, found, expected in zip(rows, ours, dolma["attributes"], strict=True)
        for name in found["attributes"].keys() | expected.keys()
        if found["attributes"].get(name) != expected.get(name)
    }
    assert not differing
    names = {name for row in ours for name in row["attributes"]}
    of_taggers("dolma", dolma["taggers"]).check(names, "the fixture")
    assert sum(map(len, dolma["attributes"])) > 2000


@pytest.mark.parametrize("k", [0, 1], ids=["jsonpath", "jq"])
def test_mixer_output_is_equal(dolma, corpus, tmp_path, k):
    expected = dolma["mix"][k]
    stream = expected["stream"]
    output = {**stream["output"], "path": str(tmp_path)}
    stream = {**stream, "documents": [f"{corpus}/documents/*.jsonl"], "output": output}
    config = parse_config({"streams": [stream]}, MixConfig, "test")
    counts = mix(config, NOW)[stream["name"]]
    with gzip.open(tmp_path / f"{stream['name']}-0000.jsonl.gz") as lines:
        assert [json.loads(line) for line in lines] == expected["rows"]
    assert 5 < counts["written"] == len(expected["rows"]) < counts["documents"]
    left = [n for what, n in counts.items() if what not in ("documents", "written")]
    assert counts["documents"] == sum(left)
    assert mix(config, NOW)[stream["name"]] == counts  # nothing left to do


@pytest.mark.parametrize("name", ["by_text", "by_url", "by_paragraph", "by_ngram"])
@pytest.mark.parametrize("method", ["bloom", "exact"])
def test_what_was_seen_before_is_the_same(dolma, corpus, name, method):
    expected = dolma["dedupe"][name]
    settings = {**expected["dedupe"], "method": method, "skip_empty": True}
    settings["name"] = f"{name}_{method}"
    config = {"documents": [f"{corpus}/documents/*.jsonl"], "dedupe": settings}
    counts = dedupe(parse_config(config, DeduperConfig, "test"), NOW)
    ours = [row["attributes"].get("seen") or [] for row in attributes(corpus, settings["name"])]
    theirs = [row.get("seen") or [] for row in expected["attributes"]]
    # Dolma's ends of spans are off where a text has other letters than ASCII: it mixes bytes and
    # characters. The starts name the paragraphs.
    pairs = [
        [[(s, round(score, 4)) for s, _, score in row] for row in rows] for rows in (ours, theirs)
    ]
    assert pairs[0] == pairs[1]
    assert counts["duplicates"] == sum(map(len, theirs)) > 0


def test_distributions_are_of_the_same_numbers(dolma, corpus):
    found = stat([f"{corpus}/documents/*"], None, Settings(("dolma",)), NOW, quiet=True)
    for name, row in found["attributes"].items():
        for kind in ("score", "length"):
            n, total = dolma["stat"][f"{name}/{kind}"]
            assert row[kind]["count"] == n and row[kind]["sum"] == pytest.approx(total, abs=1e-3)
    assert len(dolma["stat"]) == 2 * len(found["attributes"]) > 150
