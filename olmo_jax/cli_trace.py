"""`olmo-jax data trace`: which documents a step read, and which steps read a document or a text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from olmo_jax.cli_shared import (
    AllowGinImports,
    GinFiles,
    bindings,
    progress,
    rebound_config,
)
from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from olmo_jax.data.trace import Trace
    from olmo_jax.data.traced_run import TracedRun

_MOST_PLACES = 100_000


def data_trace(
    context: Context,
    run: Annotated[str | None, Option("--run", help="A run folder.")] = None,
    gin_file: GinFiles = None,
    step: Annotated[
        int | None, Option("--step", help="What this step read; 1 is the first, as in the log.")
    ] = None,
    row: Annotated[
        list[int] | None, Option("--row", help="Only this row of it, from 0; again for more.")
    ] = None,
    document: Annotated[
        str | None, Option("--document", help="The steps that read this document, by its id.")
    ] = None,
    text: Annotated[
        str | None,
        Option("--text", help="Where the training text has this, and which steps read it."),
    ] = None,
    before_checkpoint: Annotated[
        int | None,
        Option(
            "--before_checkpoint",
            help="Only what the checkpoint of this step has seen; alone, how much that is.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, Option("--tokenizer", help="Instead of the run's own, or Train.tokenizer.")
    ] = None,
    limit: Annotated[int, Option("--limit", help="Print so many rows or places.")] = 20,
    out: Annotated[
        str | None, Option("--out", help="With --step: write a page (.html) with its rows.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON, with all there is.")] = False,
    allow_gin_imports: AllowGinImports = False,
) -> None:
    """The way back from a model to its data: what a step read, and when something was read.

    A text is looked for in the decoded tokens, letter by letter, wherever the borders of its tokens
    are; its index is built once. Released runs are traced with their gin file and token files.

    ```
    olmo-jax data trace --run=runs/demo --step=3
    olmo-jax data trace --run=runs/demo --document=hamlet
    olmo-jax data trace --run=runs/demo --text="To-morrow" --before_checkpoint=500
    olmo-jax data trace --gin_file=configs/demo.gin --gin.Data.paths='("my/*.npy",)' --step=1234
    ```
    """
    given = bindings(context, context.args)
    asked = [name for name, given in _asked(step, document, text).items() if given is not None]
    if len(asked) > 1 or not (asked or before_checkpoint is not None):
        raise UserError(
            f"{' and '.join(asked) or 'nothing'} was given: give one of --step, --document and "
            "--text, or --before_checkpoint alone"
        )
    if limit < 1:
        raise UserError(f"--limit={limit}: it must be at least 1")
    if (run is None) == (gin_file is None):
        raise UserError("give --run (a run folder) or --gin_file, one of the two")
    if out is not None and (step is None or not out.endswith(".html")):
        raise UserError(f"--out={out}: give a name that ends in .html, with --step")
    trace, own, traced_run = _open(run, gin_file, given, allow_gin_imports, before_checkpoint)
    from olmo_jax.data.tokenizer import load_tokenizer

    words = load_tokenizer(tokenizer) if tokenizer else own
    if step is not None:
        if traced_run:
            traced_run.check_step(step)
        _step(trace, traced_run, step, row, words, limit, out, as_json)
    elif document is not None:
        _document(trace, document, limit, as_json)
    elif text is not None:
        if words is None:
            raise UserError("--text: the run keeps no tokenizer; give --tokenizer=tokenizer.json")
        _text(trace, text, words, limit, as_json)
    else:
        _seen(trace, as_json)


def _asked(step: int | None, document: str | None, text: str | None) -> dict[str, Any]:
    return {"--step": step, "--document": document, "--text": text}


def _open(
    run: str | None,
    gin_file: list[str] | None,
    given: list[str],
    allow_imports: bool,
    before_checkpoint: int | None,
) -> "tuple[Trace, Tokenizer | None, TracedRun | None]":
    if run is not None:
        from olmo_jax.data.traced_run import TracedRun

        data = rebound_config(run, given, allow_imports).data if given else None
        traced = TracedRun(run, before_checkpoint, data)
        return traced.trace, traced.tokenizer(), traced
    from olmo_jax.config import load_config
    from olmo_jax.data import open_dataset
    from olmo_jax.data.tokenizer import load_tokenizer
    from olmo_jax.data.trace import Trace
    from olmo_jax.train.plan import Plan

    config = load_config(gin_file or [], given, allow_imports)
    steps = Plan(config).steps
    if before_checkpoint is not None:
        if not 0 < before_checkpoint <= steps:
            raise UserError(f"--before_checkpoint={before_checkpoint}: the plan has {steps} steps")
        steps = before_checkpoint
    dataset = open_dataset(config.data, config.model.vocab_size)
    path = config.train.tokenizer
    words = load_tokenizer(path) if path else None
    return Trace(dataset, steps, data_from_step=config.train.data_from_step), words, None


def _step(
    trace: "Trace",
    run: "TracedRun | None",
    step: int,
    wanted: list[int] | None,
    words: "Tokenizer | None",
    limit: int,
    out: str | None,
    as_json: bool,
) -> None:
    from olmo_jax.data.trace_show import row_json, show_rows, stretches

    size = trace.dataset.batch_size(trace.batch_step(step))
    shown = wanted or list(range(size if as_json else min(size, limit)))
    rows, batch = trace.rows(step, shown), trace.batch(step, shown)
    parts = [
        list(stretches(row, tokens_T, words))
        for row, tokens_T in zip(rows, batch.tokens_BT, strict=True)
    ]
    agrees = run.agrees([step])[step] if run else None
    if agrees is False:
        raise UserError(
            f"--step={step}: the tokens there are not those that the run recorded: its token files "
            "have changed since"
        )
    if out is not None:
        from olmo_jax.files import write_file
        from olmo_jax.report.batches import page

        write_file(Path(out), page(f"Step {step:,}", [(step, agrees, rows, parts)]))
        print(f"{out}: written")
        return
    if as_json:
        content = [row_json(row, part) for row, part in zip(rows, parts, strict=True)]
        _print_json({"step": step, "as_recorded": agrees, "rows": content})
        return
    note = "; instances and tokens are those that the run recorded" if agrees else ""
    _print(
        f"step {step:,}: {size:,} rows of {trace.dataset.tokens_per_instance:,} tokens{note}", ""
    )
    _print(*show_rows(rows, parts))
    if not wanted and size > limit:
        _print(f"… and {size - limit:,} more rows (--limit, or --row)")
    if words is None:
        _print("give --tokenizer=tokenizer.json to see the text")


def _document(trace: "Trace", name: str, limit: int, as_json: bool) -> None:
    from olmo_jax.data.trace_show import found_json, show_document

    found = trace.document(name)
    if as_json:
        _print_json({"document": name, "found": [found_json(one) for one in found]})
        return
    _print(f"{name}, in steps {trace.first + 1:,} to {trace.last:,}:", "")
    for one in found:
        _print(*show_document(one, limit))


def _text(trace: "Trace", text: str, words: "Tokenizer", limit: int, as_json: bool) -> None:
    from olmo_jax.data.text_index import TextIndex, TokenText
    from olmo_jax.data.trace_show import found_json, in_steps, show_place, snippet, times

    dataset = trace.dataset
    files = [(k, f) for k, source in enumerate(dataset.sources) for f in range(len(source.files))]
    opened = [dataset.sources[k].files[f] for k, f in files]
    index = TextIndex(opened, TokenText(words, dataset.vocab_size), dataset.index_dir)
    with progress("indexing", "tokens") as advance:
        index.build(advance)
    hits = list(index.find(text, _MOST_PLACES + 1))
    complete = len(hits) <= _MOST_PLACES
    hits = hits[:_MOST_PLACES]
    found = trace.stretches([(*files[hit.file], hit.start, hit.end) for hit in hits])
    by_step = sorted(
        zip(found, hits, strict=True), key=lambda pair: pair[0].steps[:1] or [trace.last + 1]
    )
    if not found:
        raise UserError(
            f"--text={text!r}: is nowhere in the {len(files):,} token files; capitals, spaces and "
            "line ends count"
        )
    if as_json:
        content = [found_json(one) for one in found]
        _print_json({"text": text, "complete": complete, "found": content})
        return
    full = "" if complete else " at least, and the steps are of these places alone"
    documents = len({(d.id, d.src, d.loc) for one in found for d in one.documents})
    in_documents = f", in {documents:,} document{'s' * (documents != 1)}" if documents else ""
    _print(
        f"{text!r} is there {times(len(found))}{in_documents}{full}; "
        f"in steps {trace.first + 1:,} to {trace.last:,} read {in_steps(found)}",
        "",
    )
    for one, hit in by_step[:limit]:
        around = snippet(opened[hit.file], hit.start, hit.end, words)
        _print(*show_place(one, around, limit))
    if len(found) > limit:
        _print(f"… and {len(found) - limit:,} more places (--limit)")


def _seen(trace: "Trace", as_json: bool) -> None:
    from olmo_jax.data.trace_show import show_seen

    seen = trace.seen()
    if as_json:
        _print_json({"first_step": trace.first + 1, "last_step": trace.last, "sources": seen})
        return
    _print(f"steps {trace.first + 1:,} to {trace.last:,} read", show_seen(seen))


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False))


def _print(*lines: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(line, soft_wrap=not isinstance(line, Table))
