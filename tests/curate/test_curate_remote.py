"""Documents and attributes in a bucket and on the web: the same as on this machine."""

import functools
import http.server
import json
import threading

import pytest

from olmo_jax import cli
from olmo_jax.curate.documents import read_attributes, read_documents
from olmo_jax.curate.executor import Executor
from olmo_jax.curate.tag import tag
from tests.buckets import BUCKET, SERVERS, files, forget


@pytest.fixture
def s3():
    with SERVERS["s3"]() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        forget()
        yield files("s3")
    forget()


@pytest.mark.slow  # starting the server takes longer than the rest
def test_a_bucket_is_tagged_as_a_folder_is(s3, corpus):
    remote = f"s3://{BUCKET}/corpus/documents"
    for path in sorted((corpus / "documents").iterdir()):
        s3.put_file(str(path), f"{remote}/{path.name}")
    taggers = ["gopher_v1", "char_length_with_paragraphs_v1"]
    tag([f"{corpus}/documents/*.jsonl"], taggers, "x", Executor())
    assert tag([f"{remote}/*.jsonl"], taggers, "x", Executor()) == 120
    for k in range(4):
        name = f"attributes/x/part-{k}.jsonl"
        assert s3.cat_file(f"s3://{BUCKET}/corpus/{name}") == (corpus / name).read_bytes()
    assert tag([f"{remote}/*.jsonl"], taggers, "x", Executor()) == 0  # all there
    assert len(list(read_attributes(f"s3://{BUCKET}/corpus/attributes/x/part-0.jsonl"))) == 30


@pytest.mark.slow
def test_the_index_of_evaluation_sets_may_lie_in_a_bucket(s3, corpus):
    with (corpus / "documents/part-0.jsonl").open() as lines:
        (corpus / "set.jsonl").write_text(json.dumps({"q": json.loads(next(lines))["text"]}))
    sets, index = f"--against={corpus}/set.jsonl", f"s3://{BUCKET}/made/sets.npz"
    documents = f"{corpus}/documents/part-0.jsonl"
    command = ["data", "decontaminate", documents, sets, f"--index={index}", "--workers=1"]
    assert cli.run(command) == 0
    first, *_ = read_attributes(f"{corpus}/attributes/contamination/part-0.jsonl")
    assert first.attributes["contamination__ngram_overlap__doc_frac"][0][2] == 1


def test_documents_are_read_from_the_web(corpus):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(corpus))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/documents/part-0.jsonl"
    rows = [json.loads(line) for line in (corpus / "documents/part-0.jsonl").open()]
    try:
        assert [d.text for d, _ in read_documents(address)] == [row["text"] for row in rows]
    finally:
        server.shutdown()
        server.server_close()
