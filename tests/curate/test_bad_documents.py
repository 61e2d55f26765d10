"""Rubbish in: reported with file and line, and nothing else lost."""

import gzip
import json
import tracemalloc

import pyarrow.parquet
import pytest

from olmo_jax.curate.config import parse_config
from olmo_jax.curate.dedupe import dedupe
from olmo_jax.curate.dedupe_config import DeduperConfig
from olmo_jax.curate.documents import find_documents, read_documents, writing
from olmo_jax.curate.executor import Executor
from olmo_jax.curate.filters import compile_expression
from olmo_jax.curate.mix import MixConfig, mix
from olmo_jax.curate.tag import tag
from olmo_jax.curate.taggers import load_tagger
from olmo_jax.data import documents as reading
from olmo_jax.errors import UserError

GOOD = b'{"id": "a", "text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("half.jsonl", GOOD + b'{"id": "b", "te', "half.jsonl: line 2 is no document"),
        ("utf8.jsonl", GOOD + b'{"id": "b", "text": "\xff"}', "utf8.jsonl: line 2 is no document"),
        ("none.jsonl", GOOD + b'{"id": "b"}', "line 2 is no document: .*text"),
        ("noid.jsonl", GOOD + b'{"text": "b"}', "line 2 has no string 'id'"),
        ("list.jsonl", GOOD + b"[1]", "line 2 is no document"),
        ("cut.jsonl.gz", gzip.compress(GOOD * 999)[:-20], r"cut.jsonl.gz: cannot be read after"),
        ("no.jsonl.gz", b"no gzip", "cannot be read after line 0"),
        ("no.jsonl.zst", b"no zstd", "cannot be read after line 0"),
    ],
)
def test_rubbish_is_named_and_the_other_files_are_done(tmp_path, name, content, message):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "documents" / name).write_bytes(content)
    (tmp_path / "documents" / "z.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=message):
        tag([f"{tmp_path}/documents/*"], ["char_length_v1"], "x", Executor())
    done = sorted(path.name for path in (tmp_path / "attributes/x").glob("*.jsonl*"))
    assert done == ["a.jsonl", "z.jsonl"]


def test_an_endless_line_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b'{"text": "' + b"x" * (64 << 20), 1))
    tracemalloc.start()
    with pytest.raises(UserError, match="line 2 is longer than 1 MiB"):
        list(read_documents(str(path)))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_an_empty_file_and_equal_ids_are_fine(tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "empty.jsonl").touch()
    (tmp_path / "documents" / "same.jsonl").write_bytes(GOOD * 2 + b"\n\n" + GOOD)
    assert tag([f"{tmp_path}/documents/*"], ["char_length_v1"], "x", Executor()) == 3
    assert (tmp_path / "attributes/x/empty.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("expression", "syntax"),
    [
        ("__import__('os').system('touch /tmp/x')", "jsonpath"),
        ("$.attributes[?(__import__('os'))]", "jsonpath"),
        ("$.attributes[?(@.a.__class__())]", "jsonpath"),
        ("$.attributes[?(@.a > )]", "jsonpath"),
        ("$.attributes[?(@.a", "jsonpath"),
        ("$.a b", "jsonpath"),
        ("", "jsonpath"),
        ('import "x" as x; .', "jq"),
        (".a | system", "jq"),
        (".a", "python"),
    ],
)
def test_code_in_a_filter_is_refused(expression, syntax):
    with pytest.raises(UserError):
        compile_expression(expression, syntax)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("$.a.b", [[1, 2.5]]),
        ("$.a.b[0]", [1]),
        ("$.a['b'][-1]", [2.5]),
        ("$.a.b[*]", [1, 2.5]),
        ("$.c", []),
        ("$.a.b[7]", []),
        ("$.list[?(@.n > 1)].n", [2, 3]),
        ("$.list[?(@.n >= 2 && !(@.n == 3))].n", [2]),
        ("$.list[?(@.n == 1 || @.name == 'x')].n", [1, 3]),
        ("$.list[?(@.n == $.a.b[0])].n", [1]),
        ("$.list[?(@.name)].n", [3]),
        ("$.list[?(@.n > 'a')].n", []),
    ],
)
def test_jsonpath(expression, found):
    document = {"a": {"b": [1, 2.5]}, "list": [{"n": 1}, {"n": 2}, {"n": 3, "name": "x"}]}
    assert compile_expression(expression, "jsonpath")(document) == found


def test_missing_attributes_are_named(tmp_path, write_documents):
    path = write_documents("a.jsonl", ["a b c", "d e f"])
    tag([str(path)], ["gopher_v1"], "x", Executor())

    def run(**changes):
        output = {"path": str(tmp_path / "out")}
        stream = {"name": "s", "documents": [str(path)], "attributes": ["x"], "output": output}
        with pytest.raises(UserError) as error:
            mix(parse_config({"streams": [stream | changes]}, MixConfig, ""), Executor(retries=0))
        return str(error.value)

    wrong = {"include": ["$.attributes[?(@.x__gopher_v2__word_count[0][2] > 1)]"]}
    assert "x__gopher_v2__word_count; did you mean x__gopher_v1__word_count?" in run(filter=wrong)
    near = [{"span": "$.attributes.x__gopher_v1__wrod_count"}]
    assert "did you mean x__gopher_v1__word_count?" in run(span_replacement=near)
    fields = {"attribute_name": "seen_before", "key": "$.text"}
    config = {"documents": [str(path)], "dedupe": {"name": "again", "documents": fields}}
    dedupe(parse_config(config, DeduperConfig, ""), Executor())
    both = {"attributes": ["x", "again"]}
    jq = '.attributes["seen_befor"] != null'
    for syntax, text in (("jsonpath", "$.attributes[?(@.seen_befor)]"), ("jq", jq)):
        wrong = {"exclude": [text], "syntax": syntax}
        assert "seen_befor; did you mean seen_before?" in run(filter=wrong, **both)
    right = {"exclude": ["$.attributes[?(@.seen_before)]"]}  # in no document, but it might be
    stream = {"name": "r", "documents": [str(path)], "filter": right, **both}
    stream["output"] = {"path": str(tmp_path / "out")}
    assert mix(parse_config({"streams": [stream]}, MixConfig, ""), Executor())["r"]["kept"] == 2

    # Without the settings of what wrote them, as Dolma leaves attributes.
    (tmp_path / "attributes/x/.x.settings.json").unlink()
    wrong = {"include": ["$.attributes[?(@.x__gopher_v2__word_count[0][2] > 1)]"]}
    message = run(filter=wrong)
    assert "no document of" in message and "did you mean x__gopher_v1__word_count?" in message
    file = tmp_path / "attributes/x/a.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")
    assert "a.jsonl: ends before line 2 of" in run(name="t")
    file.write_text("\n".join(lines[::-1]))
    assert "line 1 is of 'a.jsonl-1', but that of" in run(name="u")
    file.write_text("\n".join([*lines, lines[0]]))
    assert "goes on where" in run(name="v")
    assert "s is no field" in run(s=1)


def test_formats_are_read_alike(tmp_path, write_documents):
    texts = ["one", "two\nlines \u2028 naïve 漢字", ""]
    plain = write_documents("a.jsonl", texts, source="s", metadata={"url": "u", "n": 1})
    for suffix in (".gz", ".zst"):
        with writing(f"{plain}{suffix}") as file:
            file.write(plain.read_bytes())
    rows = [json.loads(line) for line in plain.open()]
    parquet = tmp_path / "documents" / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    read = [
        [(d.id, d.text, d.source, d.fields(), line.number) for d, line in read_documents(str(path))]
        for path in (plain, f"{plain}.gz", f"{plain}.zst", parquet)
    ]
    assert read[0] == read[1] == read[2] == read[3]
    assert [text for _, text, *_ in read[0]] == texts
    assert tag([str(parquet)], ["char_length_v1"], "x", Executor()) == 3
    assert (tmp_path / "attributes/x/a.jsonl.gz").exists()


def test_redpajama_is_read(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"text": "t", "meta": {"url": "u"}}) + "\n")
    [(document, _)] = read_documents(str(path))
    assert (document.id, document.fields()) == ("r.jsonl:1", {"url": "u"})


def test_what_cannot_be_found_or_named(tmp_path):
    for patterns, message in (
        ([f"{tmp_path}/*.jsonl"], "no file matches"),
        ([f"{tmp_path}/x.jsonl"], "no such documents file"),
        ([], "no documents given"),
    ):
        with pytest.raises(UserError, match=message):
            find_documents(patterns)
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match="is given twice"):
        find_documents([f"{tmp_path}/x.jsonl"] * 2)
    with pytest.raises(UserError, match="no folder 'documents'"):
        tag([f"{tmp_path}/x.jsonl"], ["gopher_v1"], "x", Executor())
    with pytest.raises(UserError, match="did you mean gopher_v"):
        load_tagger("gopher_v3")
    with pytest.raises(UserError, match="takes nothing after a colon"):
        load_tagger("gopher_v1:3")


def test_a_jq_program_that_fails_names_the_line(tmp_path, write_documents):
    path = write_documents("a.jsonl", ["a"])
    stream = {
        "name": "s",
        "documents": [str(path)],
        "filter": {"include": [".nothing | keys"], "syntax": "jq"},
        "output": {"path": str(tmp_path / "out")},
    }
    with pytest.raises(UserError, match=r"a.jsonl: line 1: jq: null .* has no keys"):
        mix(parse_config({"streams": [stream]}, MixConfig, ""), Executor(retries=0))
