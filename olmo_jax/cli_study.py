"""`olmo-jax study …`: how a model learned, from a checkpoint and the data that it has read."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from typer import Argument, Context, Option

from olmo_jax.cli_shared import (
    GIN,
    AllowGinImports,
    GinFiles,
    bindings,
    progress,
    rebound_config,
    run_config,
)
from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from olmo_jax.data import DataSet
    from olmo_jax.train.config import RunConfig

app = typer.Typer(
    help="Study how a model learned, from a checkpoint and the data that it has read.",
    no_args_is_help=True,
)


@app.callback()
def _study() -> None:
    """With a callback the only command keeps its name."""


@app.command("memorization", context_settings=GIN)
def memorization(
    context: Context,
    model: Annotated[
        str,
        Argument(help="A run folder, a checkpoint, or any folder, hub id or address that loads."),
    ],
    run: Annotated[
        str | None,
        Option("--run", help="The run folder whose data to ask about; MODEL if it is one."),
    ] = None,
    gin_file: GinFiles = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            help="The figures as JSON; every sequence (.sequences.jsonl) and a page (.html) come "
            "beside it. Killed, the same command goes on.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        Option(
            "--steps",
            help="Only what these steps read: 5, or 100:199, or several with "
            "commas. All that the model has read, if none.",
        ),
    ] = None,
    limit: Annotated[
        int,
        Option(
            "--limit",
            help="At most so many sequences that the model has read, evenly spread, and at most "
            "as many that it has not.",
        ),
    ] = 1000,
    offset: Annotated[
        int, Option("--offset", help="Where in each instance the prompt begins.")
    ] = 0,
    documents: Annotated[
        bool, Option("--documents", help="Instead: wherever a document begins.")
    ] = False,
    step: Annotated[
        int | None, Option("--step", help="MODEL's checkpoint; the newest if none.")
    ] = None,
    trained_steps: Annotated[
        int | None,
        Option(
            "--trained_steps",
            help="Steps that the model was trained for, where it is no checkpoint of ours; all "
            "of the run if none.",
        ),
    ] = None,
    allow_gin_imports: AllowGinImports = False,
) -> None:
    """Ask what a model repeats word for word of what it has read: Pythia's measure.

    Given 32 tokens of an instance that training read, the model continues with 32, greedily. The
    score is the share that are the data's own; a sequence is memorised where all are. Instances
    that come after the model's step (or held-out text) show what a model gets right that never
    read them. Scores are told by the step that read a sequence and by how often it was read, copies
    elsewhere in the data included (up to 268M tokens read).

    The data are a run's (--gin.Data.paths=… says where they have moved), or those of gin files,
    with --gin.Data.… for models that others trained.

    ```
    olmo-jax study memorization runs/demo --out=runs/demo/memorization.json
    olmo-jax study memorization runs/demo/hf --run=runs/demo --steps=1:100 --documents
    olmo-jax study memorization models/olmo2 --gin_file=configs/olmo2/1b.gin --trained_steps=10000
    ```
    """
    if out is not None and out.suffix != ".json":
        raise UserError(f"--out={out}: give a name that ends in .json; all else is named after it")
    if documents and offset:
        raise UserError("--documents and --offset are two ways to choose: give one of them")
    if run and gin_file:
        raise UserError("--run and --gin_file both say which data: give one of them")
    given = bindings(context, context.args)
    if gin_file:
        from olmo_jax.config import load_config

        config = load_config(gin_file, given, allow_gin_imports)
    else:
        run = run or _as_run(model)
        config = rebound_config(run, given, allow_gin_imports) if given else run_config(run)
    from rich.console import Console

    from olmo_jax.convert.load import load
    from olmo_jax.data import open_dataset
    from olmo_jax.data.trace import Trace
    from olmo_jax.data.traced_run import TracedRun
    from olmo_jax.study import memorization as study
    from olmo_jax.study import occurrences
    from olmo_jax.study.figures import summarise
    from olmo_jax.study.memorization_show import page, table
    from olmo_jax.study.reading import Reading
    from olmo_jax.train.plan import Plan

    planned = Plan(config).steps
    trained = _trained(model, step, run, planned, trained_steps)
    tokenizer = _tokenizer(model, run, config)
    notes = list(trained.notes)
    chosen = None if steps is None else _steps(steps, planned)
    if run is not None:
        traced = TracedRun(run, data=config.data)
        trace = traced.trace
        if chosen:
            traced.check_own(chosen[0].start, "--steps")
        if trace.first:
            notes.append(
                f"steps 1 to {trace.first:,} are of {traced.parent()}: what they read is not "
                "counted as read here."
            )
    else:
        dataset = open_dataset(config.data, config.model.vocab_size)
        trace = Trace(dataset, planned, data_from_step=config.train.data_from_step)
    reading = Reading(trace, trained.steps)
    if trained.fingerprint and trained.fingerprint != trace.dataset.fingerprint:
        notes.append(
            f"{model} was trained on other data than these: “read” is what a model of "
            "these data would have read by its step."
        )
    heldout, note = _heldout(config)
    notes += [note] if note else []
    places, skipped = study.choose(
        reading,
        heldout,
        steps=chosen,
        limit=limit,
        offset=offset,
        at_documents=documents,
    )
    items = study.ask(load(model, step), reading, places, heldout, out=out, bar=progress)
    content = {
        "model": model if step is None else f"{model} at step {step}",
        "run": run or ", ".join(gin_file or []),
        "trained_steps": trained.steps,
        "steps": steps,
        "limit": limit,
        "offset": offset,
        "at_documents": documents,
        "prompt_tokens": study.PROMPT,
        "continuation_tokens": study.CONTINUATION,
        "skipped": skipped,
        "repeats_counted": occurrences.can_count(reading),
        "notes": notes,
        **summarise(items),
    }
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # a file has no width
        console.width = 200
    for note in notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, highlight=False)
    console.print(table(content))
    if out is not None:
        study.finish(out, content, items, page(content, items, tokenizer))
        beside = [str(out.with_suffix(suffix)) for suffix in (".json", ".sequences.jsonl", ".html")]
        console.print(f"written: {', '.join(beside)}", soft_wrap=True)


class _Trained(NamedTuple):
    """What a checkpoint says of the training it is of."""

    steps: int
    fingerprint: str | None
    """Of the data; None where it says nothing."""
    notes: tuple[str, ...]


def _trained(
    model: str, step: int | None, run: str | None, planned: int, given: int | None
) -> _Trained:
    from olmo_jax.checkpoint import CheckpointReader, RunFolder, find_checkpoint
    from olmo_jax.storage import is_web

    found = None if is_web(model) else find_checkpoint(model, step)
    metadata = found[0].metadata(found[1]) if found else {}
    if found and "n" in metadata:  # a conversion has no place in an order
        if given is not None:
            raise UserError(
                f"--trained_steps={given}: {model} is a checkpoint of step {found[1]}, which says "
                "it; leave it out"
            )
        return _Trained(found[1], metadata.get("fingerprint"), ())
    if given is not None:
        if not 0 <= given <= planned:
            raise UserError(
                f"--trained_steps={given}: the run has {planned:,} steps: give 0 to {planned}"
            )
        return _Trained(given, None, ())
    newest = CheckpointReader(RunFolder(run).checkpoints).latest() if run else None
    steps = planned if newest is None else newest
    note = f"{model} is taken as trained for {steps:,} steps; --trained_steps says otherwise."
    return _Trained(steps, None, (note,))


def _as_run(model: str) -> str:
    """The run folder that a model is of. UserError where it is none."""
    from olmo_jax.storage import is_web, location

    if not is_web(model):
        here = location(model)
        for folder in (here, here.parent.parent):  # RUN, RUN/checkpoints/stepN
            if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
                return model if folder == here else str(folder)
    raise UserError(
        f"{model} is no run folder: give --run=RUN, whose data the model has read, or --gin_file"
    )


def _tokenizer(model: str, run: str | None, config: "RunConfig") -> "Tokenizer | None":
    """Of the model, or else of the data. UserError where they are not the same."""
    from olmo_jax.convert.load import load_tokenizer
    from olmo_jax.data.tokenizer import load_tokenizer as read_tokenizer
    from olmo_jax.storage import location

    own = datas = None
    with suppress(UserError):
        own = load_tokenizer(model)[0]
    path = str(location(run) / "tokenizer.json") if run else config.train.tokenizer
    with suppress(UserError):
        datas = read_tokenizer(path) if path else None
    if own and datas and own.get_vocab() != datas.get_vocab():
        raise UserError(
            f"{model} has a tokenizer of {own.get_vocab_size():,} tokens that is not the data's, "
            f"{path} of {datas.get_vocab_size():,}: give the data that the model was trained on"
        )
    return own or datas


def _heldout(config: "RunConfig") -> "tuple[DataSet | None, str | None]":
    """The run's held-out text, cut as its data are; or why there is none."""
    from olmo_jax.data import open_dataset

    if not config.train.heldout:
        return None, None
    data = replace(
        config.data,
        paths=config.train.heldout,
        sources=None,
        weights=None,
        order="sequential",
        global_indices=(),
    )
    try:
        return open_dataset(data, config.model.vocab_size), None
    except UserError as error:
        return None, f"no held-out text: {error}"


def _steps(text: str, planned: int) -> list[range]:
    """5,100:102 as ranges of steps, in their order and without a step that is in two."""
    found: list[range] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--steps={text}: give steps as 5, or 100:199, or several with commas")
        if not 1 <= int(first) <= int(last) <= planned:
            raise UserError(f"--steps={text}: the run has steps 1 to {planned:,}")
        found.append(range(int(first), int(last) + 1))
    found.sort(key=lambda some: some.start)
    end = 0
    for i, some in enumerate(found):
        found[i] = range(max(some.start, end), max(some.stop, end))
        end = found[i].stop
    return [some for some in found if some]
