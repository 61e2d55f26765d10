"""Token files on a web server: the instances are those of local files."""

import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from olmo_jax.data import DataConfig, open_dataset, remote_tokens
from olmo_jax.data.text_index import TextIndex, TokenText
from olmo_jax.data.token_files import Document, write_token_file
from olmo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from olmo_jax.data.trace import Trace
from olmo_jax.errors import UserError
from olmo_jax.storage import location

VOCAB, T = 60_000, 128


class Handler(SimpleHTTPRequestHandler):
    """Gives parts of files, and fails every third time; below /whole/ only whole files."""

    asked = 0

    def do_GET(self):
        Handler.asked += 1
        if Handler.asked % 3 == 0:
            self.send_error(503)
            return
        span = self.headers.get("Range")
        if span is None or self.path.startswith("/whole/"):
            super().do_GET()
            return
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        first, last = span.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder and its address."""
    place = tmp_path_factory.mktemp("web")
    (place / "whole").mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("part-0.npy", 300_000), ("part-1.npy", 5_000), ("whole/a.npy", 5_000)):
        documents = [Document(0, n // 2, "a", "s", 1), Document(n // 2, n, "b", "s", 2)]
        write_token_file(place / name, rng.integers(0, VOCAB, n), documents, "uint16")
    (place / "text.jsonl").write_text('{"id": "a", "text": "to be or not to be"}\n' * 9)
    train_tokenizer([str(place / "text.jsonl")], place / "tokenizer.json", 260)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(place)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield place, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def config(where, **values) -> DataConfig:
    paths = tuple(f"{where}/part-{k}.npy" for k in range(2))
    return DataConfig(paths=paths, sequence_length=T, document_masking=True, **values)


@pytest.mark.parametrize("instances", ["fixed", "packed"])
def test_instances_are_those_of_local_files(web, tmp_path, instances):
    remote_tokens._blocks.clear()
    here, there = (
        open_dataset(config(where, instances=instances, index_dir=str(tmp_path)), VOCAB)
        for where in web
    )
    assert there.fingerprint == here.fingerprint and there.table() == here.table()
    for step in range(3):
        for one, other in zip(here.batch(step), there.batch(step), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("part-*.npy", "lists no files; name each one"),
        ("none.npy", "no such token file"),
        ("whole/a.npy", "the server gives whole files only"),
    ],
)
def test_what_cannot_be_read_is_said(web, name, message):
    url = f"{web[1]}/{name}"
    with pytest.raises(UserError, match=message) as error:
        open_dataset(DataConfig(paths=(url,), sequence_length=T), VOCAB)
    assert str(error.value).startswith(url)


def test_a_tokenizer_is_read_there_and_nothing_is_written(web):
    folder, url = web
    for address in (f"{url}/tokenizer.json", url):
        assert load_tokenizer(address).to_str() == load_tokenizer(folder).to_str()
    with pytest.raises(UserError, match=f"{url}/none.json: no such tokenizer"):
        load_tokenizer(f"{url}/none.json")
    with pytest.raises(UserError, match="nothing can be written there"):
        location(f"{url}/runs/a")


def test_the_way_back_is_that_of_local_files(web, tmp_path):
    place, address = web
    rng = np.random.default_rng(0)
    rng.permutation(2_382).astype(np.uint32).tofile(place / "global_indices.npy")
    found = []
    for where in (place, address):
        order = {"order": "olmo", "global_indices": (f"{where}/global_indices.npy",)}
        dataset = open_dataset(config(where, batch_size=16, **order), VOCAB)
        trace = Trace(dataset, last=50)
        text = TokenText(load_tokenizer(f"{where}/tokenizer.json"), VOCAB)
        index = TextIndex(list(dataset.sources[0].files), text, tmp_path)
        index.build()
        spans = [(0, hit.file, hit.start, hit.end) for hit in index.find("be", most=50)]
        read = [one.sightings for one in [*trace.document("b"), *trace.stretches(spans)]]
        assert any(read) and spans
        found.append((read, trace.rows(7)[3].instance_id, trace.seen()))
    assert found[0] == found[1]
