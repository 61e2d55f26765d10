"""Object stores on loopback: moto's S3 and a GCS emulator, each with one bucket in memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import fsspec

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yields the environment variables with which the libraries find it."""
    from moto.server import ThreadedMotoServer

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
        with mock.patch.dict(os.environ, variables):
            files("s3").mkdir(BUCKET)
        yield variables
    finally:
        server.stop()


@contextmanager
def gcs_server() -> Iterator[dict[str, str]]:
    """Yields the environment variables with which the libraries find it."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        port = server._api._httpd.server_port
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    finally:
        server.stop()


def files(protocol: str) -> fsspec.AbstractFileSystem:
    """The file system that the environment names now, with nothing remembered."""
    return fsspec.filesystem(protocol, skip_instance_cache=True)


SERVERS = {"s3": s3_server, "gs": gcs_server}
