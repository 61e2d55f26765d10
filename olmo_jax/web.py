"""Files on a web server, with the few calls of an fsspec file system that storage.py needs.

By the standard library: fsspec's own takes any error for a file that is not there.
"""

import errno
import io
import shutil
import urllib.error
import urllib.request
from typing import Any, BinaryIO, cast

from olmo_jax.errors import UserError

_NOT_THERE = (403, 404, 410)  # 403: what a bucket behind a web server says of a missing file


class WebFiles:
    """Reading only. Raises FileNotFoundError, other OSErrors and http.client.HTTPException."""

    def exists(self, url: str) -> bool:
        try:
            _open(url, "HEAD").close()
        except FileNotFoundError:
            return False
        return True

    def info(self, url: str) -> dict[str, Any]:
        with _open(url, "HEAD") as answer:
            length = answer.headers.get("Content-Length")
            version = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
        return {"size": None if length is None else int(length), "version": version}

    def cat_file(self, url: str, start: int | None = None, end: int | None = None) -> bytes:
        if start is None:
            with _open(url) as answer:
                return answer.read()
        if start == end:
            return b""
        with _open(url, span=f"bytes={start}-{'' if end is None else end - 1}") as answer:
            if answer.status != 206:
                raise UserError(
                    f"{url}: the server gives whole files only, and parts are needed; copy it"
                )
            return answer.read()

    def open(self, url: str, mode: str = "rb", block_size: int | None = None) -> BinaryIO:
        """As fsspec's: with a block size of 0 to be read from the beginning, as it comes; without
        one anywhere, all of it in memory."""
        if block_size == 0:
            return cast(BinaryIO, _Stream(_open(url)))
        return io.BytesIO(self.cat_file(url))

    def get_file(self, url: str, target: str) -> None:
        with _open(url) as answer, open(target, "wb") as file:
            shutil.copyfileobj(answer, file, 2**20)


class _Stream(io.RawIOBase):
    """An answer's bytes as they come. A connection cut in the middle is an OSError."""

    def __init__(self, answer: Any):
        self._answer, self._at = answer, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._answer.readinto(buffer)
        if not n and self._answer.length:
            raise OSError(errno.EIO, f"the connection ended {self._answer.length} bytes early")
        self._at += n
        return n

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._answer.close()
        super().close()


def _open(url: str, method: str = "GET", span: str | None = None) -> Any:
    headers = {"Range": span} if span else {}
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code in _NOT_THERE:
            raise FileNotFoundError(2, f"HTTP status {error.code}", url) from None
        raise
