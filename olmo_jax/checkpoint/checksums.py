"""Checksums of a checkpoint's files, and the manifest that holds them and marks it complete.

Orbax restores flipped bytes silently, as different parameters; so every file is hashed after it is
written and again before it is read. Not for secrecy: xxh3 finds damage, not tampering.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from olmo_jax import storage
from olmo_jax.files import sync_folder, write_bytes

MANIFEST = "manifest.json"
_BLOCK = 8 * 2**20
_THREADS = 4


def digest(path: Path, sync: bool = False) -> str:
    """The xxh3-64 digest of a file, in hexadecimal; with `sync`, the file is first forced to disk.

    Syncing is needed before a commit: a manifest that survives a power cut which its data files did
    not would call a torn checkpoint complete.
    """
    if storage.is_remote(path):
        return xxhash.xxh3_64_hexdigest(storage.read(path))
    hasher = xxhash.xxh3_64()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        while count := file.readinto(block):
            hasher.update(block[:count])
    return hasher.hexdigest()


def _digest_of_names(files: dict) -> str:
    """Guards the manifest itself: a damaged file name would take its file out of the check."""
    return xxhash.xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode())


def write_manifest(folder: Path, known: Mapping[Path, str] | None = None) -> None:
    """Hashes every file under `folder` and writes the manifest (anew, in a copy), last and
    atomically.

    `known` are digests of files that were hashed while others were written.
    """
    listed = storage.listing(folder)
    paths = [folder / name for name in sorted(listed) if name != MANIFEST]
    with ThreadPoolExecutor(_THREADS) as pool:  # xxhash and read release the GIL
        missing = [path for path in paths if path not in (known or {})]
        found = zip(missing, pool.map(lambda path: digest(path, sync=True), missing), strict=True)
        digests = dict(known or {}) | dict(found)
    if not storage.is_remote(folder):
        for subfolder in {path.parent for path in paths} | {folder}:
            sync_folder(subfolder)
    files = {
        name: {"bytes": listed[name].size, "xxh3_64": digests[folder / name]}
        for name in (path.relative_to(folder).as_posix() for path in paths)
    }
    content = {"format": 1, "files": files, "xxh3_64": _digest_of_names(files)}
    write_bytes(folder / MANIFEST, json.dumps(content, indent=1).encode())


def first_damage(
    folder: Path, prefixes: Iterable[str] = ("",), share: slice = slice(None)
) -> str | None:
    """What is wrong with the files listed in the manifest, or None when every one is as written.

    `prefixes` limits the check to files whose relative path starts with one of them (the weights
    can be read without reading the optimizer state); `share` limits it to some of those, so that
    processes can divide the work.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["xxh3_64"] != _digest_of_names(files):
            return f"its {MANIFEST} is not as written"
        wanted = [
            (folder / name, entry["bytes"], entry["xxh3_64"])
            for name, entry in sorted(files.items())
            if name.startswith(tuple(prefixes))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"

    def check(entry: tuple[Path, int, str]) -> str | None:
        path, size, hexdigest = entry
        name = path.relative_to(folder)
        try:
            if (here := storage.size(path)) != size:
                return f"{name} has {here} bytes and should have {size}"
            if digest(path) != hexdigest:
                return f"{name} does not have the checksum that was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return next((fault for fault in pool.map(check, wanted[share]) if fault), None)
