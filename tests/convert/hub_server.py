"""A server on loopback that answers as the hub does, for one repository in a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(folder: Path, name: str, revision: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the address, and a list that grows with the files whose contents were sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            path = unquote(urlparse(self.path).path)
            resolve = f"/{name}/resolve/"
            if path.startswith(f"/api/models/{name}/tree/{revision}"):
                files = [p for p in sorted(folder.iterdir()) if p.is_file()]
                listing = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                    for p in files
                ]
                self.send(json.dumps(listing).encode(), "application/json", body)
                return
            at, _, file = path.removeprefix(resolve).partition("/")
            if path.startswith(resolve) and at in (revision, COMMIT) and (folder / file).is_file():
                if body:
                    sent.append(file)
                self.send((folder / file).read_bytes(), "application/octet-stream", body)
                return
            self.send(b'{"error": "not found"}', "application/json", body, 404)

        def send(self, content: bytes, kind: str, body: bool, status: int = 200):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
