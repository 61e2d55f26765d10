"""Checkpoints that lie elsewhere: fetched, only the files that are needed, and then read as local.

A hub id (`owner/name`) goes through huggingface_hub and its cache; gs://, s3:// and http(s)://
through `storage`'s file systems, into a cache of ours. Both libraries are asked for
when they are needed: the extra `hf`, and for a bucket `remote` (fsspec's gcsfs and s3fs).
"""

import hashlib
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from olmo_jax import storage
from olmo_jax.convert.distcp import METADATA, stored_files
from olmo_jax.errors import UserError
from olmo_jax.files import write_bytes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",  # of sentencepiece, LLaMA 1's and 2's
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_SMALL = ("config.json", "config.yaml", *TOKENIZER_FILES)
# The weights, in the order of preference: (one file, the index of several).
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("model.pt", "model.pt.index.json"),
)
CORE = "model_and_optim"  # OLMo-core's weights
# What tells one version of a file from another: of the web, S3 and Google's buckets.
_VERSION = ("size", "version", "ETag", "LastModified", "generation", "md5Hash", "etag")


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """Where the files of a checkpoint lie on this machine, fetched if they were not. UserError."""
    text = str(path)
    folder = Path(path).expanduser()
    could_be_hub_id = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text) and isinstance(path, str)
    # Beside a folder `runs`, "runs/deno" is a slip and not somebody's repository.
    if could_be_hub_id and not folder.parent.is_dir():
        return _from_hub(text, revision)
    if revision:
        raise UserError(f"--revision={revision}: {path} is no hub id (owner/name)")
    return _fetch(text.rstrip("/")) if re.match(r"(gs|s3|https?)://", text) else folder


def _from_hub(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(
            f"{name}: is no folder; to take it from the hub, install olmo-jax[hf]"
        ) from None
    at = f"{name} at {revision or 'main'}"
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        there = set(hub.HfApi().list_repo_files(name, revision=revision))
        wanted = [file for file in _SMALL if file in there]

        def fetch(file: str) -> Path:
            return Path(hub.hf_hub_download(name, file, revision=revision))

        wanted += _weight_files(there, lambda index: fetch(index).read_text(), at)
        paths = [fetch(file) for file in wanted]
        if not paths:
            raise UserError(f"{at} holds no model")
        return paths[0].parent
    except UserError:
        raise
    except Exception as error:  # its own classes, and those of the HTTP library below it
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: is no folder here, and {at} could not be fetched from the hub: {reason}"
        ) from None


def _weight_files(there: set[str], read: Any, where: str) -> list[str]:
    for single, index in _WEIGHTS:
        if index in there:
            shards = _shards(read(index), f"{where}: {index}")
            missing = sorted(shards - there)
            if missing:
                raise UserError(f"{where}: {missing[0]} is missing, which {index} names")
            return [index, *sorted(shards)]
        if single in there:
            return [single]
    return sorted(file for file in there if file.startswith(f"{CORE}/"))


def _shards(index: str | bytes, where: str) -> set[str]:
    """The files that an index of tensors names."""
    try:
        shards = set(json.loads(index)["weight_map"].values())
        outside = sorted(shard for shard in shards if Path(shard).name != shard)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where} is no index of tensors") from None
    if outside:
        raise UserError(f"{where} names a file outside its folder: {outside[0]!r}")
    return shards


def _fetch(url: str) -> Path:
    """A copy of a folder at a URL, in our cache."""
    protocol = url.partition("://")[0]
    files = storage.file_system(url)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "olmo_jax" / "remote"
    name = url.rpartition("/")[2] or "root"
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16] / name

    def fetch(file: str) -> Path:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{url}: names a file outside its folder: {file!r}")
        target, mark = folder / file, folder.parent / "marks" / file
        info = files.info(f"{url}/{file}")
        size, version = info.get("size"), str([info.get(name) for name in _VERSION])
        if not (target.is_file() and mark.is_file() and mark.read_text() == version):
            for path in (target, mark):
                path.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            files.get_file(f"{url}/{file}", str(partial))
            if size is not None and partial.stat().st_size != size:
                came = partial.stat().st_size
                partial.unlink()
                raise OSError(f"{file}: the connection ended after {came} of {size} bytes")
            os.replace(partial, target)
            write_bytes(mark, version.encode())
        return target

    try:
        there = _listing(files, url, protocol)
        if "config.json" in there or "config.yaml" in there:
            wanted = [file for file in _SMALL if file in there]
            wanted += _weight_files(there, lambda index: fetch(index).read_text(), url)
        else:  # a run, or one of its checkpoints, of ours
            wanted = sorted(there)
        for file in wanted:
            fetch(file)
    except UserError:
        raise
    except Exception as error:  # the libraries below fsspec have each their own classes
        raise UserError(f"{url}: cannot be fetched: {storage.reason(error)}") from error
    if not wanted:
        raise UserError(f"{url}: holds no model")
    for name in {*_SMALL, *(name for pair in _WEIGHTS for name in pair)} - set(wanted):
        (folder / name).unlink(missing_ok=True)  # what is no longer there
    return folder


def _listing(files: Any, url: str, protocol: str) -> set[str]:
    """The files below a URL; of a web server, which lists nothing, those that have our names."""
    if protocol in ("gs", "s3"):
        root = files._strip_protocol(url)
        return {path.removeprefix(f"{root}/") for path in files.find(url)}
    names = {*_SMALL, f"{CORE}/{METADATA}", *(name for pair in _WEIGHTS for name in pair)}
    there = {name for name in names if files.exists(f"{url}/{name}")}
    for _, index in _WEIGHTS:
        if index in there:
            content = files.cat_file(f"{url}/{index}")
            names = _shards(content, f"{url}: {index}")
            there |= {name for name in names if files.exists(f"{url}/{name}")}
            break
    if f"{CORE}/{METADATA}" in there:
        content = files.cat_file(f"{url}/{CORE}/{METADATA}")
        there |= {f"{CORE}/{name}" for name in stored_files(io.BytesIO(content), url)}
    return there
