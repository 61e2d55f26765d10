"""From JSONL to token files and back, and a tokenizer that loses nothing."""

import gzip
import json

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from olmo_jax.curate.executor import Executor, job_runner
from olmo_jax.data import DataConfig, open_dataset
from olmo_jax.data.inspect import describe_instance
from olmo_jax.data.tokenize import tokenize_documents
from olmo_jax.data.tokenizer import load_tokenizer, token_bytes, train_tokenizer
from olmo_jax.errors import UserError

TEXTS = [
    "  # ACT I\n\n**First Witch**  \nWhen shall we three meet again\n\n",
    "",
    " \n ",
    "In thunder, lightning, or in rain? <|endoftext|>",
    "naïve café — 漢字 🙂 \u2028 line",
    "word " * 300,
]


def jsonl(texts=TEXTS) -> bytes:
    rows = [{"id": f"d{k}", "text": t, "source": "x"} for k, t in enumerate(texts)]
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_bytes(jsonl())
    return train_tokenizer([str(folder / "a.jsonl")], folder / "tokenizer.json", 300)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_is_deterministic_and_gives_the_special_ids(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    seen = []
    again = train_tokenizer(
        [str(tmp_path / "a.jsonl")], tmp_path / "t.json", 300, lambda *p: seen.append(p)
    )
    assert again.to_str() == tokenizer.to_str() == load_tokenizer(tmp_path / "t.json").to_str()
    assert again.get_vocab_size() == 300
    assert [again.token_to_id(t) for t in ("<|endoftext|>", "<|padding|>")] == [0, 1]
    assert seen[-1] == (len(jsonl()), len(jsonl()))
    with pytest.raises(UserError, match="at least 258"):
        train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t.json", 257)


def test_long_runs_without_letters_stay_fast(tokenizer):
    # A pattern that searches ahead for a line end without a bound takes minutes here.
    assert len(tokenizer.encode("- " * 100_000).ids) > 0


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_documents_come_back_stripped_with_one_eos(tmp_path, tokenizer, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress[suffix](jsonl()))
    progress = []
    done = tokenize_documents(
        [str(path)], tmp_path / "out", tokenizer, progress=lambda *p: progress.append(p)
    )
    (file,) = done.files
    rows = file.documents()
    assert (done.documents, done.skipped, done.eos_token_id) == (4, 2, 0)
    assert [(r.id, r.src, r.loc) for r in rows] == [
        (f"d{k}", str(path), k + 1) for k in (0, 3, 4, 5)
    ]
    assert progress[-1] == (path.stat().st_size, path.stat().st_size)
    assert done.tokens == file.size == rows[-1].end
    for row in rows:
        ids = file.tokens[row.start : row.end].tolist()
        assert ids.count(0) == 1 and ids[-1] == 0
        text = TEXTS[row.loc - 1].strip().removesuffix("<|endoftext|>")
        assert tokenizer.decode(ids[:-1]) == text


def test_a_document_is_never_split_across_files(tmp_path, tokenizer):
    texts = [f"document {k} " * (1 + 7 * (k % 5)) for k in range(40)] + ["long " * 2000]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    whole = tokenize_documents([str(tmp_path / "a.jsonl")], tmp_path / "one", tokenizer)
    parts = tokenize_documents(
        [str(tmp_path / "a.jsonl")], tmp_path / "many", tokenizer, max_tokens_per_file=500
    )
    again = tokenize_documents(
        [str(tmp_path / "a.jsonl")], tmp_path / "again", tokenizer, max_tokens_per_file=500
    )
    assert len(parts.files) > 3
    assert all(f.size <= 500 or len(f.documents()) == 1 for f in parts.files)
    joined = np.concatenate([f.tokens for f in parts.files])
    assert np.array_equal(joined, whole.files[0].tokens)
    many, twice = (sorted((tmp_path / name).iterdir()) for name in ("many", "again"))
    assert [f.read_bytes() for f in many] == [f.read_bytes() for f in twice]
    assert len(again.files) == len(parts.files)


def test_mistakes_leave_nothing_behind(tmp_path, tokenizer):
    def run(text, **settings):
        (tmp_path / "a.jsonl").write_bytes(text)
        with pytest.raises(UserError) as error:
            tokenize_documents([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, **settings)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
        return str(error.value)

    assert "a.jsonl: line 7 is not JSON" in run(jsonl() + b"{oops\n")
    assert "line 1 has no string 'text'" in run(b'{"id": "x"}\n')
    assert "line 1 is not UTF-8" in run(b"\xff\xfe\n")
    assert "no text in" in run(b"\n")
    assert "no token '<eos>'; its special tokens are <|endoftext|>, <|padding|>" in run(
        jsonl(), eos_token="<eos>"
    )
    for name, content, message in (
        ("none.json", None, "no such tokenizer"),
        ("bad.json", b"{}", "not a tokenizer"),
    ):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="no such documents file"):
        tokenize_documents([str(tmp_path / "b.jsonl")], tmp_path / "out", tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        tokenize_documents([str(tmp_path / "a.jsonl")], tmp_path / "full", tokenizer)


def test_an_instance_is_shown_with_its_documents(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    done = tokenize_documents([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer)
    config = DataConfig(
        paths=(str(tmp_path / "out" / "*.npy"),),
        sequence_length=32,
        order="sequential",
        batch_size=1,
    )
    dataset = open_dataset(config, tokenizer.get_vocab_size())
    shown = describe_instance(dataset, 1, tokenizer)
    assert f"{done.files[0].path} tokens [32, 64)" in shown
    documents = dataset.where(1)[0].documents
    assert documents
    for d in documents:
        assert f"[{d.start}, {d.end}) {d.id}  {tmp_path}/a.jsonl:{d.loc}" in shown
    assert tokenizer.decode(done.files[0].tokens[32:64].tolist(), False) in shown
    assert "(from 0), step 2 (from 1): " in shown


def test_without_stripping_every_byte_is_counted(tmp_path, tokenizer):
    text = "  a first line\n\nénd \n"
    documents = tmp_path / "a.jsonl"
    documents.write_text(json.dumps({"id": "a", "text": text}) + "\n")
    bytes_V = token_bytes(tokenizer)
    for strip, expected in ((False, text), (True, text.strip())):
        out = tokenize_documents([str(documents)], tmp_path / str(strip), tokenizer, strip=strip)
        assert bytes_V[out.files[0].tokens].sum() == len(expected.encode())


def test_workers_and_kills_change_no_byte(tmp_path, tokenizer):
    for k in range(4):
        texts = [f"file {k} document {i} " * (1 + (7 * i + k) % 9) for i in range(30)]
        (tmp_path / f"{k}.jsonl").write_bytes(jsonl(texts))
    inputs = [str(tmp_path / f"{k}.jsonl") for k in range(4)]

    def run(name, workers, **settings):
        runner = job_runner(Executor(workers=workers), "tokenizing", quiet=True)
        done = tokenize_documents(
            inputs, tmp_path / name, tokenizer, max_tokens_per_file=2000, run=runner, **settings
        )
        files = {p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())}
        return done, files

    done, one = run("one", 1, seed=7)
    assert run("two", 2, seed=7)[1] == run("four", 4, seed=7)[1] == one
    assert run("other", 1, seed=8)[1] != one
    ordered, _ = run("ordered", 1)
    plain = tokenize_documents(inputs, tmp_path / "plain", tokenizer, max_tokens_per_file=2000)
    assert [f.size for f in plain.files] == [f.size for f in ordered.files]
    sizes = [f.size for f in done.files]
    longest = max(r.end - r.start for f in done.files for r in f.documents())
    assert len(sizes) > 2 and max(sizes) - min(sizes) <= longest * len(sizes)
    documents = [(r.src, r.loc) for f in done.files for r in f.documents()]
    assert sorted(documents) == sorted((path, i + 1) for path in inputs for i in range(30))
    assert documents != sorted(documents)

    (tmp_path / "3.jsonl").write_bytes(jsonl(["fine"]) + b"{oops")
    with pytest.raises(UserError, match=r"3.jsonl: line 2 is not JSON"):
        run("again", 1)
    [parts] = tmp_path.glob(".again.*.parts")
    assert len(list(parts.glob("*.npy"))) == 3 and not (tmp_path / "again").exists()
    (tmp_path / "3.jsonl").write_bytes(jsonl(["fine"]))
    assert run("again", 1)[0].documents == 91
    assert not list(tmp_path.glob(".again*"))
