"""Documents by chance, and by lists of addresses, sites and words that a person brings."""

import re
from urllib.parse import urlsplit

import msgspec
import xxhash

from olmo_jax import storage
from olmo_jax.curate.documents import Attributes, Document
from olmo_jax.errors import UserError


class RandomNumber:
    """`random_number_v1` or `random_number_v1:SEED`: a number in [0, 1) that depends on the seed
    and the document's id alone, so that a sample is the same one on any number of workers."""

    def __init__(self, seed: str | None):
        if seed is not None and not seed.isdecimal():
            raise UserError(f"random_number_v1:{seed}: the seed must be a number from 0")
        self._seed = int(seed or 1)

    def __call__(self, document: Document) -> Attributes:
        number = xxhash.xxh3_64_intdigest((document.id or "").encode(), self._seed)
        # 53 bits are what a float holds; five places are what is written.
        return {"random": [(0, len(document.text), (number >> 11) / (1 << 53))]}


class UrlBlocklist:
    """`url_blocklist:FILE`: documents whose `metadata.url` is in the list, as an attribute `url`.

    The list has an address a line, with or without https://; a query does not count. # starts a
    comment.
    """

    def __init__(self, path: str | None):
        self._blocked = {_without_scheme(entry) for entry in read_list("url_blocklist", path)}

    def __call__(self, document: Document) -> Attributes:
        blocked = _without_scheme(url_of(document)) in self._blocked
        return {"url": [(0, len(document.text), 1.0)]} if blocked else {}


class DomainBlocklist:
    """`domain_blocklist:FILE`: the same by the site, that is its name and any below it: an entry
    example.org is met by www.example.org. Lines of hosts files (0.0.0.0 example.org) and of ad
    blockers (||example.org^) are read, too."""

    def __init__(self, path: str | None):
        entries = (entry.split()[-1] for entry in read_list("domain_blocklist", path))
        self._blocked = {host(entry.strip("|^")) for entry in entries}

    def __call__(self, document: Document) -> Attributes:
        parts = host(url_of(document)).split(".")
        names = (".".join(parts[k:]) for k in range(len(parts)))
        blocked = not self._blocked.isdisjoint(names)
        return {"url": [(0, len(document.text), 1.0)]} if blocked else {}


class WordBlocklist:
    """`word_blocklist:FILE`: where words or phrases of the list are (`word`), and how many there
    are a word (`doc_frac`). Small and capital letters are the same."""

    def __init__(self, path: str | None):
        entries = sorted(read_list("word_blocklist", path), key=len, reverse=True)
        # A phrase's spaces stand for any space.
        phrases = (r"\s+".join(map(re.escape, entry.split())) for entry in entries)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)

    def __call__(self, document: Document) -> Attributes:
        spans = [(*match.span(), 1.0) for match in self._pattern.finditer(document.text)]
        share = len(spans) / max(len(document.text.split()), 1)
        found: Attributes = {"word": spans} if spans else {}
        return found | {"doc_frac": [(0, len(document.text), share)]}


def read_list(name: str, path: str | None) -> list[str]:
    """The lines of a list without comments. Raises UserError."""
    if not path:
        raise UserError(f"{name}: no list given; give {name}:FILE")
    try:
        lines = storage.read(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a list: {e}") from None
    entries = [line.strip() for line in lines if line.strip() and line.strip()[0] not in "#!;"]
    if not entries:
        raise UserError(f"{path}: has no entries")
    return entries


def url_of(document: Document) -> str:
    """`url`, in the metadata or beside them; "" without one."""
    url = document.fields().get("url") or msgspec.json.decode(document.url)
    return url if isinstance(url, str) else ""


def _without_scheme(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"//{url}")
    return (parts.netloc + parts.path).rstrip("/").lower()


def host(url: str) -> str:
    """The host of an address, in small letters; "" for what is none."""
    try:
        return urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:  # http://[
        return ""
