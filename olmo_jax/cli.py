"""The command line: one thin command for each verb. Rooms do the work and are imported on use.

`olmo-jax --help` imports neither jax nor a room; a UserError becomes `error: …` and status 2.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from olmo_jax import (
    cli_data,
    cli_eval,
    cli_generate,
    cli_inspect,
    cli_launch,
    cli_plan,
    cli_serve,
    cli_study,
    cli_train,
)
from olmo_jax.cli_shared import GIN, print_error, progress
from olmo_jax.errors import UserError

STATUS_USER_ERROR, STATUS_INTERRUPTED = 2, 130

app = typer.Typer(
    name="olmo-jax",
    help="Train, study, evaluate and hand on fully open language models (OLMo, OLMoE, Pythia) in "
    "JAX.",
    epilog="Start with: olmo-jax train --gin_file=configs/demo.gin",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command(context_settings=GIN)(cli_train.train)
app.command()(cli_train.fork)
app.command()(cli_train.report)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_launch.app, name="launch")
app.command(context_settings=GIN)(cli_plan.plan)
app.command()(cli_generate.generate)
app.command()(cli_generate.chat)
app.command()(cli_serve.serve)
app.command("eval")(cli_eval.evaluate)
app.command()(cli_inspect.inspect)
app.add_typer(cli_study.app, name="study")


def main() -> None:
    """The console entry `olmo-jax`: settings of the process first, then the command."""
    from olmo_jax.parallel.processes import leave
    from olmo_jax.parallel.runtime import configure

    configure()
    leave(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit status; prints errors, without a traceback."""
    try:
        status = app(list(arguments), prog_name="olmo-jax", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except UserError as error:
        print_error(str(error))
        return STATUS_USER_ERROR
    except typer.TyperException as error:  # options and arguments that typer refuses
        command = getattr(getattr(error, "ctx", None), "command_path", "olmo-jax")
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        print_error(f"{message}; see {command} --help")
        return STATUS_USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        return STATUS_INTERRUPTED
    except BrokenPipeError:  # the reader has left, as in `olmo-jax models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from olmo_jax import storage

        if not storage.is_of_a_bucket(error):
            raise
        print_error(f"the bucket's server: {storage.reason(error)}")
        return STATUS_USER_ERROR


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"olmo-jax {installed('olmo-jax')}")
        raise typer.Exit()


@app.command()
def convert(
    paths: Annotated[
        list[str],
        Argument(
            metavar="SOURCE TARGET",
            help="A run folder, one of its checkpoints, another program's folder, a hub id or a "
            "gs://, s3:// or http(s):// address; and the new folder. With --average more sources.",
        ),
    ],
    to: Annotated[
        str,
        Option(
            "--to",
            help="hf (PyTorch's transformers), olmo, olmo_core (the original programs), or orbax "
            "(this program).",
        ),
    ] = "hf",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Option(
            "--dtype",
            help="Type of the written weights. If none, each keeps the type in which it is stored: "
            "float32 in our own runs, and another program's weights keep their bytes.",
        ),
    ] = None,
    step: Annotated[
        int | None, Option("--step", help="A run's checkpoint; the newest if none.")
    ] = None,
    revision: Annotated[
        str | None, Option("--revision", help="Branch, tag or commit of a hub id.")
    ] = None,
    rows: Annotated[
        int | None,
        Option(
            "--rows",
            help="Rows of the embedding (programs pad the vocabulary differently); added ones are "
            "zeros.",
        ),
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="Read the result again and compare every tensor.")
    ] = False,
    average: Annotated[
        bool, Option("--average", help="Write the mean of several sources, in float32: a soup.")
    ] = False,
) -> None:
    """Write a model as a folder for another program, or for this one.

    The source's format is found by looking: transformers (safetensors or pytorch_model.bin), OLMo,
    OLMo-core, or this program's. The tokenizer travels along; hf gets a model card, README.md.

    ```
    olmo-jax convert runs/demo runs/demo/hf --to=hf
    olmo-jax convert allenai/OLMo-2-0425-1B models/olmo2 --to=orbax --verify
    olmo-jax convert --average runs/a runs/b runs/c runs/soup --to=orbax
    ```
    """
    from olmo_jax.convert.export import convert

    *sources, target = paths
    if len(sources) != 1 and not (average and sources):
        raise UserError(f"{len(paths)} paths given: give a source and a target (or --average)")
    with progress("writing and verifying" if verify else "writing") as advance:
        report = convert(
            sources,
            target,
            to,
            dtype=dtype,
            step=step,
            revision=revision,
            rows=rows,
            verify=verify,
            progress=advance,
        )
    if report:
        print(report)
    loads = {
        "hf": f"AutoModelForCausalLM.from_pretrained({target!r}) loads it",
        "orbax": f"olmo_jax.load({target!r}) and Train.init_from take it",
    }
    print("; ".join([f"{target}: written", *([loads[to]] if to in loads else [])]))


@app.command()
def models(
    show: Annotated[
        list[str] | None, Argument(metavar="[show NAME]", help="One model's architecture.")
    ] = None,
) -> None:
    """List the released models that Model.preset knows: sizes, data, licence, and our recipe.

    ```
    olmo-jax models
    olmo-jax models show olmo2_1b
    ```
    """
    if show:
        _show_model(show)
        return
    from olmo_jax.model.presets import PRESETS
    from olmo_jax.numerals import count_text

    line = "{:<24}{:>12}{:>10}{:>10}{:>9}  {}".format
    print(line("preset", "parameters", "active", "context", "tokens", "recipe"))
    for name, released in PRESETS.items():
        model = released.config()
        counts = (model.parameter_count(active=active) for active in (False, True))
        context, tokens = f"{model.context_length:,}", count_text(released.tokens)
        print(line(name, *map(count_text, counts), context, tokens, released.recipe or "-"))
        print(f"    {released.about}\n    data: {released.data}; licence: {released.licence}")


def _show_model(words: Sequence[str]) -> None:
    """`olmo-jax models show NAME`: every choice of the architecture that is not left out."""
    from dataclasses import asdict

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from olmo_jax.model.presets import PRESETS, preset

    if words[0] != "show" or len(words) != 2:
        raise UserError(f"models {' '.join(words)}: give `models`, or `models show NAME`")
    name = words[1]
    model, released = preset(name), PRESETS[name]
    table = Table("field", "value", box=SIMPLE_HEAD, title=released.about, title_justify="left")
    rows = {
        "parameters": f"{model.parameter_count():,}",
        "active parameters": f"{model.parameter_count(active=True):,}",
        "tokens": f"{released.tokens:,}",
        "data": released.data,
        "licence": released.licence,
        "recipe": released.recipe or "none: too little was published",
        **{field: str(value) for field, value in asdict(model).items() if value is not None},
    }
    for field, value in rows.items():
        table.add_row(field, value)
    Console().print(table)


if __name__ == "__main__":  # python -m olmo_jax.cli
    main()
