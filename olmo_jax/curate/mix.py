"""Mixing: streams of documents with their attributes, filtered, their spans replaced, sampled.

The configuration is Dolma's for its mixer, with `weight` for sampling. Where Dolma passes over a
missing line of attributes or an attribute that nobody wrote, this stops and says so.
"""

import os
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import msgspec
import xxhash
from pydantic import Field, field_validator

from olmo_jax import storage
from olmo_jax.curate.config import Compression, Config, WorkDir
from olmo_jax.curate.documents import (
    attributes_path,
    encode,
    find_documents,
    read_attributes,
    writing,
)
from olmo_jax.curate.executor import Executor, Shard, claim, run_shards
from olmo_jax.curate.filters import Filter, Select, attribute_names, compile_expression
from olmo_jax.curate.names import Known, of_experiments
from olmo_jax.data.documents import document_id, parse_line, read_lines
from olmo_jax.errors import UserError

_Spans = list[tuple[int, int, str]]
Counts = dict[str, int]
"""What became of documents: how many there were (`documents`), were left out by each expression of
a filter (`filtered by …`), by sampling (`sampled out`), for their length (`too short`), were kept
(`kept`), and written (`written`, which a weight above 1 makes more)."""


class FilterConfig(Config):
    """Which documents to keep."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    syntax: str = "jsonpath"

    @field_validator("syntax")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ("jsonpath", "jq"):
            raise ValueError("must be jsonpath or jq")
        return value


class SpanReplacement(Config):
    """Spans of an attribute that are replaced where min_score <= score < max_score."""

    span: str
    min_score: float | None = None
    max_score: float | None = None
    replacement: str = ""
    """`{}` in it stands for what was there; with a leading $ it is a jq program instead."""
    syntax: str = "jsonpath"


class OutputConfig(Config):
    """Where the documents of a stream go."""

    path: str
    max_size_in_bytes: int = Field(default=2 << 30, gt=0)
    """Of the inputs of a file, as they are stored."""
    discard_fields: tuple[str, ...] = ()
    min_text_length: int = Field(default=0, ge=0)
    """In bytes of the stripped text."""


class StreamConfig(Config):
    """A stream of documents."""

    name: str
    documents: tuple[str, ...]
    output: OutputConfig
    attributes: tuple[str, ...] = ()
    """Experiments; those of documents/a.jsonl.gz are in attributes/<experiment>/a.jsonl.gz."""
    filter: FilterConfig | None = None
    span_replacement: tuple[SpanReplacement, ...] = ()
    compression: Compression = Compression()
    weight: float = Field(default=1.0, gt=0)
    """How often a document is taken: 0.25 takes a quarter of them, 2.5 each twice and half of them
    a third time, by a hash of the id and `seed`."""
    seed: int = 0

    def check(self, known: Known | None = None) -> None:
        """Raises UserError for an expression that cannot be read, or that names an attribute that
        is not `known`."""
        Filter(*_expressions(self))
        for replacement in self.span_replacement:
            _replacer(replacement)
        if known:
            known.check(attribute_names(_all_expressions(self)), f"stream {self.name}: nothing")


class MixConfig(Config):
    """A mixer configuration."""

    streams: tuple[StreamConfig, ...] = Field(min_length=1)
    shuffle: bool = True
    """Whether input files are joined into files up to max_size_in_bytes; if not, each makes one of
    its own name. (The order of documents is that of the inputs in both cases, as in Dolma.)"""
    processes: int | None = None
    work_dir: WorkDir | None = None


def mix(config: MixConfig, executor: Executor, quiet: bool = False) -> dict[str, Counts]:
    """Mixes all streams; what became of each one's documents. Raises UserError."""
    shards = [shard for stream in config.streams for shard in _shards(stream, config.shuffle)]
    outs = [shard.out for shard in shards]
    if repeated := {out for out in outs if outs.count(out) > 1}:
        raise UserError(f"{min(repeated)}: two streams write it; give them other names or paths")
    for stream in config.streams:
        paths = find_documents(stream.documents)
        known = of_experiments(paths, stream.attributes)
        if known.is_all and not have_attributes(paths[0]):
            stream.check(known)
        files = {s.out: list(s.arguments[1]) for s in shards if s.arguments[0] is stream}
        claim(stream.output.path, stream.name, stream.model_dump(mode="json") | {"files": files})
    results = run_shards(shards, executor, "mixing", quiet)
    totals: dict[str, Counts] = {stream.name: _no_counts(stream) for stream in config.streams}
    for shard in shards:
        counts = results.get(shard.name) or _read_counts(shard.out)
        for name, count in counts.items():
            totals[shard.arguments[0].name][name] += count
    return totals


def _shards(stream: StreamConfig, join: bool) -> list[Shard]:
    stream.check()  # mistakes come out before any work
    inputs = find_documents(stream.documents)
    extension = stream.compression.output
    suffix = ".gz" if extension is None else f".{extension}" if extension else ""
    groups: list[tuple[str, list[str], int]] = []
    for path in inputs:
        size = storage.size(path)
        if not join:
            name = path.rpartition("/documents/")[2]
            groups.append((f"documents/{name}", [path], size))
        elif groups and groups[-1][2] + size <= stream.output.max_size_in_bytes:
            name, paths, before = groups[-1]
            groups[-1] = (name, [*paths, path], before + size)
        else:
            groups.append((f"{stream.name}-{len(groups):04}.jsonl{suffix}", [path], size))

    def sources(paths: list[str]) -> tuple[str, ...]:
        made = [attributes_path(path, name) for path in paths for name in stream.attributes]
        return (*paths, *made)

    return [
        Shard(f"{stream.name}/{name}", out, mix_files, (stream, paths, out), size, sources(paths))
        for name, paths, size in groups
        for out in [f"{stream.output.path.rstrip('/')}/{name}"]
    ]


def mix_files(
    stream: StreamConfig, paths: Sequence[str], out: str, advance: Callable[[int, int], None]
) -> Counts:
    """Writes one output file; what became of its documents."""
    filter_ = Filter(*_expressions(stream))
    replacers = [_replacer(config) for config in stream.span_replacement]
    wanted = attribute_names(_all_expressions(stream))
    known = of_experiments(paths, stream.attributes)
    if any(map(have_attributes, paths)):
        known = known._replace(is_all=False)
    counts = _no_counts(stream)
    with writing(out) as file:
        for path in paths:
            done = 0
            seen: set[str] = set()
            files = [attributes_path(path, experiment) for experiment in stream.attributes]
            attributes = [(name, read_attributes(name)) for name in files]
            for line in read_lines(path):
                row = parse_line(line, path)
                counts["documents"] += 1
                name = document_id(row, path, line.number)
                merged = _merge(row, name, path, line.number, attributes)
                seen.update(merged)
                try:
                    mixed = _mixed(row, name, filter_, replacers, stream, counts)
                except ValueError as e:
                    raise UserError(f"{path}: line {line.number}: jq: {e}") from None
                for content in mixed:
                    content["metadata"] = {
                        **(content["metadata"] if _has_metadata(content) else {}),
                        "provenance": f"{os.path.basename(path)}:{line.number}",
                    }
                    file.write(encode(content) + b"\n")
                if counts["documents"] % 100 == 0:
                    advance(100, line.bytes_read - done)
                    done = line.bytes_read
            _check_ends(path, attributes)
            _check_names(wanted, seen, known, path)
            advance(0, storage.size(path) - done)
    advance(counts["documents"] % 100, 0)
    with writing(_counts_path(out)) as file:
        file.write(encode(counts))
    return counts


def _mixed(
    row: dict[str, Any],
    name: str,
    filter_: Filter,
    replacers: list[Callable[[dict[str, Any]], _Spans]],
    stream: StreamConfig,
    counts: Counts,
) -> list[dict[str, Any]]:
    """The document as often as it is to be written."""
    if (reason := filter_.why_not(row)) is not None:
        counts[f"filtered by {reason}"] += 1
        return []
    if not (times := _times(name, stream)):
        counts["sampled out"] += 1
        return []
    spans = [span for find in replacers for span in find(row)]
    row["text"] = _replace(row["text"], spans)
    for field in stream.output.discard_fields:
        row.pop(field, None)
    if len(row["text"].strip().encode()) < stream.output.min_text_length:
        counts["too short"] += 1
        return []
    counts["kept"] += 1
    counts["written"] += times
    return [row] * times


def _no_counts(stream: StreamConfig) -> Counts:
    include, exclude, _ = _expressions(stream)
    filters = [*(["include"] if include else []), *exclude]
    filtered = [f"filtered by {text}" for text in filters]
    return dict.fromkeys(["documents", *filtered, "sampled out", "too short", "kept", "written"], 0)


def _times(name: str, stream: StreamConfig) -> int:
    key = f"{stream.name}\0{name}".encode()
    share = xxhash.xxh3_64_intdigest(key, stream.seed) / (1 << 64)
    return int(stream.weight) + (share < stream.weight % 1)


def _merge(
    row: dict[str, Any], name: str, path: str, number: int, files: list[tuple[str, Any]]
) -> list[str]:
    """Adds a line of each attributes file to the document; all attributes that it has then."""
    merged: dict[str, Any] = {}
    for file, lines in files:
        if (found := next(lines, None)) is None:
            raise UserError(f"{file}: ends before line {number} of {path}; tag it again")
        if found.id != name:
            raise UserError(
                f"{file}: line {number} is of {found.id!r}, but that of {path} is {name!r}; "
                "tag it again"
            )
        merged |= found.attributes
    if not isinstance(row.get("text"), str):
        raise UserError(f"{path}: line {number} has no string 'text', as every document must")
    if files:
        before = row.get("attributes")
        row["attributes"] = (before if isinstance(before, dict) else {}) | merged
    return list(row.get("attributes") or ())


def _check_ends(path: str, files: list[tuple[str, Any]]) -> None:
    for file, lines in files:
        if next(lines, None) is not None:
            raise UserError(f"{file}: goes on where {path} has ended; tag it again")


def _check_names(wanted: set[str], seen: set[str], known: Known, path: str) -> None:
    """What is known to be there may be in no document. Where another program has written the
    attributes: a tagger leaves a type out of a document that has none of it, but not all of its
    types out of all documents."""
    left = {name for name in wanted - seen if not known.has(name)}
    if not known.is_all:
        taggers = tuple(f"{name.rpartition('__')[0]}__" for name in seen if "__" in name)
        left = {n for n in left if seen and "__" in n and not n.startswith(taggers)}
    if left:
        (known + Known(frozenset(seen))).check(left, f"no document of {path}")


def _replacer(config: SpanReplacement) -> Callable[[dict[str, Any]], _Spans]:
    find: Select = compile_expression(config.span, config.syntax)
    low = -float("inf") if config.min_score is None else config.min_score
    high = float("inf") if config.max_score is None else config.max_score
    program: Select | None = None
    if config.replacement.startswith("$"):
        program = compile_expression(config.replacement[1:], "jq")

    def run(row: dict[str, Any]) -> _Spans:
        found = find(row)
        spans = found[0] if len(found) == 1 else found
        if not spans:
            return []
        text = config.replacement
        if program:
            text = next(iter(program(row)), "")
        if not isinstance(spans, list | tuple) or not isinstance(text, str):
            raise UserError(
                f"span {config.span!r} of document {row.get('id')!r}: finds no [start, end, "
                "score], or its replacement gives no text"
            )
        return [(start, end, text) for start, end, score in spans if low <= score < high]

    return run


def _replace(text: str, spans: _Spans) -> str:
    """Of spans that overlap the first one counts."""
    pieces: list[str] = []
    last = 0
    for start, end, replacement in sorted(spans, key=lambda span: span[0]):
        if last <= start < min(end, len(text)):
            pieces += [text[last:start], replacement.replace("{}", text[start:end])]
            last = end
    return "".join([*pieces, text[last:]])


def _has_metadata(row: dict[str, Any]) -> bool:
    return isinstance(row.get("metadata"), dict)


def _expressions(stream: StreamConfig) -> tuple[Sequence[str], Sequence[str], str]:
    config = stream.filter or FilterConfig()
    return config.include, config.exclude, config.syntax


def have_attributes(path: str) -> bool:
    """Whether the documents of a file bring attributes of their own."""
    try:
        return any("attributes" in parse_line(line, path) for line in islice(read_lines(path), 1))
    except UserError:  # is told when the file is mixed
        return True


def _all_expressions(stream: StreamConfig) -> list[str]:
    include, exclude, _ = _expressions(stream)
    return [*include, *exclude, *(replacement.span for replacement in stream.span_replacement)]


def _counts_path(out: str) -> str:
    folder, _, name = out.rpartition("/")
    return f"{folder}/.counts/{name}.json"


def _read_counts(out: str) -> Counts:
    try:
        return msgspec.json.decode(storage.read(_counts_path(out)))
    except (OSError, msgspec.DecodeError) as e:
        raise UserError(f"{_counts_path(out)}: cannot be read: {e}; remove {out}") from None
