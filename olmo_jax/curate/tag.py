"""Tagging all files of a corpus: a shard for each."""

from collections.abc import Sequence

from olmo_jax import storage
from olmo_jax.curate.documents import attributes_path, find_documents
from olmo_jax.curate.executor import Executor, Shard, claim, run_shards
from olmo_jax.curate.taggers import load_tagger, tag_file, variable_name
from olmo_jax.errors import UserError


def tag(
    documents: Sequence[str],
    taggers: Sequence[str],
    experiment: str,
    executor: Executor,
    quiet: bool = False,
) -> int:
    """Writes an attributes file for each documents file; the documents tagged now (not before).
    Raises UserError."""
    paths = find_documents(documents)
    outs = [attributes_path(path, experiment) for path in paths]
    return tag_files(paths, outs, taggers, experiment, executor, quiet)


def tag_files(
    paths: Sequence[str],
    outs: Sequence[str],
    taggers: Sequence[str],
    experiment: str,
    executor: Executor,
    quiet: bool = False,
) -> int:
    """The same with the attributes files named one by one."""
    if variable_name(experiment) != experiment:
        raise UserError(f"experiment {experiment!r}: must be letters, digits and underscores")
    for spec in taggers:
        load_tagger(spec)  # a mistake comes out before any work
    claim(outs[0].rpartition("/")[0] or ".", experiment, {"taggers": list(taggers)})
    sizes = storage.map_files(storage.size, paths, paths)
    # What a tagger reads, such as a list or an index: attributes are made again when it is newer.
    options = [option for spec in taggers if (option := spec.partition(":")[2])]
    shards = [
        Shard(path, out, tag_file, (path, out, tuple(taggers), experiment), size, (path, *options))
        for path, out, size in zip(paths, outs, sizes, strict=True)
    ]
    return sum(run_shards(shards, executor, "tagging", quiet).values())
