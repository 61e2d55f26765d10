"""`olmo-jax data tag`, `dedupe`, `mix`, `decontaminate`, `build`: from documents to token files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from olmo_jax.curate.executor import Executor

Workers = Annotated[
    int | None, Option("--workers", help="Processes; as many as there are cores by default.")
]
Kind = Annotated[
    str, Option("--executor", help="local, or ray (the cluster of RAY_ADDRESS, or this machine).")
]
Retries = Annotated[int, Option("--retries", help="How often a failing file is tried again.")]


def make_executor(kind: str, workers: int | None, retries: int = 1) -> "Executor":
    """The executor of a command's options."""
    from olmo_jax.curate.executor import Executor

    return Executor(kind, workers or os.cpu_count() or 1, retries)


def data_tag(
    documents: Annotated[
        list[str], Argument(help="Documents (.jsonl, .gz, .zst, .parquet) in a folder documents/.")
    ],
    tagger: Annotated[
        list[str],
        Option("--tagger", help="A tagger, or tagger:option; give it again for more."),
    ],
    experiment: Annotated[
        str, Option("--experiment", help="Attributes go to attributes/EXPERIMENT/.")
    ],
    workers: Workers = None,
    executor: Kind = "local",
    retries: Retries = 1,
) -> None:
    """Write attributes of documents: quality rules, length, language, personal data, ….

    Formats, names and values are Dolma's. The same command again does only what is left.

    ```
    olmo-jax data tag 'a/documents/*.gz' --experiment=rules --tagger=gopher_v1 --tagger=c4_v2
    ```
    """
    from olmo_jax.curate.tag import tag

    done = tag(documents, tagger, experiment, make_executor(executor, workers, retries))
    print(f"{done:,} documents tagged in attributes/{experiment}/")


def data_taggers() -> None:
    """List the taggers, those that packages add included."""
    from olmo_jax.curate.taggers import tagger_names

    print("\n".join(tagger_names()))


def data_dedupe(
    config: Annotated[str, Argument(help="A deduper configuration, YAML or JSON.")],
    workers: Workers = None,
    executor: Kind = "local",
    retries: Retries = 1,
) -> None:
    """Mark documents or paragraphs that were seen before, as attributes.

    The configuration is Dolma's, with dedupe.method: bloom (the default), exact, or minhash.

    ```
    olmo-jax data dedupe dedupe.yaml
    ```
    """
    from olmo_jax.curate.config import read_config
    from olmo_jax.curate.dedupe import clusters_path, dedupe
    from olmo_jax.curate.dedupe_config import DeduperConfig
    from olmo_jax.curate.documents import attributes_path, find_documents

    settings = read_config(config, DeduperConfig)
    workers = workers or settings.processes
    counts = dedupe(settings, make_executor(executor, workers, retries))
    what = "documents" if settings.dedupe.documents else "paragraphs"
    print(
        f"{counts['duplicates']:,} of {counts['units']:,} {what} marked in "
        f"attributes/{settings.dedupe.name}/"
    )
    if settings.dedupe.method == "minhash":
        outs = [attributes_path(find_documents(settings.documents)[0], settings.dedupe.name)]
        print(f"the clusters, the largest first: {clusters_path(outs, settings.dedupe)}")


def data_mix(
    config: Annotated[str, Argument(help="A mixer configuration, YAML or JSON.")],
    workers: Workers = None,
    executor: Kind = "local",
    retries: Retries = 1,
) -> None:
    """Write the documents that filters keep, spans replaced, streams sampled by weight.

    The configuration is Dolma's for its mixer, with a stream's `weight`.

    ```
    olmo-jax data mix mix.yaml
    ```
    """
    from olmo_jax.curate.config import read_config
    from olmo_jax.curate.mix import MixConfig, mix

    settings = read_config(config, MixConfig)
    workers = workers or settings.processes
    for name, counts in mix(settings, make_executor(executor, workers, retries)).items():
        print(f"{name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))


def data_decontaminate(
    documents: Annotated[
        list[str], Argument(help="Documents (.jsonl, .gz, .zst, .parquet) in a folder documents/.")
    ],
    index: Annotated[str, Option("--index", help="The index of n-grams to write, .npz.")],
    against: Annotated[
        list[str] | None,
        Option("--against", help="Evaluation sets, JSON lines or Parquet; repeatable."),
    ] = None,
    tasks: Annotated[
        str | None,
        Option("--tasks", help="Tasks and suites of `olmo-jax eval --list`, with commas."),
    ] = None,
    experiment: Annotated[
        str, Option("--experiment", help="Attributes go to attributes/EXPERIMENT/.")
    ] = "contamination",
    field: Annotated[
        list[str] | None, Option("--field", help="Only this field of the sets; repeatable.")
    ] = None,
    ngram_length: Annotated[int, Option("--ngram_length", help="In words.")] = 13,
    workers: Workers = None,
    executor: Kind = "local",
    retries: Retries = 1,
) -> None:
    """Mark where documents hold n-grams of evaluation sets: files, or the tasks that eval knows.

    ```
    olmo-jax data decontaminate 'a/documents/*.gz' --against='sets/*.jsonl' --index=sets.npz
    olmo-jax data decontaminate 'a/documents/*.gz' --tasks=olmes_core9_rc --index=core9.npz
    ```
    """
    from olmo_jax.curate.config import parse_config
    from olmo_jax.curate.decontaminate import DecontaminateConfig, write_index
    from olmo_jax.curate.tag import tag
    from olmo_jax.storage import is_remote

    content = {
        "against": against or [],
        "tasks": [name for name in (tasks or "").split(",") if name],
        "fields": field or [],
        "ngram_length": ngram_length,
    }
    config = parse_config(content, DecontaminateConfig, "decontaminate")
    made = write_index(config, index, _questions)
    spec = f"ngram_overlap:{index if is_remote(index) else os.path.abspath(index)}"
    done = tag(documents, [spec], experiment, make_executor(executor, workers, retries))
    print(
        f"{done:,} documents looked through for {made.ngrams:,} n-grams of {made.questions:,} "
        f"questions ({made.too_short:,} of them too short to be looked for): "
        f"attributes/{experiment}/"
    )


def _questions(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    from olmo_jax.eval.tasks import question_texts

    return question_texts(names)


def data_stat(
    documents: Annotated[list[str], Argument(help="Documents (.jsonl, .gz, .zst, .parquet).")],
    out: Annotated[
        Path | None,
        Option("--out", help="A page, .html; everything as JSON comes beside it."),
    ] = None,
    attributes: Annotated[
        list[str] | None,
        Option("--attributes", help="Also of attributes/EXPERIMENT/; repeatable."),
    ] = None,
    tokenizer: Annotated[
        str | None, Option("--tokenizer", help="A tokenizer.json, to count tokens, too.")
    ] = None,
    workers: Workers = None,
    executor: Kind = "local",
    retries: Retries = 1,
) -> None:
    """Show what is in documents: counts by source, lengths, domains, n-grams, duplicates.

    Memory does not grow with the documents; where a count is not exact, its error is told. The same
    command again goes on where it stopped, when --out is given.

    ```
    olmo-jax data stat 'a/documents/*.gz' --attributes=rules --out=a/stat.html
    ```
    """
    from rich.console import Console

    from olmo_jax.curate.stat import Settings, stat
    from olmo_jax.curate.stat_page import page, terminal_tables
    from olmo_jax.files import write_file

    if out and out.suffix != ".html":
        raise UserError(f"--out={out}: must be a page, .html; JSON comes beside it")
    found = stat(
        documents,
        out and out.with_suffix(".json"),
        Settings(tuple(attributes or ()), tokenizer),
        make_executor(executor, workers, retries),
    )
    if out:
        write_file(out, page(found, out.stem))
    console = Console(markup=False, emoji=False)  # cells are text of documents
    for table in terminal_tables(found):
        console.print(table)
    if out:
        print(f"{out}; as JSON {out.with_suffix('.json')}")


def data_build(
    recipe: Annotated[str, Argument(help="A recipe, YAML.")],
    workers: Workers = None,
    executor: Kind = "local",
    retries: Retries = 1,
) -> None:
    """Tag, de-duplicate, decontaminate, mix and tokenize, with a data card.

    The same command again goes on where it stopped. See docs/curate.md for recipes.

    ```
    olmo-jax data build recipe.yaml
    ```
    """
    from olmo_jax.curate.build import build
    from olmo_jax.curate.config import read_yaml

    run = make_executor(executor, workers, retries)
    facts = build(read_yaml(recipe), recipe, run, questions=_questions)
    tokens = facts["tokens"]
    for name, counts in facts["mix"].items():
        print(f"{name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    print(
        f"{facts['recipe']['out']}/tokens: {tokens['tokens']:,} tokens of "
        f"{tokens['documents']:,} documents; Data.eos_token_id = {tokens['eos_token_id']}; "
        f"see {facts['recipe']['out']}/README.md"
    )


def add_commands(app: typer.Typer) -> None:
    """Adds them to `olmo-jax data`."""
    for name, command in (
        ("tag", data_tag),
        ("taggers", data_taggers),
        ("dedupe", data_dedupe),
        ("decontaminate", data_decontaminate),
        ("mix", data_mix),
        ("stat", data_stat),
        ("build", data_build),
    ):
        app.command(name)(command)
