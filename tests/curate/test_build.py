"""A recipe from documents to tokens: planted duplicates, addresses and test questions are gone."""

import gzip
import json

import pytest
import yaml

from olmo_jax.curate.build import build
from olmo_jax.curate.executor import Executor
from olmo_jax.data import DataConfig, open_dataset
from olmo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from olmo_jax.errors import UserError

QUESTION = "Which of the two kings of the far island was the first to build a bridge of stone"
PLAY = " ".join(f"line{i} speaks of thing{i * 7 % 90}" for i in range(300))
EDITION = PLAY.replace("line17 ", "line XVII ").replace("thing84", "Thing-84", 1)


@pytest.fixture
def recipe(tmp_path):
    texts = [" ".join(f"word{i * k % 97}" for i in range(40 + k)) for k in range(1, 40)]
    planted = {
        "play": PLAY,
        "edition": EDITION,
        "copy": texts[3],
        "leak": f"{texts[5]} {QUESTION.upper()}? {texts[6]}",
        "mail": f"{texts[7]} write to some.body@example.org or so {texts[8]}",
        "short": "too short",
    }
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"id": name, "text": text} for name, text in planted.items()]
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    )
    (tmp_path / "questions.jsonl").write_text(json.dumps({"q": {"stem": QUESTION + "?"}, "n": 1}))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]
    train_tokenizer(files, tmp_path / "tokenizer.json", 300)
    return {
        "out": str(tmp_path / "built"),
        "sources": {"plain": {"documents": files[:1]}, "odd": {"documents": files[1:]}},
        "tag": ["gopher_v1", "pii_regex_with_counts_fast_v2"],
        "dedupe": [
            {
                "name": "near",
                "method": "minhash",
                "documents": {"attribute_name": "near_duplicate", "key": "$.text"},
            }
        ],
        "decontaminate": {"against": [str(tmp_path / "questions.jsonl")]},
        "filter": {
            "exclude": [
                "$.attributes[?(@.tags__gopher_v1__word_count[0][2] < 10)]",
                "$.attributes[?(@.near_duplicate)]",
                "$.attributes[?(@.contamination__ngram_overlap__contaminated)]",
            ]
        },
        "span_replacement": [
            {
                "span": "$.attributes.tags__pii_regex_with_counts_fast_v2__EMAIL_ADDRESS",
                "min_score": 0.5,
                "replacement": " |||EMAIL_ADDRESS||| ",
            }
        ],
        "tokenize": {"tokenizer": str(tmp_path / "tokenizer.json"), "max_tokens_per_file": 4000},
    }


def test_a_recipe_gives_clean_tokens_and_a_card(recipe, tmp_path):
    facts = build(recipe, "recipe.yaml", Executor())
    odd = facts["mix"]["odd"]
    assert (odd["documents"], odd["kept"], facts["mix"]["plain"]["kept"]) == (6, 2, 39)
    assert [n for what, n in odd.items() if what.startswith("filtered")] == [1, 2, 1]
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    pattern = f"{tmp_path}/built/tokens/*.npy"
    config = DataConfig(paths=(pattern,), sequence_length=16, batch_size=1)
    [source] = open_dataset(config, tokenizer.get_vocab_size()).sources
    text = "".join(tokenizer.decode(file.tokens[:].tolist(), False) for file in source.files)
    assert QUESTION.upper() not in text and "too short" not in text
    assert "some.body" not in text and "|||EMAIL_ADDRESS|||" in text
    assert "line17 speaks" in text and "line XVII" not in text
    card = (tmp_path / "built/README.md").read_text()
    assert facts["tokens"]["fingerprint"] in card and "filtered by" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["sources"]["odd"]
    again = build(recipe, "recipe.yaml", Executor(workers=2))
    assert again["tokens"] == facts["tokens"] and again["mix"] == facts["mix"]


def test_evaluation_sets_and_a_tokenizer_that_changed_are_taken_up(recipe, tmp_path):
    facts = build(recipe, "recipe.yaml", Executor(), quiet=True)
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"q": " ".join(PLAY.split()[:20])}))
    again = build(recipe, "recipe.yaml", Executor(), quiet=True)
    assert again["mix"]["odd"]["kept"] == facts["mix"]["odd"]["kept"] - 1
    train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "tokenizer.json", 270)
    last = build(recipe, "recipe.yaml", Executor(), quiet=True)
    assert last["mix"] == again["mix"]
    assert last["tokens"]["tokens"] > again["tokens"]["tokens"]


def test_mistakes_in_a_recipe_come_out_first(recipe, tmp_path):
    for changes, message in (
        ({"tokenise": 1}, "tokenise is no field"),
        ({"filter": {"exclude": ["$.a[?("]}}, "cannot be read from character"),
        ({"sources": {}}, "sources"),
        ({"filter": {"exclude": ["$.attributes.near_duplicat"]}}, "did you mean near_duplicate"),
        ({"dedupe": recipe["dedupe"] * 2}, "names of their own"),
    ):
        with pytest.raises(UserError, match=message):
            build(recipe | changes | {"out": str(tmp_path / "new")}, "recipe.yaml", Executor())
    build(recipe, "recipe.yaml", Executor())
    with pytest.raises(UserError, match="was made with another recipe"):
        build(recipe | {"min_text_length": 5}, "recipe.yaml", Executor())
