"""Files on a web server, with the few calls of an fsspec file system that storage.py needs.

By the standard library: fsspec's own takes any error for a file that is not there.
"""

import shutil
import urllib.error
import urllib.request
from typing import Any

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

    def get_file(self, url: str, target: str) -> None:
        with _open(url) as answer, open(target, "wb") as file:
            shutil.copyfileobj(answer, file, 2**20)


def _open(url: str, method: str = "GET", span: str | None = None) -> Any:
    headers = {"Range": span} if span else {}
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code in _NOT_THERE:
            raise FileNotFoundError(2, f"HTTP status {error.code}", url) from None
        raise
