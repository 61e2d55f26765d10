"""`olmo-jax launch`: several processes of one run."""

from typing import Annotated

import typer
from typer import Argument, Option

app = typer.Typer(
    name="launch",
    help="Start a run in several processes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def _root() -> None:
    pass


@app.command(context_settings={"ignore_unknown_options": True})
def local(
    command: Annotated[
        list[str], Argument(metavar="-- COMMAND", help="What each runs, as `train --gin_file=…`.")
    ],
    processes: Annotated[int, Option("--processes", help="How many.")] = 2,
    devices_each: Annotated[
        int | None,
        Option(
            "--devices_each",
            help="Devices of each: GPUs where there are any (if none given, all, shared out), "
            "else so many virtual CPU devices.",
        ),
    ] = None,
) -> None:
    """Run a command in several processes on this machine, as on so many hosts.

    The first one's output is shown, and the others' errors. SIGTERM saves and ends all (status 75);
    when one fails, all end with its status.

    ```
    olmo-jax launch local --processes=2 -- train --gin_file=configs/demo.gin
    ```
    """
    from olmo_jax.parallel.local import launch_local

    raise typer.Exit(launch_local(command, processes, devices_each))
