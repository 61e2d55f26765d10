"""Taggers that dolma has not, or not so that they can be compared."""

import importlib.metadata
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_jax.curate import gopher, pii
from olmo_jax.curate.config import parse_config
from olmo_jax.curate.decontaminate import DecontaminateConfig, write_index
from olmo_jax.curate.dedupe import dedupe
from olmo_jax.curate.dedupe_config import DeduperConfig
from olmo_jax.curate.documents import Document, encode, read_attributes
from olmo_jax.curate.executor import Executor
from olmo_jax.curate.names import TYPES
from olmo_jax.curate.taggers import load_tagger, tagger_names
from olmo_jax.errors import UserError


def document(text, name="a", **metadata):
    import msgspec

    return Document(text, name, metadata=msgspec.Raw(encode(metadata)))


WORDS = st.lists(st.sampled_from(["a", "b", "cc", "ddd"]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(WORDS)
def test_ngram_shares_are_those_of_counting(words):
    found = gopher.gopher_v1(Document(" ".join(words)))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        kind = "most_common" if n < 5 else "duplicate"
        name = f"fraction_of_characters_in_{kind}_{n}grams"
        if not grams:
            assert name not in found
            continue
        size = {gram: sum(map(len, gram)) for gram in grams}
        count = {gram: grams.count(gram) for gram in dict.fromkeys(grams)}
        if n < 5:
            gram = max(count, key=count.__getitem__)  # the first of the most common
            expected = count[gram] * size[gram] / sum(map(len, words))
        else:
            repeated = sum(count[gram] * size[gram] for gram in count if count[gram] > 1)
            expected = repeated / sum(count[gram] * size[gram] for gram in count)
        assert found[name][0][2] == pytest.approx(expected)


PIECES = st.lists(st.sampled_from([*"ab@.,:( \n", "a.b@c.d", " x@y.z ", "@@"]), max_size=25)


@settings(max_examples=150, deadline=None)
@given(PIECES)
def test_the_fast_search_finds_what_the_expression_does(pieces):
    text = "".join(pieces)
    expected = [match.span() for match in pii._EMAIL.finditer(text)]
    assert [match.span() for match in pii._emails(text)] == expected


def test_a_sample_depends_on_id_and_seed_alone():
    one, other = load_tagger("random_number_v1"), load_tagger("random_number_v1:5")
    numbers = [one(document("x", str(i)))["random"][0][2] for i in range(4000)]
    assert numbers == [one(document("other", str(i)))["random"][0][2] for i in range(4000)]
    assert numbers[0] != other(document("x", "0"))["random"][0][2]
    assert 0 <= min(numbers) < 0.01 and 0.99 < max(numbers) < 1
    assert np.histogram(numbers, 4, (0, 1))[0].min() > 900
    with pytest.raises(UserError, match="must be a number"):
        load_tagger("random_number_v1:x")


def test_lists_block_addresses_sites_and_words(tmp_path):
    path = tmp_path / "list.txt"

    def blocks(name, content, text="", **metadata):
        path.write_text(content)
        return load_tagger(f"{name}:{path}")(document(text, **metadata))

    page = "# comment\n\nhttps://a.org/page/\n"
    assert blocks("url_blocklist", page, url="http://A.org/page?x=1")["url"]
    assert not blocks("url_blocklist", page, url="http://a.org/other")
    assert not blocks("url_blocklist", page)
    for entry in ("a.org", "0.0.0.0 a.org", "||a.org^", "https://a.org/x"):
        assert blocks("domain_blocklist", entry, url="https://www.A.org:80/y")["url"]
        assert not blocks("domain_blocklist", entry, url="https://ba.org/a.org")
    found = blocks("word_blocklist", "bad\nvery bad thing\n", "A Very\nbad thing, badly BAD.")
    assert found["word"] == [(2, 16, 1.0), (24, 27, 1.0)]
    with pytest.raises(UserError, match="has no entries"):
        blocks("word_blocklist", "# nothing\n")
    with pytest.raises(UserError, match="no list given"):
        load_tagger("url_blocklist")


def test_a_package_adds_a_tagger(monkeypatch):
    def make_shouting(option):
        return lambda d: {"share": [(0, len(d.text), float(option or 1) * d.text.isupper())]}

    class Entry:
        name = "shouting"

        def load(self):
            return make_shouting

    real = importlib.metadata.entry_points

    def entry_points(group, **wanted):
        if group != "olmo_jax.taggers":
            return real(group=group, **wanted)
        return [Entry()] if wanted.get("name", "shouting") == "shouting" else []

    monkeypatch.setattr("olmo_jax.curate.taggers.entry_points", entry_points)
    assert "shouting" in tagger_names()
    assert load_tagger("shouting:3")(document("LOUD"))["share"] == [(0, 4, 3.0)]


def test_a_classifier_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"no model")
    for spec in (f"fasttext:{tmp_path}/model.bin", "fasttext:none.bin", "fasttext"):
        with pytest.raises(UserError, match="model"):
            load_tagger(spec)


def test_questions_of_evaluation_sets_are_found(tmp_path):
    random.seed(1)
    words = [f"word{i}" for i in range(400)]
    questions = [" ".join(random.choices(words, k=random.randint(10, 30))) for _ in range(40)]
    (tmp_path / "sets.jsonl").write_bytes(
        b"".join(encode({"doc": {"q": text, "n": [text[:9]]}}) + b"\n" for text in questions)
    )
    config = parse_config({"against": [f"{tmp_path}/sets.jsonl"]}, DecontaminateConfig, "")
    made = write_index(config, f"{tmp_path}/index.npz")
    assert made.ngrams > 40 and (made.questions, made.too_short) == (40, 0)
    tagger = load_tagger(f"ngram_overlap:{tmp_path}/index.npz")
    for i, question in enumerate(questions):
        before = " ".join(random.choices(words, k=50))
        before += " in \u0130zmir" * (i % 2)  # whose small letter is two characters
        planted = f"{before}. {question.upper().replace(' ', ',  ')}? {before}"
        [(start, end, _)] = tagger(document(planted))["contaminated"]
        assert planted[start:end].replace(",  ", " ").lower() == question
        assert "contaminated" not in tagger(document(before))
    assert tagger(document(""))["doc_frac"] == [(0, 0, 0.0)]
    city = "one two three four five six seven \u0130zmir"
    (tmp_path / "city.jsonl").write_bytes(encode({"q": city}))
    config = parse_config({"against": [f"{tmp_path}/city.jsonl"]}, DecontaminateConfig, "")
    write_index(config, f"{tmp_path}/city.npz")
    found = load_tagger(f"ngram_overlap:{tmp_path}/city.npz")(document(f"So {city.title()}"))
    assert found["contaminated"] == [(3, 3 + len(city), 1.0)]
    short = {"against": [f"{tmp_path}/sets.jsonl"], "fields": ["answer"]}
    with pytest.raises(UserError, match="no text of 8 words or more in the fields answer"):
        write_index(parse_config(short, DecontaminateConfig, ""), f"{tmp_path}/x.npz")


def test_near_duplicates_are_found_and_others_are_not(tmp_path, write_documents):
    random.seed(2)
    words = [f"word{i}" for i in range(2000)]
    originals = [random.choices(words, k=300) for _ in range(60)]
    editions = []
    for text in originals[:20]:
        edition = list(text)
        for place in random.sample(range(300), 6):
            edition[place] = "changed"
        editions.append(edition)
    write_documents("a.jsonl", [" ".join(text) for text in originals])
    write_documents("b.jsonl", [" ".join(text) for text in editions])
    settings = {"name": "near", "method": "minhash"}
    settings["documents"] = {"attribute_name": "near", "key": "$.text"}
    config = {"documents": [f"{tmp_path}/documents/*.jsonl"], "dedupe": settings}
    dedupe(parse_config(config, DeduperConfig, ""), Executor())
    marked = [
        ["near" in row.attributes for row in read_attributes(f"{tmp_path}/attributes/near/{name}")]
        for name in ("a.jsonl", "b.jsonl")
    ]
    print(f"recall {sum(marked[1]) / 20:.2f}, wrongly marked {sum(marked[0])} of 60")
    assert sum(marked[1]) >= 19 and sum(marked[0]) == 0
    wrong = {**config, "dedupe": {**settings, "documents": {"attribute_name": "x", "key": "$.id"}}}
    with pytest.raises(UserError, match="minhash compares documents by their text"):
        parse_config(wrong, DeduperConfig, "test")


def test_a_bloom_filter_is_kept_and_compared_with_later(tmp_path, write_documents):
    write_documents("a.jsonl", ["one", "two", "one"])

    def marks(name, read_only=False):
        config = {
            "documents": [f"{tmp_path}/documents/a.jsonl"],
            "dedupe": {"name": name, "documents": {"attribute_name": "seen", "key": "$.text"}},
            "bloom_filter": {"file": f"{tmp_path}/seen.bloom", "read_only": read_only},
        }
        dedupe(parse_config(config, DeduperConfig, ""), Executor())
        path = f"{tmp_path}/attributes/{name}/a.jsonl"
        return ["seen" in row.attributes for row in read_attributes(path)]

    with pytest.raises(UserError, match="no such Bloom filter"):
        marks("none", read_only=True)
    assert marks("first") == [False, False, True]
    before = (tmp_path / "seen.bloom").read_bytes()
    write_documents("a.jsonl", ["two", "three", "three"])
    assert marks("second", read_only=True) == [True, False, False]
    assert (tmp_path / "seen.bloom").read_bytes() == before
    assert marks("third") == [True, False, True]
    assert marks("third") == [True, False, True]  # nothing left to do


def test_every_tagger_of_ours_has_its_types_listed():
    open_ones = {"fasttext"}
    assert set(tagger_names()) - open_ones == set(TYPES)
    for name in ("repetitions_v1", "pii_regex_v1", "pii_regex_with_counts_v2", "random_number_v1"):
        found = load_tagger(name)(document("ab ab ab ab ab to a.b@c.org or 10.1.1.1 \n"))
        assert set(found) <= set(TYPES[name])
