"""Paths on this machine, in buckets (gs://, s3://) and on web servers (http://, https://, which are
only read): the one file that tells them apart.

Paths are `pathlib`'s here and etils' `epath`'s there, which go through fsspec (gcsfs, s3fs: the
extra `remote`); arrays go through tensorstore's own drivers (`kvstore`). An object appears whole or
not at all, so a write needs no temporary file; nothing can be renamed or appended to. Every room
may import this file: it imports nothing of ours but `errors` and `web`, no jax, and a bucket's
library only when there is a bucket.
"""

import errno
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from olmo_jax.errors import UserError
from olmo_jax.web import WebFiles

# The libraries try again by themselves; here an answer that ended early is asked for again, too.
_RETRY_SECONDS, _FIRST_DELAY = 60.0, 0.2
# In a run, what one host remembers of a folder is soon not so any more.
_SETTINGS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False},
    "gs": {"use_listings_cache": False, "requests_timeout": 60},
}
_HINTS = {
    "NoCredentialsError": "; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_THREADS = 32  # a request waits for tens of milliseconds and works for none
S = TypeVar("S")
T = TypeVar("T")
PathLike = str | os.PathLike[str]


class Entry(NamedTuple):
    """A file in a listing."""

    size: int
    written: datetime


def is_remote(path: PathLike) -> bool:
    """Whether a path is an address in a bucket or on a web server."""
    return re.match(r"(gs|s3|https?)://", os.fspath(path)) is not None


def is_web(path: PathLike) -> bool:
    """Whether a path is an address on a web server, where nothing is listed or written."""
    return re.match(r"https?://", os.fspath(path)) is not None


def has_protocol(path: PathLike) -> bool:
    """Whether a path is an address in a bucket or on the web."""
    return is_remote(path) or re.match(r"https?://", os.fspath(path)) is not None


def location(path: PathLike) -> Path:
    """An absolute path; for a bucket an epath.Path, which has pathlib's methods for what is here.
    UserError without the libraries for buckets, and for a web server's address."""
    if is_web(path):
        raise UserError(
            f"{path}: nothing can be written there; give a local folder, gs:// or s3://"
        )
    if not is_remote(path):
        if "\\" in str(here := Path(path).expanduser().absolute()):  # tensorstore takes it for a /
            raise UserError(f"{here}: has a backslash in it, which runs cannot have; rename it")
        return here
    from etils import epath

    file_system(path)
    return cast(Path, epath.Path(os.fspath(path).rstrip("/")))


def file_system(path: PathLike) -> Any:
    """fsspec's file system for a bucket, or ours for the web. UserError without its library."""
    if is_web(path):
        return WebFiles()
    try:
        return _file_system(os.fspath(path).partition("://")[0], os.getpid())
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: install olmo-jax[remote] to read it ({error})") from None


@lru_cache(maxsize=8)
def _file_system(protocol: str, _pid: int) -> Any:
    """One for all threads of a process: fsspec makes one for each, which logs in again."""
    import fsspec

    for name in (protocol, "gcs") if protocol == "gs" else (protocol,):
        fsspec.config.conf.setdefault(name, {}).update(_SETTINGS.get(protocol, {}))
    return fsspec.filesystem(protocol)


def reason(error: BaseException) -> str:
    """What an error of these libraries says, in one line."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return text + _HINTS.get(type(error).__name__, "")


def is_of_a_bucket(error: BaseException) -> bool:
    """Whether an error is of a library for buckets: something out there, and no bug here."""
    libraries = ("botocore", "aiobotocore", "gcsfs", "google", "aiohttp")
    return type(error).__module__.partition(".")[0] in libraries


def exists(path: PathLike) -> bool:
    """Whether a file is there. Raises OSError."""
    if not is_remote(path):
        return os.path.exists(path)
    files = file_system(path)
    return _retrying(lambda: files.exists(os.fspath(path)))


def size(path: PathLike) -> int:
    """Bytes of a file, also of one at http(s)://. Raises OSError."""
    if not has_protocol(path):
        return os.path.getsize(path)
    files = file_system(path)
    found = _retrying(lambda: files.info(os.fspath(path)))["size"]
    if found is None:
        raise OSError(errno.EIO, "the server does not say how long it is")
    return int(found)


def read(path: PathLike, start: int = 0, end: int | None = None) -> bytes:
    """The bytes [start, end) of a file, all of them by default. Raises OSError, also for a file
    that ends before `end`."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read() if end is None else file.read(end - start)
        return _whole(content, start, end)
    files = file_system(path)
    wanted = {} if end is None and not start else {"start": start, "end": end}
    return _retrying(lambda: _whole(files.cat_file(os.fspath(path), **wanted), start, end))


def open_stream(path: PathLike, seeks: bool = False) -> BinaryIO:
    """A file to read from its beginning, or (`seeks`) anywhere, also one at http(s)://; few web
    servers can do the latter. Raises OSError."""
    if not has_protocol(path):
        return open(path, "rb")
    files = file_system(path)
    options = {} if seeks or is_remote(path) else {"block_size": 0}
    return cast(BinaryIO, _retrying(lambda: files.open(os.fspath(path), "rb", **options)))


def upload(local: PathLike, path: PathLike) -> None:
    """Copies a file of this machine to an object of a bucket, whole or not at all. Raises
    OSError."""
    files = file_system(path)
    _retrying(lambda: files.put_file(os.fspath(local), os.fspath(path)))


def write(path: PathLike, content: bytes) -> None:
    """Writes an object of a bucket, whole or not at all. Raises OSError."""
    files = file_system(path)
    _retrying(lambda: files.pipe_file(os.fspath(path), content))


def map_files(call: Callable[[S], T], items: Iterable[S], paths: Iterable[PathLike]) -> list[T]:
    """`call` of each item in order; many at once when the files that it reads are in buckets."""
    if not any(map(has_protocol, paths)):
        return [call(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, items))


def matches(pattern: str) -> list[str]:
    """The addresses of a bucket that match a glob, sorted. Raises OSError."""
    files, protocol = file_system(pattern), pattern.partition("://")[0]
    return sorted(f"{protocol}://{path}" for path in _retrying(lambda: files.glob(pattern)))


def listing(folder: PathLike) -> dict[str, Entry]:
    """The files below a folder by their path in it; none where there is no folder. Raises
    OSError."""
    if not is_remote(folder):
        here = Path(folder)
        entries = {}
        for path in here.rglob("*"):
            with suppress(FileNotFoundError):  # removed in the meantime
                if path.is_file():
                    at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                    entries[path.relative_to(here).as_posix()] = Entry(path.stat().st_size, at)
        return entries
    files = file_system(folder)
    root = files._strip_protocol(os.fspath(folder))
    found = _retrying(lambda: files.find(os.fspath(folder), detail=True))
    return {
        path.removeprefix(f"{root}/"): Entry(int(info["size"]), _written(info))
        for path, info in found.items()
        if path.startswith(f"{root}/")
    }


def remove(folder: PathLike) -> None:
    """Removes a folder with all that is in it, if it is there. Raises OSError."""
    if not is_remote(folder):
        shutil.rmtree(folder)
        return
    files = file_system(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(partial(_remove_file, files, os.fspath(folder)), listing(folder)))


def kvstore(path: PathLike) -> dict[str, Any]:
    """tensorstore's specification of a folder."""
    text = os.fspath(path)
    if not is_remote(path):
        # A path and no URL, in which a "|" or "%" in a folder's name would mean something.
        return {"driver": "file", "path": f"{text}/"}
    protocol, _, rest = text.partition("://")
    bucket, _, inner = rest.partition("/")
    if protocol == "gs":
        # tensorstore has a variable of its own for what all others call so.
        if (emulator := os.environ.get("STORAGE_EMULATOR_HOST")) is not None:
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        return {"driver": "gcs", "bucket": bucket, "path": f"{inner}/"}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{inner}/"}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # otherwise it looks for files, and logs each one missing
        spec["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return spec


def _remove_file(files: Any, folder: str, name: str) -> None:
    with suppress(FileNotFoundError):  # an attempt before this one has done it
        _retrying(lambda: files.rm_file(f"{folder}/{name}"))


def _written(info: dict[str, Any]) -> datetime:
    at = info.get("LastModified") or info.get("mtime")
    return at if isinstance(at, datetime) else datetime.fromtimestamp(0, UTC)


def _whole(content: bytes, start: int, end: int | None) -> bytes:
    if end is not None and len(content) != end - start:
        raise OSError(errno.EIO, f"{len(content)} bytes came of the {end - start} from {start}")
    return content


def _retrying(call: Callable[[], T]) -> T:
    """`call`, again after growing pauses while it fails in ways that may pass; then OSError."""
    deadline, delay = time.monotonic() + _RETRY_SECONDS, _FIRST_DELAY
    while True:
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, UserError):
            raise
        except Exception as error:  # the libraries below fsspec have each their own classes
            if time.monotonic() + delay > deadline or type(error).__name__ in _HINTS:
                raise OSError(errno.EIO, reason(error)) from error
        time.sleep(delay * (0.5 + random.random()))
        delay *= 2
