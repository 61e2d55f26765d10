"""Object stores on loopback: moto's S3 and a GCS emulator, each with one bucket in memory."""

import http.client
import logging
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import fsspec

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yields the environment variables with which the libraries find it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        # Its buckets are the process's, not the server's.
        reset = f"http://{host}:{port}/moto-api/reset"
        urllib.request.urlopen(urllib.request.Request(reset, method="POST")).close()
        with mock.patch.dict(os.environ, variables):
            files("s3").mkdir(BUCKET)
        yield variables
    finally:
        server.stop()


@contextmanager
def gcs_server() -> Iterator[dict[str, str]]:
    """Yields the environment variables with which the libraries find it."""
    from gcp_storage_emulator import server as emulator

    decode = emulator._decode_raw_data

    def with_crlf(*request):
        # gcsfs ends its parts with "\n", and the emulator takes a last byte "\r" for the line's.
        data = decode(*request)
        return data and data.replace(b"\n--==0==", b"\r\n--==0==")

    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        emulator._decode_raw_data = with_crlf
        port = server._api._httpd.server_port
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            # Not asked of an emulator, which gcsfs would warn of each time.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",  # seconds for each log-in otherwise
        }
    finally:
        emulator._decode_raw_data = decode
        server.stop()


def forget() -> None:
    """Lets this process look at the environment's variables again."""
    from etils.epath import backend

    from olmo_jax import storage

    for name in ("s3", "gs"):
        fsspec.get_filesystem_class(name).clear_instance_cache()
    storage._file_system.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()


def files(protocol: str) -> fsspec.AbstractFileSystem:
    """The file system that the environment names now, with nothing remembered."""
    return fsspec.filesystem(protocol, skip_instance_cache=True)


SERVERS = {"s3": s3_server, "gs": gcs_server}


@contextmanager
def faulty(variables: dict[str, str]) -> Iterator[tuple[dict[str, str], "Faults"]]:
    """A proxy before a server: the variables that lead to it, and the faults that it commits."""
    [name] = {"AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"} & variables.keys()
    host, port = variables[name].removeprefix("http://").split(":")
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = faults.next(self.command, self.path)
            if fault == "500":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            behind = http.client.HTTPConnection(host, int(port), timeout=30)
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            content = answer.read()
            self.send_response_only(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(key, value)
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "slow":
                for at in range(0, len(content), 1 + len(content) // 8):
                    self.wfile.write(content[at : at + 1 + len(content) // 8])
                    self.wfile.flush()
                    time.sleep(0.05)
            elif self.command != "HEAD":
                with suppress(OSError):  # who asked may have left
                    self.wfile.write(content)
            behind.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = forward

        def log_message(self, *_):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield {**variables, name: f"http://127.0.0.1:{proxy.server_port}"}, faults
    finally:
        proxy.shutdown()


class Faults:
    """Which requests fail, and how: every `every`-th, by turns with one of `kinds`."""

    def __init__(self):
        self.kinds: tuple[str, ...] = ()
        self.every, self.requests, self.done = 3, 0, []
        self._lock = threading.Lock()

    def next(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests += 1
            if not self.kinds or self.requests % self.every:
                return None
            kind = self.kinds[len(self.done) % len(self.kinds)]
            self.done.append((kind, method, path))
            return kind
